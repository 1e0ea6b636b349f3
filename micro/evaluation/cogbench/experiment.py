"""What the seven experiments share: questions, how replies are read, and the evidence that a scorer works on."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from micro.analysis.statistics import Array

Answer = int | float  # index of the chosen option, or a number in [0, 1]
Row = dict[str, Any]
Game = Generator["Query", Answer, list[Row]]  # yields questions, takes answers, returns rows of the table
ANSWER = "\n\nA: "  # behind it stands the forced beginning of the answer


@dataclass(frozen=True)
class Query:
    """One question to an agent.

    Attributes:
        text: what a model completes; ends with the forced beginning of the answer.
        options: what may be answered, by index; empty if the answer is the decimals of a number below one.
        default: what an unreadable number stands for; None = drawn at random.
        state: the same situation as numbers, for agents that read no text.
    """

    text: str
    options: tuple[str, ...] = ()
    default: float | None = None
    state: Mapping[str, Any] = field(default_factory=dict)

    def read(self, reply: str, preset: str = "clean") -> Answer | None:
        """The answer in a continuation of :attr:`text`; None if there is none.

        ``clean``: the option that the reply begins with. ``published``: the last character of the reply must be one.
        """
        reply = reply.strip()
        if not self.options:
            found = re.match(r"\d+", reply)
            return float(f"0.{found.group()}") if found else None
        if preset == "published":
            return self.options.index(reply[-1]) if reply and reply[-1] in self.options else None
        first = re.match(r"[^\W_]+", reply)
        words = [option.casefold() for option in self.options]
        word = first.group().casefold() if first else ""
        return words.index(word) if word in words else None

    def ended(self, reply: str) -> bool:
        """Whether nothing that follows this part of a reply can change the answer."""
        return False

    def reply(self, answer: float) -> str:
        """An answer as the text that continues the prompt: the option, or four decimals at most."""
        if self.options:
            return self.options[int(answer)]
        return f"{min(max(answer, 0.0), 0.9999):.4f}"[2:]

    def guess(self, generator: np.random.Generator) -> Answer:
        """An answer at random: an option, or a number of two decimals from .01 to .99."""
        if self.options:
            return int(generator.integers(len(self.options)))
        return int(generator.integers(1, 100)) / 100

    def fallback(self, generator: np.random.Generator) -> Answer:
        """What an unreadable reply counts as."""
        return self.guess(generator) if self.default is None else self.default


def ask(body: str, question: str, hint: str, prefix: str) -> str:
    """A prompt: the situation, the question with its format, and the forced beginning of the answer."""
    return f"{body.rstrip()}\n\nQ: {question} {hint}{ANSWER}{prefix}"


@dataclass
class Evidence:
    """What a table says, run by run, so that runs can be resampled.

    Attributes:
        metrics: names of the statistic's entries.
        runs: number of runs.
        statistic: weights [runs] (how often each run counts) -> values [metrics].
        details: diagnostics of the fits, as JSON types.
    """

    metrics: tuple[str, ...]
    runs: int
    statistic: Callable[[Array], Array]
    details: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Metric -> value, all runs counted once."""
        found = self.statistic(np.ones(self.runs))
        return {name: float(value) for name, value in zip(self.metrics, found, strict=True)}


class Experiment(ABC):
    """An environment with its scorer.

    Class attributes: ``name`` and ``columns`` of the table, ``metrics`` of the score (behaviour, then "performance"),
    ``runs`` of the full protocol, ``questions`` per run where their number is fixed.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]]
    runs: ClassVar[int]
    questions: ClassVar[int | None] = None

    @abstractmethod
    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        """One run: yields queries, takes answers, returns the rows of its table."""

    @abstractmethod
    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Evidence of a checked table (pandas frame with :attr:`columns`, ordered as stored)."""


def per_run_means(metrics: tuple[str, ...], values: Array, details: dict[str, Any] | None = None) -> Evidence:
    """Evidence whose statistic is the mean over runs of values [runs, metrics]."""
    return Evidence(metrics, len(values), lambda w: (w @ values) / w.sum(), details or {})
