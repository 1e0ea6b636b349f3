"""Encoded rows in few bytes, and the order in which a run visits them.

The order is a function of (seed, epoch) alone: no generator state decides it, so a resumed run finds its place by
counting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

IGNORED = -100
LANGUAGE = -1  # a routing label that means "the language expert" (model.md 2.9)


class Row(TypedDict):
    """One encoded row, as ``micro.data.encode`` returns it, or ``encode_chat``, without routing labels."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]
    routing_labels: NotRequired[list[int]]


class RowBuilder:
    """Collects encoded rows at 6 bytes a token: id, whether it is a target, routing label."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int32]] = []
        self._trained: list[NDArray[np.bool_]] = []
        self._routing: list[NDArray[np.int8]] = []
        self._labelled = True

    def add(self, row: Mapping[str, Sequence[int]]) -> None:
        """Add one row. Labels must be the ids or -100: that is what every mask of model.md 8.5 gives."""
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        labels = np.asarray(row["labels"], dtype=np.int32)
        trained = labels != IGNORED
        if not np.array_equal(labels[trained], ids[trained]):
            raise ValueError("a row's labels must be its input_ids, or -100 where nothing is trained")
        routing = row.get("routing_labels")
        self._labelled &= routing is not None
        self._ids.append(ids)
        self._trained.append(trained)
        self._routing.append(np.full(len(ids), LANGUAGE, np.int8) if routing is None else np.asarray(routing, np.int8))

    def __len__(self) -> int:
        return len(self._ids)

    def repeat(self, begin: int, times: int) -> None:
        """Take the rows from `begin` on `times` times in all."""
        self._ids += self._ids[begin:] * (times - 1)
        self._trained += self._trained[begin:] * (times - 1)
        self._routing += self._routing[begin:] * (times - 1)

    def build(self, *, random_labels: int = 0, seed: int = 0) -> Rows:
        """All rows added so far; the builder is empty afterwards."""
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        rows = Rows(
            np.concatenate([np.empty(0, np.int32), *self._ids]),
            np.concatenate([np.empty(0, np.bool_), *self._trained]),
            np.concatenate([np.empty(0, np.int8), *self._routing]),
            starts,
            labelled=self._labelled or random_labels > 0,
            random_labels=random_labels,
            seed=seed,
        )
        self._ids, self._trained, self._routing = [], [], []
        return rows


class Rows(Dataset[Row]):
    """Encoded rows of a stage.

    labelled: whether every row has routing labels; if not, none is given out. random_labels: 0, or the number of
    experts: then every token's routing label is drawn uniformly, again at every visit, from a generator seeded by
    (seed, epoch, row) (model.md 6.4).
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        trained: NDArray[np.bool_],
        routing: NDArray[np.int8],
        starts: NDArray[np.int64],
        *,
        labelled: bool = True,
        random_labels: int = 0,
        seed: int = 0,
    ) -> None:
        self.ids, self.trained, self.routing, self.starts = ids, trained, routing, starts
        self.labelled, self.random_labels, self.seed, self.epoch = labelled, random_labels, seed, 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Row:
        begin, end = int(self.starts[index]), int(self.starts[index + 1])
        ids = self.ids[begin:end]
        routing = self.routing[begin:end]
        if self.random_labels:
            generator = np.random.default_rng([self.seed, self.epoch, index])
            routing = generator.integers(0, self.random_labels, end - begin, dtype=np.int8)
        row: Row = {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * (end - begin),
            "labels": np.where(self.trained[begin:end], ids, IGNORED).tolist(),
        }
        if self.labelled:
            row["routing_labels"] = routing.tolist()
        return row

    def set_epoch(self, epoch: int) -> None:
        """The pass over the data that follows; only random labels depend on it."""
        self.epoch = epoch

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.starts)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.starts[-1])

    @property
    def targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.trained.sum())

    def digest(self) -> str:
        """SHA-256 of everything that training sees: a resumed run must find the same rows."""
        digest = hashlib.sha256()
        for part in (self.starts, self.ids, self.trained, self.routing):
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
        return digest.hexdigest()


class WindowSampler(Sampler[int]):
    """Rows in a new random order every epoch, then sorted by length inside each window of one optimizer step.

    A window holds `window` rows; sorting inside it changes no window's gradient but for rounding, and puts rows of like
    length into one micro batch, so that few pads are computed. The longest rows come first: a run that does not fit in
    memory fails early in its first step.
    """

    def __init__(self, lengths: NDArray[np.int64], window: int, seed: int) -> None:
        if window < 1:
            raise ValueError(f"WindowSampler: window must be at least 1, got {window}")
        self.lengths, self.window, self.seed, self.epoch = lengths, window, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        for begin in range(0, len(order), self.window):
            part = order[begin : begin + self.window]
            yield from part[np.argsort(-self.lengths[part], kind="stable")].tolist()

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order the next iteration gives."""
        self.epoch = epoch
