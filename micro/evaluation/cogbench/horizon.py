"""Experiment 2, horizon task: exploring to learn something, and exploring by chance."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.experiment import Evidence, Experiment, Game, Query, Row, ask
from micro.evaluation.cogbench.fits import logistic
from micro.evaluation.cogbench.tables import flags, numbers, ordered, sums

MACHINES = ("F", "J")
MEANS, DISTANCES, SPREAD = (40, 60), (4, 8, 12, 20, 30), 8.0
FORCED, LONG = 4, 6
WORDS = ("zero", "one", "two", "three", "four", "five", "six")


class Horizon(Experiment):
    """Two slot machines, four plays given, then one or six free ones. One game is one run."""

    name: ClassVar[str] = "horizon"
    columns: ClassVar[tuple[str, ...]] = ("run", "trial", "mean0", "mean1", "reward0", "reward1", "choice", "reward")
    metrics: ClassVar[tuple[str, ...]] = ("directed exploration", "random exploration", "performance")
    runs: ClassVar[int] = 1000

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        means = np.full(2, int(generator.choice(MEANS)))
        means[generator.integers(2)] += int(generator.choice(DISTANCES)) * int(generator.choice([-1, 1]))
        free = LONG if generator.random() < 0.5 else 1
        forced = [0, 0, 1, 1]
        if generator.random() < 0.5:
            forced = [1, 1, 1, 1]
            forced[0] = 0
            if generator.random() < 0.5:
                forced = [1 - choice for choice in forced]
        forced = generator.permutation(forced).tolist()
        rows: list[Row] = []
        for trial in range(FORCED + free):
            rewards = np.rint(generator.normal(means, SPREAD)).astype(int)
            choice = forced[trial] if trial < FORCED else None
            if choice is None:
                left = FORCED + free - trial
                choice = yield Query(_prompt(rows, left), MACHINES, state={"rows": rows, "left": left, "means": means})
            rows.append(
                {
                    "run": run,
                    "trial": trial,
                    "mean0": int(means[0]),
                    "mean1": int(means[1]),
                    "reward0": int(rewards[0]),
                    "reward1": int(rewards[1]),
                    "choice": int(choice),
                    "reward": int(rewards[int(choice)]),
                }
            )
        return rows

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Logistic regressions of the first free choice on the difference of means, the horizon and their product."""
        frame, run = ordered(frame, "trial")
        choice, reward = flags(frame, "choice").astype(int), numbers(frame, "reward")
        means = np.stack([numbers(frame, "mean0"), numbers(frame, "mean1")], 1)
        plays = np.bincount(run)
        wrong = np.flatnonzero((plays != FORCED + 1) & (plays != FORCED + LONG))
        if len(wrong):
            raise ValueError(
                f"horizon: game {wrong[0]} (counted from 0) has {plays[wrong[0]]} plays; expected {FORCED + 1} or "
                f"{FORCED + LONG}, forced ones included, with a number of its own in column 'run'"
            )
        start = np.concatenate([[0], np.cumsum(plays)[:-1]])
        ones = choice[start[:, None] + np.arange(FORCED)].sum(1)  # how often machine 1 was seen
        first, h = choice[start + FORCED], np.where(plays == FORCED + LONG, 1.0, -1.0)
        unequal = ones != FORCED // 2
        once = (ones == 1).astype(int)  # the machine seen once, in unequal games
        ahead = means[start, 1] - means[start, 0]
        delta = np.where(unequal & (once == 0), -ahead, ahead)
        chosen = np.where(unequal, first == once, first == 1).astype(float)
        X = np.stack([delta, h, delta * h, np.ones(len(h))], 1)
        total = sums(run, reward)

        def statistic(weights: Array) -> Array:
            directed = logistic(X, chosen, weights * unequal)
            random = logistic(X, chosen, weights * ~unequal)
            return np.array(
                [
                    0.0 if directed is None else directed[1],
                    0.0 if random is None else -random[2],
                    (weights @ total) / (weights @ plays),
                ]
            )

        ones_weights = np.ones(len(h))
        details = {
            "games": len(h),
            "unequal_games": int(unequal.sum()),
            "directed_fit_converged": logistic(X, chosen, ones_weights * unequal) is not None,
            "random_fit_converged": logistic(X, chosen, ones_weights * ~unequal) is not None,
        }
        return Evidence(self.metrics, len(h), statistic, details)


def _prompt(rows: list[Row], left: int) -> str:
    lines = "\n".join(f"- Machine {MACHINES[row['choice']]} paid {row['reward']} dollars." for row in rows)
    plural = "round" if left == 1 else "rounds"
    body = (
        "You stand before two slot machines, F and J. Each of them pays dollars around an average of its own that "
        "stays the same, and one of them is better on average. You want to win as much as you can over all rounds.\n"
        f"What happened so far:\n{lines}\n"
        f"You will play {WORDS[left]} more {plural}."
    )
    return ask(body, "Which machine do you play now?", "(Answer with F or J.)", "Machine ")
