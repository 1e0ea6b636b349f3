"""Experiment 5, two-step task: does the agent use what it knows about the way to the reward?"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.experiment import Evidence, Experiment, Game, Query, Row, ask
from micro.evaluation.cogbench.fits import least_squares
from micro.evaluation.cogbench.tables import flags, ordered, sums, words

PLANETS = ("X", "Y")
ALIENS = (("D", "F"), ("J", "K"))
DAYS = 20
COMMON = 0.7  # probability to arrive where one wanted to go
DRIFT, LOW, HIGH = 0.025, 0.25, 0.75


class TwoStep(Experiment):
    """A spaceship to one of two planets, then one of two aliens there, twenty days; treasures drift."""

    name: ClassVar[str] = "two_step"
    columns: ClassVar[tuple[str, ...]] = ("run", "trial", "action1", "state", "action2", "reward")
    metrics: ClassVar[tuple[str, ...]] = ("model-basedness", "performance")
    runs: ClassVar[int] = 100
    questions: ClassVar[int | None] = 2 * DAYS

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        chances = generator.uniform(LOW, HIGH, 4)
        rows: list[Row] = []
        for trial in range(DAYS):
            state = {"rows": rows, "chances": chances}
            wanted = int((yield Query(_planet_prompt(rows), PLANETS, state={**state, "asked": "planet"})))
            arrived = wanted if generator.random() < COMMON else 1 - wanted
            alien = int(
                (
                    yield Query(
                        _alien_prompt(rows, wanted, arrived),
                        ALIENS[arrived],
                        state={**state, "asked": "alien", "arrived": arrived},
                    )
                )
            )
            reward = int(generator.random() < chances[2 * arrived + alien])
            rows.append(
                {
                    "run": run,
                    "trial": trial,
                    "action1": PLANETS[wanted],
                    "state": PLANETS[arrived],
                    "action2": ALIENS[arrived][alien],
                    "reward": reward,
                    **{f"probs{name}": float(p) for name, p in zip("ABCD", chances, strict=True)},
                }
            )
            chances = np.clip(chances + generator.normal(0, DRIFT, 4), LOW, HIGH)
        return rows

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Least squares of staying with a planet on reward, common arrival and their product, over consecutive days."""
        frame, run = ordered(frame, "trial")
        wanted, arrived = words(frame, "action1", PLANETS), words(frame, "state", PLANETS)
        reward = flags(frame, "reward")
        today = np.flatnonzero(run[:-1] == run[1:])
        if len(today) == 0:
            raise ValueError("two_step: no run has two days; column 'run' must be the same for the days of one run")
        stay = (wanted[today] == wanted[today + 1]).astype(float)
        r = 2 * reward[today] - 1
        c = np.where(wanted[today] == arrived[today], 1.0, -1.0)
        coefficients = least_squares(np.stack([np.ones(len(r)), r, c, r * c], 1), stay, run[today])
        # A run of one day has no pair: its weight counts in the performance only.
        paired = int(run[today].max()) + 1
        total, count = sums(run, reward), sums(run, np.ones(len(run)))

        def statistic(weights: Array) -> Array:
            return np.array([coefficients(weights[:paired])[3], weights @ total / (weights @ count)])

        return Evidence(self.metrics, len(total), statistic, {"rows": len(frame), "pairs_of_days": len(today)})


def _history(rows: list[Row]) -> str:
    lines = [
        f"- You set out for planet {row['action1']}, landed on planet {row['state']} and asked alien {row['action2']}, "
        f"who gave you {'a treasure' if row['reward'] else 'nothing'}."
        for row in rows
    ]
    told = "Your journeys so far:\n" + "\n".join(lines) if lines else "This is your first journey."
    return (
        "Every day you fly to a planet and ask an alien for treasure. You set out for planet X or planet Y; most of "
        "the time you land where you wanted, sometimes on the other planet. On planet X live the aliens D and F, on "
        "planet Y the aliens J and K. Some aliens give treasure more often than others, and this changes slowly. You "
        f"want as many treasures as possible.\n{told}"
    )


def _planet_prompt(rows: list[Row]) -> str:
    return ask(_history(rows), "For which planet do you set out today?", "(Answer with X or Y.)", "Planet ")


def _alien_prompt(rows: list[Row], wanted: int, arrived: int) -> str:
    first, second = ALIENS[arrived]
    today = f"Today you set out for planet {PLANETS[wanted]} and landed on planet {PLANETS[arrived]}."
    return ask(f"{_history(rows)}\n{today}", "Which alien do you ask?", f"(Answer with {first} or {second}.)", "Alien ")
