"""Scores of tables, by this package or by any other engine."""

from __future__ import annotations

from typing import Any

import numpy as np

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.baselines import check_preset
from micro.evaluation.cogbench.experiment import Evidence
from micro.evaluation.cogbench.registry import experiment as by_name
from micro.evaluation.cogbench.tables import read_table


class Score(dict[str, float]):
    """Metric -> value; ``details`` holds diagnostics: row counts, convergence, flatness of fits."""

    details: dict[str, Any]

    def __init__(self, values: dict[str, float], details: dict[str, Any] | None = None) -> None:
        super().__init__(values)
        self.details = details or {}


def score(experiment: str, table: Any, preset: str = "clean") -> Score:
    """Metrics of one experiment's table.

    Args:
        experiment: a name of ``EXPERIMENTS``.
        table: a pandas frame or the path of a CSV file with the experiment's columns; others are ignored.
        preset: ``"clean"``, or ``"published"`` to keep the slips that published tables hold: the last trial of a
            restless-bandit block judged by the next block, and visits of the instrumental task counted twice.

    Returns:
        A dictionary: the experiment's behaviour metrics, and ``"performance"`` (all but temporal discounting).

    Raises:
        ValueError: an unknown name, a missing column, an entry that cannot be read; TypeError: no table.

    Source: CogBench (Coda-Forno et al. 2024), definitions of the ten behaviour and six performance metrics.
    """
    found = evidence(experiment, table, preset)
    return Score(found.values(), found.details)


def evidence(experiment: str, table: Any, preset: str) -> Evidence:
    """What :func:`score` and the bootstrap work on."""
    check_preset(preset)
    known = by_name(experiment)
    frame = read_table(table, known.columns, experiment)
    try:
        return known.evidence(frame, preset)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(experiment) else f"{experiment}: {text}") from None


def resample(found: Evidence, draws: int, seed: int | list[int]) -> Array:
    """The statistic [draws, metrics] with runs drawn with replacement (Efron 1979)."""
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(found.runs, np.full(found.runs, 1 / found.runs), size=draws).astype(np.float64)
    return np.stack([found.statistic(w) for w in weights])
