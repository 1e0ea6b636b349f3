"""What travels with a model beside weights and config: tokenizer, chat template, licence, the receipt of upcycling.

A model carries these files as bytes, so that every folder it is saved to is complete and none points to another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

RECEIPT = "upcycle_receipt.json"
# Licence and notice because the Llama licences ask that they are passed on.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    RECEIPT,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_LARGEST = 256 * 2**20  # tokenizer files have a few MB; a larger file is something else


class UpcycleReceipt(dict[str, Any]):
    """A JSON object whose fields can also be read as attributes.

    source, kind, num_experts, dtype, seed, tensors, parameters; base_model (hub id), licence, quantised: None where
    nothing is known; max_abs_diff: the largest difference of a logit over all routings (None: the check was switched
    off), routings: the same for each of them; max_abs_logit: for scale.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the receipt has no field {name!r}; known: {', '.join(self)}") from None


def read_companions(folder: str | Path) -> dict[str, bytes]:
    """Name and content of the files of ``folder`` that travel with its model."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        wanted = path.is_file() and any(fnmatch(path.name, pattern) for pattern in COMPANIONS)
        if wanted and path.stat().st_size <= _LARGEST:
            found[path.name] = path.read_bytes()
    return found


def write_companions(companions: Mapping[str, bytes], folder: str | Path) -> None:
    """Write companion files into a folder; files that are there already (a trainer writes its own) are kept."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in companions.items():
        path = Path(folder) / name
        if not path.exists():
            path.write_bytes(content)


def receipt_of(companions: Mapping[str, bytes]) -> UpcycleReceipt | None:
    """The receipt among companion files, if there is one."""
    return UpcycleReceipt(json.loads(companions[RECEIPT])) if RECEIPT in companions else None
