"""Experiment 3, restless bandit: does confidence follow being right?"""

from __future__ import annotations

from collections import Counter
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
                # The published environment has swapped the means, behind the last block too, when it is asked.
                swapped = preset == "published" and block_trial == length - 1
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

        ``published`` takes ``accurate`` as it stands. ``clean`` judges the last trial of every block anew in runs that
        carry the published slip in all of their blocks (:func:`_repaired`). All other runs are taken as they stand,
        even where rows of a block contradict each other; the details say how many of them do.
        """
        frame, run = ordered(frame, "block", "block_trial")
        reward, stored = numbers(frame, "reward"), flags(frame, "accurate")
        confidence = numbers(frame.fillna({"confidence": 0.0}), "confidence")
        repaired, states = _accuracy(frame, run, stored)
        right = repaired if preset == "clean" else stored
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
            "runs_with_published_slip": states["published"],
            "runs_with_contradicting_accuracy": states["contradicting"],
        }
        return Evidence(self.metrics, len(values), statistic, details)


def _rescaled(confidence: Array) -> Array:
    low, high = confidence.min(), confidence.max()
    return confidence if low == high else (confidence - low) / (high - low)


def _accuracy(frame: Any, run: Integers, stored: Array) -> tuple[Array, Counter[str]]:
    """Whether each choice was right, repaired where that is possible, and how many runs there are of each kind."""
    _, choice = np.unique(np.asarray([str(value) for value in frame["choice"].tolist()]), return_inverse=True)
    if choice.max() > 1:
        raise ValueError("column 'choice': expected two machines, got more")
    block = numbers(frame, "block")
    right, states = stored.copy(), Counter[str]()
    for r in range(int(run.max()) + 1):
        rows = np.flatnonzero(run == r)
        right[rows], state = _repaired(choice[rows], stored[rows], block[rows])
        states[state] += 1
    return right, states


def _repaired(choice: NDArray[Any], stored: Array, block: Array) -> tuple[Array, str]:
    """One run's accuracies, and their kind: "plain", "published" (repaired) or "contradicting".

    Published: every block has at least three rows, all but the last of which name one machine as the better one, and
    the last the other.
    """
    named = np.where(stored == 1, choice, 1 - choice)  # the machine that each row says was better
    ends, slips, agree = [], [], []
    for value in np.unique(block):
        here = np.flatnonzero(block == value)
        others, last = named[here[:-1]], named[here[-1]]
        one = len(others) == 0 or bool((others == others[0]).all())
        ends.append(here[-1])
        slips.append(len(here) > 2 and one and last != others[0])
        agree.append(one and (len(others) == 0 or last == others[0]))
    if not all(slips):
        return stored, "plain" if all(agree) else "contradicting"
    out = stored.copy()
    out[ends] = 1 - stored[ends]
    return out, "published"


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
