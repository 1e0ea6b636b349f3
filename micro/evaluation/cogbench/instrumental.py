"""Experiment 4, instrumental learning: how fast, and whether good news counts more than bad."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.experiment import Evidence, Experiment, Game, Query, Row, ask
from micro.evaluation.cogbench.fits import Visits, learning_rate, optimism
from micro.evaluation.cogbench.tables import Integers, flags, numbers, ordered, sums

CASINOS = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))
VISITS = 24
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
SEED = 0  # of the fits: the same table gives the same parameters


class Instrumental(Experiment):
    """Four casinos with two machines each that pay or do not pay, 24 visits to each in random order."""

    name: ClassVar[str] = "instrumental"
    columns: ClassVar[tuple[str, ...]] = (
        "run",
        "trial",
        "task",
        "mean0",
        "mean1",
        "reward0",
        "reward1",
        "choice",
        "reward",
    )
    metrics: ClassVar[tuple[str, ...]] = ("learning rate", "optimism bias", "performance")
    runs: ClassVar[int] = 10
    questions: ClassVar[int | None] = VISITS * len(CASINOS)

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        letters = generator.permutation(list(LETTERS))[: 2 * len(CASINOS)].reshape(-1, 2).tolist()
        tasks = generator.permutation(np.repeat(np.arange(len(CASINOS)), VISITS)).tolist()
        rows: list[Row] = []
        for trial, task in enumerate(tasks):
            means = CASINOS[task]
            rewards = (generator.random(2) < means).astype(int)
            shown = generator.permutation(letters[task]).tolist()
            choice = int(
                (
                    yield Query(
                        _prompt(rows, letters, task, shown), tuple(letters[task]), state={"rows": rows, "task": task}
                    )
                )
            )
            rows.append(
                {
                    "run": run,
                    "trial": trial,
                    "task": task,
                    "mean0": means[0],
                    "mean1": means[1],
                    "reward0": int(rewards[0]),
                    "reward1": int(rewards[1]),
                    "choice": choice,
                    "reward": int(rewards[choice]),
                }
            )
        return _twice(rows, tasks) if preset == "published" else rows

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Rescorla-Wagner learning with one learning rate, and with one for each sign of the error; means over runs.

        ``clean`` drops the second copies of visits that published tables hold; ``published`` fits them too. Details
        hold each run's fit with the range of the parameter that its likelihood leaves open.
        """
        frame, run = ordered(frame, "trial")
        task, choice, reward = numbers(frame, "task"), flags(frame, "choice").astype(np.int64), numbers(frame, "reward")
        keep = np.ones(len(frame), bool) if preset == "published" else _first_copies(frame, run, choice, reward)
        dropped = int((~keep).sum())
        task, choice, reward, run = task[keep], choice[keep], reward[keep], run[keep]
        total, count = sums(run, reward), sums(run, np.ones(len(run)))
        fitted, fits = np.zeros((len(total), 2)), []
        for r in range(len(total)):
            visits = Visits.of(task[run == r], choice[run == r], reward[run == r])
            one, two = learning_rate(visits, SEED), optimism(visits, SEED)
            fitted[r] = one.value, two.value
            fits.append({"learning rate": asdict(one), "optimism bias": asdict(two)})

        def statistic(weights: Array) -> Array:
            return np.append(weights @ fitted / weights.sum(), weights @ total / (weights @ count))

        details = {
            "rows": len(frame),
            "second_copies_dropped": dropped,
            "fits": fits,
            # 0: every run pins its parameter down; 1: the likelihood does not depend on it.
            "flatness": {
                "learning rate": float(np.mean([f["learning rate"]["high"] - f["learning rate"]["low"] for f in fits])),
                "optimism bias": float(
                    np.mean([(f["optimism bias"]["high"] - f["optimism bias"]["low"]) / 2 for f in fits])
                ),
            },
        }
        return Evidence(self.metrics, len(total), statistic, details)


def _twice(rows: list[Row], tasks: list[int]) -> list[Row]:
    """Every row, then its copy under the casino of the next visit, as published tables have them. The means stay those
    of the casino that was visited.
    """
    out = []
    for row, following in zip(rows, [*tasks[1:], tasks[-1]], strict=True):
        out += [row, {**row, "task": following}]
    return out


def _first_copies(frame: Any, run: Integers, choice: Integers, reward: Array) -> NDArray[np.bool_]:
    """False for the second rows of runs that hold every visit twice in a row: same trial, or else twice the visits."""
    trial = numbers(frame, "trial")
    both = np.stack([numbers(frame, "reward0"), numbers(frame, "reward1")], 1)
    keep = np.ones(len(run), bool)
    for r in range(int(run.max()) + 1):
        rows = np.flatnonzero(run == r)
        first, second = rows[::2], rows[1::2]
        if len(first) != len(second):
            continue
        same_trial = (trial[first] == trial[second]).all()
        same_visit = (choice[first] == choice[second]).all() and (reward[first] == reward[second]).all()
        same_visit = same_visit and (both[first] == both[second]).all()
        if same_visit and (same_trial or len(rows) == 2 * VISITS * len(CASINOS)):
            keep[second] = False
    return keep


def _prompt(rows: list[Row], letters: list[list[str]], task: int, shown: list[str]) -> str:
    lines = [
        f"- Casino {row['task'] + 1}: machine {letters[row['task']][row['choice']]} paid {row['reward']} "
        f"{'dollar' if row['reward'] == 1 else 'dollars'}."
        for row in rows
    ]
    told = "Your visits so far:\n" + "\n".join(lines) if lines else "You have not been to a casino yet."
    body = (
        "You visit four casinos, again and again. Each casino has two machines of its own; a machine pays one dollar "
        "or nothing, and some pay more often than others. You want to win as many dollars as you can.\n"
        f"{told}\nNow you are in casino {task + 1}, which has the machines {shown[0]} and {shown[1]}."
    )
    return ask(body, "Which machine do you play?", f"(Answer with {shown[0]} or {shown[1]}.)", "Machine ")
