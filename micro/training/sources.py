"""From a stage's sources to its encoded rows, with counts and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .order import RowBuilder, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .recipe import ResolvedStage, Source


@dataclass
class StageData:
    """The rows of a stage. dropped: rows that could not be encoded (no answer left, no template found).

    hashes: SHA-256 of every source file; tokens_sha256: of everything that training sees.
    """

    rows: Rows
    dropped: int = 0
    hashes: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "rows": len(self.rows),
            "tokens": self.rows.tokens,
            "targets": self.rows.targets,
            "dropped": self.dropped,
            "files_sha256": self.hashes,
            "tokens_sha256": self.rows.digest(),
        }


def load_stage_data(stage: ResolvedStage, tokenizer: PreTrainedTokenizerBase, *, experts: int, seed: int) -> StageData:
    """Read, generate and encode the sources of a stage, in order; the sampler shuffles.

    experts: of the model, for random labels. Errors: what ``micro.data`` raises, ValueError where no row is left.
    """
    builder, dropped, hashes = RowBuilder(), 0, {}
    for source in stage.sources:
        begin = len(builder)
        for row in _encoded(source, stage, tokenizer):
            if row is None:
                dropped += 1
            else:
                builder.add(row)
        builder.repeat(begin, source.repeat)
        hashes[source_name(source)] = source_hash(source)
    if not len(builder):
        raise ValueError(
            f"stage {stage.name!r}: no row is left to train on ({dropped} dropped): check the files with `micro data "
            f"validate`, and max_length ({stage.max_length})"
        )
    rows_of_stage = builder.build(random_labels=experts if stage.random_labels else 0, seed=seed + stage.index)
    if not rows_of_stage.targets:
        raise ValueError(f"stage {stage.name!r}: no token of the answers is left at max_length {stage.max_length}")
    return StageData(rows_of_stage, dropped, hashes)


def _encoded(
    source: Source, stage: ResolvedStage, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Mapping[str, list[int]] | None]:
    from micro import data

    options = {"max_length": stage.max_length, **stage.encoding}
    if is_chat(source):
        assert source.path is not None
        keep = {
            "mask",
            "double_bos",
            "template_date",
            "missing_template",
            "special_text",
            "max_length",
            "preset",
            "response_template",
        }
        options = {name: value for name, value in options.items() if name in keep}
        for index, chat in enumerate(data.iter_chat(source.path)):
            if source.limit is not None and index >= source.limit:
                return
            yield data.encode_chat(chat.messages, tokenizer, **options)
        return
    records = _generated(source) if source.generate else data.iter_records(str(source.path))
    for index, record in enumerate(records):
        if source.limit is not None and index >= source.limit:
            return
        yield data.encode(record, tokenizer, **options)


def _generated(source: Source) -> Iterator[Any]:
    from micro import data

    assert source.generate is not None
    settings = asdict(source.generate)
    yield from data.generate(
        settings["n"], domains=tuple(settings["domains"]), split=settings["split"], seed=settings["seed"]
    )


def is_chat(source: Source) -> bool:
    """Whether a source is in the `messages` format: as the recipe says, else by the keys of its first row."""
    if source.generate is not None:
        return False
    if source.format is not None:
        return source.format == "chat"
    from micro.data.reading import iter_rows

    assert source.path is not None
    _, row = next(iter_rows(source.path))
    return isinstance(row, Mapping) and "messages" in row


def source_name(source: Source) -> str:
    """A source in a word: its path, or the generator's settings."""
    if source.generate is not None:
        return "generate " + json.dumps(asdict(source.generate), sort_keys=True)
    return str(source.path)


def source_hash(source: Source) -> str:
    """SHA-256 of a file, read in pieces; of the settings for generated rows."""
    digest = hashlib.sha256()
    if source.generate is not None:
        digest.update(source_name(source).encode())
        return digest.hexdigest()
    with Path(str(source.path)).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
