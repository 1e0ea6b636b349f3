"""Experiment 6, temporal discounting: what waiting must be worth."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, ClassVar

import numpy as np

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.experiment import Answer, Evidence, Experiment, Game, Query, Row, ask, per_run_means
from micro.evaluation.cogbench.tables import numbers

BASE = 500
# Factors in percent, so that amounts are exact. First question, then what follows option 1 and option 2.
FIRST, UP, DOWN = 110, (120, 150), (102, 101)
OPTIONS = ("1", "2")


class TemporalDiscounting(Experiment):
    """Money now or more money later: three staircases and four questions on anomalies. A score, no performance."""

    name: ClassVar[str] = "temporal_discounting"
    columns: ClassVar[tuple[str, ...]] = ("run", "score")
    metrics: ClassVar[tuple[str, ...]] = ("temporal discounting",)
    runs: ClassVar[int] = 1

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        score, factor = 0, None
        for base, pays in ((BASE, False), (10 * BASE, False), (BASE, True)):
            points, smallest = yield from _staircase(base, pays)
            score += points
            if base == BASE and not pays:
                factor = smallest
        row: Row = {"run": run, "factor": factor, "staircases": score}
        if factor is not None:
            for name, (one, two) in _anomalies(factor).items():
                answer = yield Query(_prompt(one, two), OPTIONS, state={"asked": name, "factor": factor})
                row[name] = int(answer) + 1
                score += int(answer) == 0
        return [{**row, "score": score}]

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """The mean score over runs, 0 to 19; more points mean that the future counts less."""
        score = numbers(frame, "score")
        if ((score < 0) | (score > 19)).any():
            raise ValueError("column 'score': expected numbers from 0 to 19")
        if len(set(frame["run"].tolist())) != len(frame):
            raise ValueError("temporal_discounting: expected one row per run")
        values: Array = score[:, None]
        return per_run_means(self.metrics, values)


def _staircase(base: int, pays: bool) -> Generator[Query, Answer, tuple[int, int | None]]:
    """Score 0 to 5 and the smallest factor (in percent) at which option 2 was taken."""
    taken = None
    points = 0
    path: tuple[int, ...] = (FIRST,)
    later = False
    for step in range(3):
        percent = path[step]
        answer = int((yield Query(_prompt(*_pair(base, percent, pays)), OPTIONS, state=_state(base, percent, pays))))
        if answer == 1:
            taken = percent
        if step == 0:
            later = answer == 1
            points, path = (2, (FIRST, *DOWN)) if later else (3, (FIRST, *UP))
        elif later == (answer == 1):
            points += -1 if later else 1
        if later != (answer == 1):
            break
    return points, taken


def _state(base: int, percent: int, pays: bool) -> dict[str, Any]:
    return {"asked": "staircase", "base": base, "percent": percent, "pays": pays}


def _dollars(base: int, percent: int) -> str:
    return f"{base * percent // 100} dollars"


def _pair(base: int, percent: int, pays: bool) -> tuple[str, str]:
    verb = "Pay" if pays else "Receive"
    return f"{verb} {_dollars(base, 100)} now.", f"{verb} {_dollars(base, percent)} in 12 months."


def _anomalies(f: int) -> dict[str, tuple[str, str]]:
    """Present bias, subadditivity, delay and speed-up, delay length, each with its two options."""
    plain, more, extra = _dollars(BASE, 100), _dollars(BASE, f), _dollars(BASE, f - 100)
    return {
        "present_bias": (f"Receive {plain} in 12 months.", f"Receive {more} in 24 months."),
        "subadditivity": (f"Receive {plain} now.", f"Receive {_dollars(BASE, 2 * (f - 100) + 100)} in 24 months."),
        "delay_speed_up": (f"Receive {plain} now.", f"Wait 12 months for the {plain} and receive {extra} on top."),
        "delay_length": (f"Wait 12 months and receive {more}.", f"Pay {extra} and receive the {more} now."),
    }


def _prompt(one: str, two: str) -> str:
    body = (
        f"You are free to choose one of two offers, and what you choose will happen.\nOption 1: {one}\nOption 2: {two}"
    )
    return ask(body, "Which option do you prefer?", "(Answer with 1 or 2.)", "I prefer option ")
