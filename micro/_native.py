"""Loads the compiled core: torch, then libmicro, then the module ``micro._C``. Importing this module does it once.

libmicro registers the operators of ``torch.ops.micro``. Its C++ interface is that of the torch it was built against; a
binary for another torch does not load, so the versions are compared first and a mismatch is one sentence.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = Path(__file__).parent / "lib" / "libmicro.so"


def rebuild_command(info: dict[str, str]) -> str:
    """The command that builds micro against the torch that is installed now."""
    if info.get("in_source_tree") == "ON":
        return f"make -C {LIBRARY.parents[2]} build"
    return (
        "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir --no-binary :all: micro-reasoners"
    )


def read_build_info() -> dict[str, str]:
    """What the build wrote beside libmicro: version, torch, compiler, CUDA.

    Raises:
        ImportError: the core has not been built.
    """
    try:
        info: dict[str, str] = json.loads(LIBRARY.with_name("build_info.json").read_text())
    except FileNotFoundError:
        raise ImportError(
            f"the compiled core of micro is missing ({LIBRARY}): in a checkout run `make build`, else reinstall with "
            "`pip install --no-build-isolation --force-reinstall --no-deps micro-reasoners`"
        ) from None
    return info


def mismatch(built: str, found: str) -> bool:
    """Whether a core built against torch ``built`` cannot run with torch ``found`` (local parts like +cpu apart)."""
    return built.split("+")[0] != found.split("+")[0]


def _load() -> ModuleType:
    info = read_build_info()
    built, found = info["torch"], str(torch.__version__)
    sentence = f"micro was built against torch {built} but torch {found} is installed: run `{rebuild_command(info)}`"
    if mismatch(built, found):
        raise ImportError(sentence)
    try:
        torch.ops.load_library(str(LIBRARY))
        return importlib.import_module("micro._C")
    except (OSError, ImportError) as error:
        if built != found and "undefined symbol" in str(error):
            raise ImportError(sentence) from error
        raise ImportError(f"{LIBRARY} does not load: {error}") from error


core = _load()
