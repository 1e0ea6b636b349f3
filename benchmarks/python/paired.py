"""Interleaved rounds: the one way in which this project takes a ratio (README.md).

Every side is warm before the first round; a round times each side once, in turn (A B C, A B C, ...); each round gives
one ratio of any two sides; the median of the ratios is the result, with the extremes and the ratio of the minima beside
it. Outputs are compared before anything is timed: that is `outputs.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROUNDS = 11
SHORTEST = 1e-3  # seconds; a shorter region is looped

Timed = Callable[[], float]  # one repetition, which times itself: seconds


@dataclass(frozen=True)
class Ratio:
    """Median and extremes of one ratio per round, and the ratio of the two smallest times."""

    median: float
    low: float
    high: float
    of_minima: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Rounds:
    """Seconds of every side in every round."""

    seconds: dict[str, list[float]]

    def ratio(self, over: str, under: str, factor: float = 1.0) -> Ratio:
        """Time of ``over`` divided by time of ``under``, round by round, times a constant."""
        pairs = list(zip(self.seconds[over], self.seconds[under], strict=True))
        ratios = sorted(factor * a / b for a, b in pairs)
        minima = factor * min(a for a, _ in pairs) / min(b for _, b in pairs)
        return Ratio(statistics.median(ratios), ratios[0], ratios[-1], minima)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    @property
    def shortest(self) -> float:
        return min(min(times) for times in self.seconds.values())


def seconds_of(run: Callable[[], Any], repeats: int = 1) -> float:
    """Mean time of one call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def looped(run: Callable[[], Any]) -> Timed:
    """A call that needs no preparation, repeated so that a timed region lasts a millisecond at least."""
    run()
    repeats = max(1, int(SHORTEST / max(seconds_of(run), 1e-7)) + 1)
    return lambda: seconds_of(run, repeats)


def rounds(sides: dict[str, Timed], count: int, progress: Callable[[str], None] = lambda _: None) -> Rounds:
    """Warm every side up, then time them in turn, ``count`` times."""
    for name, side in sides.items():
        progress(f"warming up {name}")
        side()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(count):
        progress(f"round {number + 1} of {count}")
        for name, side in sides.items():
            taken[name].append(side())
    return Rounds(taken)
