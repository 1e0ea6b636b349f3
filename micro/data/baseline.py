"""A bag-of-words classifier of spans: how far the words alone give a label away, shown beside the routing accuracy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.data.records import Record
from micro.experts import LABELS

_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")


def _words(text: str) -> list[str]:
    return [word.lower() if not word.isdigit() else "0" for word in _WORD.findall(text)]


def _labelled(records: Iterable[Record]) -> tuple[list[list[str]], NDArray[np.int64]]:
    pairs = [(_words(r.assistant[s.start : s.end]), LABELS.index(s.label)) for r in records for s in r.spans]
    if not pairs:
        raise ValueError("bag of words: the records hold no spans")
    return [words for words, _ in pairs], np.array([label for _, label in pairs], dtype=np.int64)


class BagOfWords:
    """Multinomial naive Bayes over the words of a span, add-one smoothing, all numbers counted as one word.

    log p(label | words) = log p(label) + sum of log p(word | label) + constant; unknown words are skipped.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        texts, labels = _labelled(records)
        self._index = {word: i for i, word in enumerate(sorted({w for words in texts for w in words}))}
        counts = np.ones((len(LABELS), len(self._index)))
        for words, label in zip(texts, labels, strict=True):
            np.add.at(counts[label], [self._index[w] for w in words], 1.0)
        self._word = np.log(counts / counts.sum(axis=1, keepdims=True)).T  # [words, labels]
        seen = np.bincount(labels, minlength=len(LABELS))
        self._prior = np.log(np.where(seen > 0, seen, np.finfo(float).tiny) / seen.sum())

    def predict(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Expert index of each text, int64 [texts]."""
        return np.array([self._best(_words(text)) for text in texts], dtype=np.int64)

    def _best(self, words: list[str]) -> int:
        known = [self._index[w] for w in words if w in self._index]
        return int(np.argmax(self._prior + self._word[known].sum(axis=0)))


@dataclass(frozen=True)
class BaselineResult:
    """Accuracy over the spans of held-out records. `confusion` [4,4]: rows true, columns predicted, experts in order.

    `balanced_accuracy`: mean over the labels that occur; `word_accuracy`: the same, each span weighted by its words.
    """

    accuracy: float
    balanced_accuracy: float
    word_accuracy: float
    confusion: NDArray[np.int64]
    spans: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**self.__dict__, "confusion": self.confusion.tolist()}

    def __str__(self) -> str:
        return (
            f"bag of words: {self.accuracy:.3f} of {self.spans} held-out spans (balanced {self.balanced_accuracy:.3f})"
        )


def bag_of_words_baseline(train: Iterable[Record], test: Iterable[Record]) -> BaselineResult:
    """Trains on the spans of `train` and scores those of `test`. ValueError where either holds no spans."""
    model = BagOfWords(train)
    texts, labels = _labelled(test)
    guesses = np.array([model._best(words) for words in texts], dtype=np.int64)
    sizes = np.array([len(words) for words in texts])
    confusion = np.zeros((len(LABELS), len(LABELS)), dtype=np.int64)
    np.add.at(confusion, (labels, guesses), 1)
    weighted = np.zeros((len(LABELS), len(LABELS)))
    np.add.at(weighted, (labels, guesses), sizes)
    right = float(np.mean(labels == guesses))
    return BaselineResult(right, _balanced(confusion), _balanced(weighted), confusion, len(labels))


def _balanced(confusion: NDArray[Any]) -> float:
    totals = confusion.sum(axis=1)
    present = totals > 0
    return float(np.mean(np.diag(confusion)[present] / totals[present]))
