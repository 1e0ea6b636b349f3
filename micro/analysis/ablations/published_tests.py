"""Significance of a difference of two scores: as it was published, and for the same items.

The published test treats two scores of one model on the same items as independent and corrects for nothing; the exact
McNemar test looks at the items whose answer changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from micro.analysis.statistics import Array
from micro.errors import require

# Items of each published task (model.md 9.3).
PUBLISHED_ITEMS = {"gsm8k": 1319, "minerva_math": 5000, "mmlu": 14042, "bbh": 6511, "arc_challenge": 1172}
STARS = ((0.0001, "****"), (0.001, "***"), (0.01, "**"), (0.05, "*"))


class Welch(NamedTuple):
    """Unpaired test of two scores; arrays of one shape. ``difference`` = first - second, with its standard error."""

    difference: Array
    se: Array
    t: Array
    df: Array
    p: Array


def published_welch(
    mean1: ArrayLike, se1: ArrayLike, n1: ArrayLike, mean2: ArrayLike, se2: ArrayLike, n2: ArrayLike
) -> Welch:
    """Welch's t-test from means, standard errors and numbers of items (the published test).

    ``t = (m1 - m2) / sqrt(se1^2 + se2^2)``, degrees of freedom
    ``(se1^2 + se2^2)^2 / (se1^4 / (n1 - 1) + se2^4 / (n2 - 1))``, two-sided p. The same as
    ``scipy.stats.ttest_ind_from_stats(m, se * sqrt(n), n, ..., equal_var=False)``.

    Args:
        mean1: scores of the first condition, any shape; the others are broadcast to it.
        se1: their standard errors, not negative.
        n1: their numbers of items, at least 2.
        mean2: as above, of the second condition.
        se2: as above.
        n2: as above.

    Returns:
        A :class:`Welch`; t, df and p are NaN where both standard errors are 0.

    Raises:
        ValueError: a negative standard error, or fewer than two items.

    Source: model.md 9.3; MiCRo, causal ablation (as released).
    """
    students = require("scipy.stats", "eval", "the published test").t
    values = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (mean1, se1, n1, mean2, se2, n2)))
    m1, s1, k1, m2, s2, k2 = values
    if (s1 < 0).any() or (s2 < 0).any():
        raise ValueError("published_welch: standard errors must not be negative")
    if (k1 < 2).any() or (k2 < 2).any():
        raise ValueError("published_welch: each score needs at least 2 items")
    variance = s1**2 + s2**2
    with np.errstate(invalid="ignore", divide="ignore"):
        # In shares of the variance: se^4 would vanish for small errors.
        w1, w2 = s1**2 / variance, s2**2 / variance
        df = 1.0 / (w1**2 / (k1 - 1) + w2**2 / (k2 - 1))
        t = np.where(variance > 0, (m1 - m2) / np.sqrt(variance), np.nan)
    return Welch(m1 - m2, np.sqrt(variance), t, df, 2.0 * students.sf(np.abs(t), df))


def stars(p: float) -> str:
    """The published marks: p <= 0.05 ``*``, 0.01 ``**``, 0.001 ``***``, 0.0001 ``****``; "" above and for NaN."""
    return next((mark for bound, mark in STARS if p <= bound), "")


class Average(NamedTuple):
    """Mean score of several tasks, its standard error, and the number of items that stands for it in a test."""

    mean: float
    se: float
    n: float


def published_average(means: Sequence[float], errors: Sequence[float], items: Sequence[float]) -> Average:
    """The published "Average": mean score, **mean** standard error, mean number of items (rounded)."""
    _same_tasks(means, errors, items)
    return Average(float(np.mean(means)), float(np.mean(errors)), float(np.round(np.mean(items))))


def average(means: Sequence[float], errors: Sequence[float], items: Sequence[float]) -> Average:
    """The mean score of independent tasks, with standard error ``sqrt(sum se^2) / n_tasks`` and all items."""
    _same_tasks(means, errors, items)
    error = float(np.sqrt(np.sum(np.square(errors))) / len(errors))
    return Average(float(np.mean(means)), error, float(np.sum(items)))


def _same_tasks(*values: Sequence[float]) -> None:
    if not values[0] or len({len(v) for v in values}) != 1:
        raise ValueError(f"average: give one mean, error and item count per task, got {[len(v) for v in values]}")


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Exact two-sided McNemar test of two conditions on the same items (McNemar 1947).

    Args:
        before: ``[items]``, right (1) or wrong (0) under the first condition.
        after: the same items under the second one.

    Returns:
        p: of the items whose answer changed, as many became right as wrong; 1.0 where none changed.

    Raises:
        ValueError: other lengths, or scores that are not 0 or 1.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"mcnemar: expected two arrays [items], got shapes {list(first.shape)} and {list(second.shape)}"
        )
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("mcnemar: scores must be 0 or 1; use the paired bootstrap for others")
    changed, better = int((first != second).sum()), int((second > first).sum())
    if changed == 0:
        return 1.0
    return float(require("scipy.stats", "eval", "McNemar's test").binomtest(better, changed, 0.5).pvalue)
