"""Linear centred kernel alignment, with and without its bias."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from micro.analysis.alignment.ridge import Rows, matrix
from micro.analysis.statistics import Array


def cka(features: ArrayLike, responses: ArrayLike, *, unbiased: bool | None = None) -> float:
    """Linear CKA of features ``[n,d]`` and responses ``[n,v]``.

    Biased: ``‖ΦᵀY‖² / (‖ΦᵀΦ‖ ‖YᵀY‖)`` (Frobenius, columns centred). Unbiased: the same ratio of unbiased estimates of
    HSIC; it can fall below 0, and lies near 0 for unrelated data, where the biased one grows with the columns.

    Args:
        features: the model's side.
        responses: the brain's side.
        unbiased: which estimator; None: the unbiased one where n < 10 d.

    Raises:
        ValueError: different numbers of stimuli, fewer than four for the unbiased estimator, a side without variance.

    Source: Kornblith et al. 2019; Song et al. 2012 (unbiased HSIC); Nguyen, Raghu and Kornblith 2021.
    """
    x, y = matrix(features, "features"), matrix(responses, "responses")
    if len(y) != len(x):
        raise ValueError(f"features have {len(x)} rows and responses {len(y)}: one per stimulus each")
    without_bias = uses_unbiased(*x.shape) if unbiased is None else unbiased
    return float(np.vdot(unit_gram(x, "features", without_bias), unit_gram(y, "responses", without_bias)))


def uses_unbiased(stimuli: int, width: int) -> bool:
    """The default rule: n < 10 d."""
    return stimuli < 10 * width


def shuffled_grams(first: Array, second: Array, orders: Iterable[Rows]) -> Array:
    """Inner products of two matrices ``[n,n]`` when the stimuli of the second are put in other orders."""
    return np.array([np.vdot(first, second[np.ix_(order, order)]) for order in orders])


def unit_gram(values: Array, name: str, unbiased: bool) -> Array:
    """Gram matrix ``[n,n]``, doubly centred or U-centred, of norm 1: inner products of two of them are CKA.

    U-centring (Szekely and Rizzo 2014) has ``⟨Ã, B̃⟩ / (n (n − 3))`` equal to the unbiased HSIC of Song et al.
    """
    # Centred columns first: a large mean would swallow the digits.
    centred = values - values.mean(0)
    if np.linalg.norm(centred) <= 1e-12 * np.linalg.norm(values):
        raise ValueError(f"{name} do not vary over stimuli: CKA is undefined")
    gram: Array = centred @ centred.T
    if unbiased:
        n = len(gram)
        if n < 4:
            raise ValueError(f"the unbiased estimator needs at least four stimuli, got {n}")
        np.fill_diagonal(gram, 0)
        sums = gram.sum(1) / (n - 2)
        gram = gram - sums[:, None] - sums[None, :] + sums.sum() / (n - 1)
        np.fill_diagonal(gram, 0)
    result: Array = gram / np.linalg.norm(gram)
    return result
