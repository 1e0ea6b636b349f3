"""Experiment 3, restless bandit: does confidence follow being right?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.experiment import Evidence, Experiment, Game, Query, Row, ask
from micro.evaluation.cogbench.tables import Integers, flags, numbers, ordered, sums

MACHINES = ("F", "J")
MEANS, SPREAD = (40.0, 60.0), 8.0
BLOCKS = (21, 20, 20, 19)


class RestlessBandit(Experiment):
    """Two slot machines that swap their means without notice; a choice and its confidence in each trial."""

    name: ClassVar[str] = "restless_bandit"
    columns: ClassVar[tuple[str, ...]] = (
        "run",
        "trial",
        "block",
        "block_trial",
        "choice",
        "reward",
        "confidence",
        "accurate",
    )
    metrics: ClassVar[tuple[str, ...]] = ("meta-cognition", "performance")
    runs: ClassVar[int] = 10
    questions: ClassVar[int | None] = 2 * sum(BLOCKS)

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        rows: list[Row] = []
        better = int(generator.integers(2))
        for block, length in enumerate(BLOCKS):
            for block_trial in range(length):
                means = MEANS if better == 1 else MEANS[::-1]
                rewards = np.rint(generator.normal(means, SPREAD)).astype(int)
                state = {"rows": rows, "better": better}
                choice = int((yield Query(_choice_prompt(rows), MACHINES, state={**state, "asked": "choice"})))
                confidence = yield Query(
                    _confidence_prompt(rows, MACHINES[choice]),
                    default=0.0,
                    state={**state, "asked": "confidence", "choice": choice},
                )
                # The published environment has moved on to the next block when it is asked for the better machine.
                swapped = preset == "published" and block_trial == length - 1 and block < len(BLOCKS) - 1
                rows.append(
                    {
                        "run": run,
                        "trial": len(rows),
                        "block": block,
                        "block_trial": block_trial,
                        "choice": choice,
                        "reward": int(rewards[choice]),
                        "confidence": confidence,
                        "accurate": int((choice == better) != swapped),
                    }
                )
            better = 1 - better
        return rows

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Per run, the mean of 1 - (right - confidence)², confidence rescaled to the run's range.

        Which machine was better is inferred per block from choices and ``accurate``. ``clean`` judges every trial by
        its own block; ``published`` judges the last trial of a block by the next block. Where the column contradicts
        itself it is taken as it stands, and the details say so.
        """
        frame, run = ordered(frame, "block", "block_trial")
        reward, stored = numbers(frame, "reward"), flags(frame, "accurate")
        confidence = numbers(frame.fillna({"confidence": 0.0}), "confidence")
        right, kept = _accuracy(frame, run, stored, preset)
        values = np.zeros((int(run.max()) + 1, 2))
        for r in range(len(values)):
            mine = run == r
            scaled = _rescaled(confidence[mine])
            values[r] = (1 - (right[mine] - scaled) ** 2).mean(), reward[mine].sum()
        count = sums(run, np.ones(len(run)))

        def statistic(weights: Array) -> Array:
            return np.array([weights @ values[:, 0] / weights.sum(), weights @ values[:, 1] / (weights @ count)])

        details = {
            "rows": len(frame),
            "accuracy": float(right.mean()),
            "changed_accuracies": int((right != stored).sum()),
            "runs_with_contradicting_accuracy": kept,
        }
        return Evidence(self.metrics, len(values), statistic, details)


def _rescaled(confidence: Array) -> Array:
    low, high = confidence.min(), confidence.max()
    return confidence if low == high else (confidence - low) / (high - low)


def _accuracy(frame: Any, run: Integers, stored: Array, preset: str) -> tuple[Array, int]:
    """Whether each choice was right, judged as the preset wants, and the number of runs taken as they stand."""
    _, choice = np.unique(np.asarray([str(value) for value in frame["choice"].tolist()]), return_inverse=True)
    if choice.max() > 1:
        raise ValueError("column 'choice': expected two machines, got more")
    block = numbers(frame, "block")
    right, contradicting = stored.copy(), 0
    for r in range(int(run.max()) + 1):
        rows = np.flatnonzero(run == r)
        judged = _judged(choice[rows], stored[rows], block[rows], preset)
        if judged is None:
            contradicting += 1
        else:
            right[rows] = judged
    return right, contradicting


def _judged(choice: NDArray[Any], stored: Array, block: Array, preset: str) -> Array | None:
    """One run's accuracies; None if the stored ones fit no better machine per block."""
    out = stored.copy()
    named = np.where(stored == 1, choice, 1 - choice)  # the machine that each row says was better
    numbers_of_blocks = np.unique(block)
    better = []
    for value in numbers_of_blocks:
        here = np.flatnonzero(block == value)
        said = named[here[:-1]] if len(here) > 1 else named[here]
        if (said != said[0]).any():
            return None
        better.append(said[0])
    for i, value in enumerate(numbers_of_blocks):
        here = np.flatnonzero(block == value)
        out[here[:-1]] = choice[here[:-1]] == better[i]
        if preset == "clean":
            out[here[-1]] = choice[here[-1]] == better[i]
        elif i + 1 < len(better):
            out[here[-1]] = choice[here[-1]] == better[i + 1]
    return out


def _history(rows: list[Row]) -> str:
    lines = [
        f"- Machine {MACHINES[row['choice']]} with confidence {row['confidence']:.2f} paid {row['reward']} points."
        for row in rows
    ]
    told = "Your plays so far:\n" + "\n".join(lines) if lines else "You have not played yet."
    return (
        "You play two slot machines, F and J, again and again. One of them pays more than the other on average; every "
        "now and then, without a sign, the better machine becomes the worse one. You want as many points as possible. "
        "Each time you also say how sure you are that you chose the better machine, from 0 (not at all) to 1 "
        f"(entirely).\n{told}"
    )


def _choice_prompt(rows: list[Row]) -> str:
    return ask(_history(rows), "Which machine do you play next?", "(Answer with F or J.)", "Machine ")


def _confidence_prompt(rows: list[Row], letter: str) -> str:
    return ask(
        _history(rows),
        "Which machine do you play next, and how sure are you that it is the better one?",
        "(Answer with F or J and a number between 0 and 1 that has two decimals.)",
        f"Machine {letter} with confidence 0.",
    )
