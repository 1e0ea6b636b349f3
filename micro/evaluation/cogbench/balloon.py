"""Experiment 7, balloon analogue risk task: how far to go before it bursts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.experiment import Evidence, Experiment, Game, Query, Row, ask
from micro.evaluation.cogbench.tables import Integers, numbers, ordered, sums

LIMITS = (128, 32, 8)  # a balloon of a type bursts at a pump that is uniform over 1..limit
EACH = 15
LETTERS = ("A", "B", "C")
OPTIONS = ("1", "2")


class Balloon(Experiment):
    """Forty-five balloons of three types: each pump adds a point, a burst takes the points of this balloon."""

    name: ClassVar[str] = "balloon"
    columns: ClassVar[tuple[str, ...]] = (
        "run",
        "balloon_idx",
        "balloon_trial",
        "trial",
        "pumps",
        "reward",
        "max_pumps",
        "exploded",
    )
    metrics: ClassVar[tuple[str, ...]] = ("risk taking", "performance")
    runs: ClassVar[int] = 10

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        letters = generator.permutation(LETTERS).tolist()
        types = generator.permutation(np.repeat(np.arange(len(LIMITS)), EACH)).tolist()
        seen = [0] * len(LIMITS)
        rows: list[Row] = []
        for trial, kind in enumerate(types):
            pumps, exploded = 0, False
            while not exploded:
                inflate = int(generator.integers(2))  # the option that inflates
                answer = yield Query(
                    _prompt(rows, letters, letters[kind], pumps, inflate),
                    OPTIONS,
                    state={"pumps": pumps, "limit": LIMITS[kind], "inflate": inflate, "rows": rows},
                )
                if answer != inflate:
                    break
                exploded = bool(generator.random() < 1 / (LIMITS[kind] - pumps))
                pumps += 1
            rows.append(
                {
                    "run": run,
                    "balloon_idx": kind,
                    "balloon_trial": seen[kind],
                    "trial": trial,
                    "pumps": pumps,
                    "reward": 0 if exploded else pumps,
                    "max_pumps": LIMITS[kind],
                    "exploded": int(exploded),
                }
            )
            seen[kind] += 1
        return rows

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Mean pumps per balloon, the bursting pump included, and mean points.

        One row per balloon; of a table with one row per step, the last row of each balloon (:func:`_last_steps`).
        """
        frame, run = ordered(frame, "trial")
        both: Array = np.stack([numbers(frame, "pumps"), numbers(frame, "reward")], 1)
        if (both[:, 0] < 0).any():
            raise ValueError("column 'pumps': expected numbers of at least 0")
        last = _last_steps(frame, run, both[:, 0])
        total, count = sums(run[last], both[last]), sums(run[last], np.ones(len(last)))
        details = {"balloons": len(last), "rows": len(frame)}
        return Evidence(self.metrics, len(total), lambda w: (w @ total) / (w @ count), details)


def _last_steps(frame: Any, run: Integers, pumps: Array) -> Integers:
    """Rows that end a balloon: all of them, unless rows of the same balloon count its pumps up one by one.

    A balloon is told by run, ``balloon_idx`` (its type) and ``balloon_trial`` (the how-manieth of its type); by run and
    ``balloon_idx`` where that counts all balloons; or else by run and ``trial``. ``trial`` may count balloons, steps
    within a balloon or all steps.
    """
    kind, turn, trial = (numbers(frame, name) for name in ("balloon_idx", "balloon_trial", "trial"))
    limits = len(np.unique(numbers(frame, "max_pumps")))
    counted = len(np.unique(kind)) > max(limits, len(LIMITS))
    everyone = np.arange(len(run))
    for columns in ([run, kind] if counted else [run, kind, turn], [run, trial]):
        keys, balloon = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
        if len(keys) == len(run):
            return everyone
        ends = _ends(balloon.reshape(-1), pumps)
        if ends is not None:
            return ends
    return everyone


def _ends(balloon: Integers, pumps: Array) -> Integers | None:
    """The last row of each balloon; None if rows of a balloon do not count its pumps up from 0 or 1, one by one.

    The last step may repeat the number of pumps: the answer that ended the balloon.
    """
    order = np.lexsort((pumps, balloon))  # stable: rows of as many pumps stay in the order of trials
    sizes = pumps[order]
    same = balloon[order][1:] == balloon[order][:-1]
    first, last = np.append(True, ~same), np.append(~same, True)
    step = np.diff(sizes)
    counts = (step == 1) | ((step == 0) & last[1:])
    if (sizes[first] > 1).any() or not counts[same].all():
        return None
    ends: Integers = np.sort(order[last])
    return ends


def _prompt(rows: list[Row], letters: list[str], letter: str, pumps: int, inflate: int) -> str:
    lines = [
        f"- Balloon of type {letters[row['balloon_idx']]}: "
        + (f"burst at pump {row['pumps']}, 0 points." if row["exploded"] else f"{row['pumps']} pumps, kept its points.")
        for row in rows
    ]
    told = "Earlier balloons:\n" + "\n".join(lines) if lines else "This is the first balloon."
    actions = ("Skip, keep the points and go on to the next balloon.", "Inflate the balloon once more for one point.")
    first, second = actions if inflate == 1 else actions[::-1]
    body = (
        "You inflate balloons, one after the other, of the types A, B and C. Every pump is worth one point, but any "
        "pump may burst the balloon, and then its points are lost. The types differ in how much air they bear. You "
        f"want as many points as possible over all balloons.\n{told}\n"
        f"Now you hold a balloon of type {letter}; you have inflated it {pumps} {'time' if pumps == 1 else 'times'}.\n"
        f"Option 1: {first}\nOption 2: {second}"
    )
    return ask(body, "Which option do you choose?", "(Answer with 1 or 2.)", "Option ")
