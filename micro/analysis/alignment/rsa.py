"""Representational similarity: do two spaces find the same stimuli alike?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from micro.analysis.alignment.ridge import Rows, matrix
from micro.analysis.statistics import Array
from micro.errors import require


def rdm(values: ArrayLike) -> Array:
    """Dissimilarities ``1 − Pearson`` between stimuli: ``[n,d]`` -> ``[n,n]``.

    Raises:
        ValueError: fewer than two columns, or a stimulus whose columns are all equal: no correlation is defined there.
    """
    x = matrix(values, "values")
    if x.shape[1] < 2:
        raise ValueError("a dissimilarity by correlation needs at least two columns")
    centred = x - x.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    flat = np.flatnonzero(norms <= 1e-12 * np.linalg.norm(x, axis=1))
    if len(flat):
        raise ValueError(f"stimulus {flat[0]} has the same value in every column: leave it out of the RSA")
    unit = centred / norms[:, None]
    result: Array = 1 - np.clip(unit @ unit.T, -1, 1)
    return result


def ranks(dissimilarities: ArrayLike, lower: float = 0.0, upper: float = 1.0) -> Array:
    """Ranks of the upper triangle of an RDM ``[n,n]``, ``[n (n−1) / 2]``, clipped to their quantiles.

    Clipping below drops differences among near neighbours (noise), clipping above those among far ones (geometry): what
    remains is who is near whom.

    Source: topological RSA, Lin and Kriegeskorte 2024.
    """
    if not 0 <= lower < upper <= 1:
        raise ValueError(f"lower and upper must be quantiles with 0 <= lower < upper <= 1, got {lower} and {upper}")
    d = np.asarray(dissimilarities, dtype=np.float64)
    order: Array = require("scipy.stats", "eval", "RSA").rankdata(d[np.triu_indices(len(d), 1)])
    low, high = np.quantile(order, [lower, upper])
    return np.clip(order, low, high)


def rsa(first: ArrayLike, second: ArrayLike, *, lower: float = 0.0, upper: float = 1.0) -> float:
    """Spearman correlation of the upper triangles of the two RDMs, ``[n,d]`` and ``[n,v]``.

    ``lower`` and ``upper`` clip the ranks before they are correlated; 0 and 1 leave them as they are.

    Raises:
        ValueError: different numbers of stimuli, fewer than four, or what :func:`rdm` refuses.
    """
    a, b = triangle(first, lower, upper), triangle(second, lower, upper)
    if len(a) != len(b):
        raise ValueError("RSA needs the same stimuli in both spaces; they have different numbers of rows")
    return float(a @ b)


def triangle(values: ArrayLike, lower: float = 0.0, upper: float = 1.0) -> Array:
    """:func:`ranks` of the RDM of ``[n,d]``, centred and of norm 1: inner products are rank correlations.

    Raises:
        ValueError: what :func:`rdm` refuses, fewer than four stimuli, or all dissimilarities equal.
    """
    dissimilarities = rdm(values)
    if len(dissimilarities) < 4:
        raise ValueError(f"RSA needs at least four stimuli, got {len(dissimilarities)}")
    order = ranks(dissimilarities, lower, upper)
    centred = order - order.mean()
    norm = np.linalg.norm(centred)
    if norm == 0:
        raise ValueError("all dissimilarities are equal: no rank correlation is defined")
    result: Array = centred / norm
    return result


def shuffled_triangles(first: Array, second: Array, orders: Iterable[Rows]) -> Array:
    """Correlations of two triangles when the stimuli of the second are put in other orders (Mantel 1967)."""
    n = round((1 + (1 + 8 * len(first)) ** 0.5) / 2)
    upper = np.triu_indices(n, 1)
    # Ranks are made once and moved: shuffling stimuli permutes the triangle.
    square = np.zeros((n, n))
    square[upper] = second
    square += square.T
    return np.array([first @ square[np.ix_(order, order)][upper] for order in orders])


def has_rdm(values: Array) -> bool:
    """Whether :func:`rdm` is defined: two columns or more, and no stimulus with the same value in all of them."""
    return values.shape[1] > 1 and bool((np.ptp(values, axis=1) > 1e-12 * np.abs(values).max(1)).all())
