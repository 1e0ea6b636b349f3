"""An experiment: sides that are timed together, and the goals that come out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from goals import BY_KEY, Line, Skipped
from lab import Lab
from paired import Ratio, Rounds

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = {"bf16": BF16, "fp32": FP32}


class MissingError(Exception):
    """Something that this experiment needs is not installed or not in this build; it is skipped with this line."""


@dataclass(frozen=True)
class Experiment:
    """``minutes``: a guess for eleven rounds on one thread, on a CPU as in performance.md 5.7."""

    name: str
    goals: tuple[str, ...]
    minutes: float
    run: Callable[[Lab], Iterable[Line | Skipped]]

    def keys(self, names: set[str]) -> set[str]:
        """The goals of this experiment among those asked for; no names: all."""
        return {key for key in self.goals if not names or BY_KEY[key].name in names}


def wants(lab: Lab, key: str) -> bool:
    """Whether a goal is among those asked for, so that the side that it needs is worth its time."""
    return not lab.options.wanted or BY_KEY[key].name in lab.options.wanted


@dataclass
class Table:
    """Collects the lines of one experiment."""

    lab: Lab
    rounds: Rounds

    def line(
        self,
        key: str,
        ours: str,
        theirs: str,
        against: str,
        compared: dict[str, float],
        *,
        fast: str | None = None,
        factor: float = 1.0,
        note: str = "",
    ) -> Line:
        """The goal's figure from two sides by name: theirs over ours where a large figure is good, else the inverse."""

        def ratio(side: str) -> Ratio:
            over, under = (theirs, side) if BY_KEY[key].better == "higher" else (side, theirs)
            return self.rounds.ratio(over, under, factor)

        in_fast = ratio(fast) if fast is not None and fast in self.rounds.seconds else None
        return Line(key, ratio(ours), self.words(ours), self.words(theirs), against, compared, in_fast, note)

    def words(self, side: str) -> str:
        return f"{self.rounds.median(side) * 1e3:.4g} ms"
