"""From a stage's sources to its encoded rows, with counts and hashes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.data.records import DataWarning, RowCounts
from micro.training.order import RowBuilder, Rows

if TYPE_CHECKING:
    from micro.training.recipe import ResolvedStage, Source

KEPT = ("encoded", "truncated", "answer_cut")  # counts of rows that are trained on
LABEL_OPTIONS = ("label_tokenisation", "last_span", "truncation")  # options of labelled answers only


@dataclass
class StageData:
    """The rows of a stage.

    counts: of encoding, by reason: "encoded", "truncated", "answer_cut", and the reasons why rows were dropped. hashes:
    SHA-256 of every source file.
    """

    rows: Rows
    counts: Counter[str] = field(default_factory=Counter)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Rows that could not be encoded: no answer left, no template found."""
        return sum(count for name, count in self.counts.items() if name not in KEPT)

    def to_dict(self) -> dict[str, Any]:
        """For run.json; tokens_sha256 is the hash of everything that training sees."""
        return {
            "rows": len(self.rows),
            "tokens": self.rows.tokens,
            "targets": self.rows.targets,
            "counts": dict(self.counts),
            "files_sha256": self.hashes,
            "tokens_sha256": self.rows.digest(),
        }


def load_stage_data(stage: ResolvedStage, tokenizer: Any, *, experts: int, seed: int) -> StageData:
    """Read, generate and encode the sources of a stage, in order; the sampler shuffles.

    tokenizer: a fast one. experts: of the model, for random labels. Errors: what ``micro.data`` raises; ValueError
    where no row is left, or where labels are asked for that the rows do not have.
    """
    builder = RowBuilder()
    counts = RowCounts()
    hashes = {}
    for source in stage.sources:
        begin = len(builder)
        for row in _encoded(source, stage, tokenizer, counts):
            if row is not None:
                builder.add(row)
        builder.repeat(begin, source.repeat)
        hashes[source_name(source)] = source_hash(source)
    if not len(builder):
        reasons = counts.summary() or "the sources are empty"
        raise ValueError(
            f"stage {stage.name!r}: no row is left to train on ({reasons}): check the files with `micro data "
            f"validate`, and max_length ({stage.max_length})"
        )
    rows = builder.build(random_labels=experts if stage.random_labels else 0, seed=seed + stage.index)
    if not rows.labelled and (stage.route_by == "labels" or "label_loss" in stage.losses):
        raise ValueError(f"stage {stage.name!r}: asks for routing labels, but some of its rows (chats) have none")
    if any(name not in ("encoded", "truncated") for name in counts):
        warnings.warn(f"stage {stage.name!r}: {counts.summary()}; max_length is {stage.max_length}", DataWarning, 2)
    return StageData(rows, counts, hashes)


def _encoded(
    source: Source, stage: ResolvedStage, tokenizer: Any, counts: Counter[str]
) -> Iterator[Mapping[str, list[int]] | None]:
    from micro import data
    from micro.data.chat import encode_conversation
    from micro.data.encoding import encode_record, resolve_options

    given = {"max_length": stage.max_length, **stage.encoding}
    if is_chat(source):
        assert source.path is not None
        options = resolve_options(**{name: value for name, value in given.items() if name not in LABEL_OPTIONS})
        for chat in islice(data.iter_chat(source.path), source.limit):
            yield encode_conversation(chat, tokenizer, options, counts)
        return
    options = resolve_options(**given)
    records = _generated(source) if source.generate else data.iter_records(str(source.path))
    for index, record in enumerate(islice(records, source.limit)):
        yield encode_record(record, tokenizer, options, counts, index)


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
