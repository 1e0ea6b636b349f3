"""The rows of a run: labelled answers and chats of the training templates, held-out answers of the other templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.replication.plan import Setup
from micro.analysis.batches import IGNORED
from micro.data import Collator, Record, Span, encode, generate, generate_chat, save_chat, save_records
from micro.experts import LABELS, NAMES

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT_SEED = 90_001  # of the held-out answers: the same for all runs
LEAST_TEMPLATES = 8


def write_training_data(setup: Setup, seed: int, folder: Path) -> tuple[Path, Path]:
    """(records, chats) of one seed, from the training templates; the files are the same whenever they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    records, chats = folder / "records.jsonl", folder / "chats.jsonl"
    save_records(training_records(setup, seed), records)
    save_chat(generate_chat(setup.chat_records, seed=2 * seed + 1), chats)
    return records, chats


def training_records(setup: Setup, seed: int) -> list[Record]:
    """The labelled answers that the runs of one seed are trained on."""
    return generate(setup.train_records, split="train", seed=2 * seed)


def held_out_records(setup: Setup) -> list[Record]:
    """Answers from templates that no training answer shares. Errors: ValueError where a domain has too few of them."""
    records = generate(setup.test_records, split="test", seed=HELD_OUT_SEED)
    seen = {name for record in records for name in record.meta["templates"]}
    found = {domain: sum(name.startswith(f"{domain}.") for name in seen) for domain in NAMES}
    if few := {domain: n for domain, n in found.items() if n < LEAST_TEMPLATES}:
        raise ValueError(f"every domain needs {LEAST_TEMPLATES} held-out templates, found {few}; raise test_records")
    return records


@dataclass(frozen=True)
class Item:
    """One sentence of one answer. record: its place; domain: index of its label's expert; template: its name."""

    record: int
    domain: int
    template: str


@dataclass
class Items:
    """Labelled answers cut into items, as batches.

    A batch holds `input_ids`, `attention_mask`, `labels`, `routing_labels` and `items`: int64 [B,S], the item that a
    token belongs to, -1 for prompt, turn end and anything between sentences.
    """

    items: list[Item]
    batches: list[dict[str, Tensor]]

    @classmethod
    def of(cls, records: Sequence[Record], tokenizer: Any, *, max_length: int, max_tokens: int) -> Items:
        """Cut and encode records. Errors: ValueError where an answer does not fit into `max_length`."""
        items: list[Item] = []
        rows: list[dict[str, list[int]]] = []
        for index, record in enumerate(records):
            row = encode(record, tokenizer, max_length=max_length)
            places = span_of_token(record, tokenizer, max_length)
            if row is None or places is None or set(range(len(record.spans))) - set(places.tolist()):
                raise ValueError(f"held-out record {index} does not fit into {max_length} tokens; raise max_length")
            first = len(items)
            names = record.meta["templates"]
            items += [Item(index, LABELS.index(s.label), n) for s, n in zip(record.spans, names, strict=True)]
            rows.append({**row, "items": np.where(places >= 0, places + first, -1).tolist()})
        return cls(items, list(_batched(rows, Collator(tokenizer), max_tokens)))

    @property
    def domains(self) -> NDArray[np.int64]:
        """Domain of each item."""
        return np.array([item.domain for item in self.items])

    def counts(self) -> NDArray[np.int64]:
        """Target tokens of each item."""
        found = np.zeros(len(self.items), np.int64)
        for batch in self.batches:
            ids = batch["items"][batch["items"] >= 0].numpy()
            np.add.at(found, ids, 1)
        return found


def span_of_token(record: Record, tokenizer: Any, max_length: int) -> NDArray[np.int64] | None:
    """Which span of the answer each token belongs to, int64 [T], -1 for none; None where the record is dropped.

    The encoder knows labels only, so spans are given labels that number them: two passes with three labels each, the
    fourth (language) stands for "no span".
    """
    if len(record.spans) > 9:
        raise ValueError(f"span_of_token: at most 9 spans, got {len(record.spans)}")
    digits = []
    for place in (1, 3):
        spans = [Span(s.start, s.end, LABELS[i // place % 3]) for i, s in enumerate(record.spans)]
        row = encode(Record(record.prompt, record.assistant, spans), tokenizer, max_length=max_length)
        if row is None:
            return None
        digits.append(np.array(row["routing_labels"]))
    answer = np.array(row["labels"]) != IGNORED
    inside = answer & (digits[0] < 3) & (digits[1] < 3)
    return np.where(inside, digits[0] + 3 * digits[1], -1)


def _batched(rows: list[dict[str, list[int]]], collate: Collator, max_tokens: int) -> Any:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    waiting: list[dict[str, list[int]]] = []
    for index in order:
        if waiting and (len(waiting) + 1) * len(rows[index]["input_ids"]) > max_tokens:
            yield _collated(waiting, collate)
            waiting = []
        waiting.append(rows[index])
    if waiting:
        yield _collated(waiting, collate)


def _collated(rows: list[dict[str, list[int]]], collate: Collator) -> dict[str, Tensor]:
    batch = collate([{name: values for name, values in row.items() if name != "items"} for row in rows])
    places = torch.full_like(batch["input_ids"], -1)
    for i, row in enumerate(rows):
        places[i, : len(row["items"])] = torch.tensor(row["items"])
    return {**batch, "items": places}


def bag_of_words(setup: Setup, seed: int) -> float:
    """Balanced accuracy of a bag-of-words classifier on the held-out sentences: what the words alone give away."""
    from micro.data import bag_of_words_baseline

    return bag_of_words_baseline(training_records(setup, seed), held_out_records(setup)).balanced_accuracy


__all__ = ["NAMES", "Item", "Items", "bag_of_words", "held_out_records", "training_records", "write_training_data"]
