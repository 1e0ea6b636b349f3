"""What a localizer finds when there is nothing to find: the same test under shuffled labels.

All permutations at once are matrix products: with P [R,n] of zeros and ones (who counts as positive) and activations
Z [n,U], the sums of the positive side are P Z and their sums of squares P Z^2; the negative side is what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.localizers.statistics import Mask, two_sided_p, welch_t
from micro.analysis.statistics import Array
from micro.errors import require

CHUNK_VALUES = 1 << 22  # float64 values of one intermediate array: 32 MiB, of which about ten live at once
FLAT = 1e-12  # a variance below this, in units of the unit's own, is rounding


def shuffled(positive: int, negative: int, *, permutations: int = 200, seed: int = 0) -> Mask:
    """Which stimuli count as positive in each permutation: bool [permutations, positive + negative]."""
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    draw = np.random.default_rng(seed)
    ranks = draw.random((permutations, positive + negative)).argsort(1)
    return ranks < positive


@dataclass(frozen=True)
class NullTests:
    """Tests under given labels. t: float32 [R, units]; discoveries: int [R], units that Benjamini-Hochberg at level q
    calls different (in either direction) in each permutation.
    """

    t: NDArray[np.float32]
    discoveries: NDArray[np.int64]
    q: float

    def specificity(self) -> dict[str, Any]:
        """Share of permutations with any discovery, and the bound q + 2 standard errors that it must not exceed."""
        count = len(self.discoveries)
        share = float((self.discoveries > 0).mean())
        bound = self.q + 2 * float(np.sqrt(self.q * (1 - self.q) / count))
        return {
            "permutations": count,
            "q": self.q,
            "share_with_discovery": share,
            "bound": bound,
            "passed": bool(share <= bound),
            "most_discoveries": int(self.discoveries.max()),
        }


def null_tests(values: NDArray[Any], members: Mask, *, q: float = 0.05) -> NullTests:
    """The localizer's test under many labellings.

    Args:
        values: [n, units], what is compared (absolute values taken already); NaN = the stimulus drops out.
        members: bool [R, n], the positive stimuli of each labelling (:func:`shuffled`).
        q: level of the false discovery rate.

    Returns:
        A :class:`NullTests`; its t takes 4 * R * units bytes.
    """
    require("scipy", "eval", "the null permutations of a localizer")
    from scipy.stats import norm

    units = values.shape[1]
    t = np.empty((len(members), units), np.float32)
    # Student's tails are heavier than the normal ones: below this |t|, p exceeds q and cannot be a discovery.
    candidate = float(norm.isf(q / 2))
    found: list[tuple[NDArray[np.int64], Array]] = []
    size = max(1, CHUNK_VALUES // max(len(members), len(values)))
    for start in range(0, units, size):
        part, freedom = _tests(values[:, start : start + size], members)
        t[:, start : start + size] = part
        row, column = np.nonzero(np.abs(part) >= candidate)
        found.append((row, two_sided_p(part[row, column], freedom[row, column])))
    rows = np.concatenate([r for r, _ in found])
    p = np.concatenate([x for _, x in found])
    counts = [_discoveries(p[rows == r], units, q) for r in range(len(members))]
    return NullTests(t, np.asarray(counts, np.int64), q)


def _tests(values: NDArray[Any], members: Mask) -> tuple[Array, Array]:
    """Values of t and degrees of freedom, [R, units of this chunk]."""
    z = values.astype(np.float64)
    valid = ~np.isnan(z)
    complete = bool(valid.all())
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.maximum(valid.sum(0), 1)
        z = np.where(valid, z - np.where(valid, z, 0.0).sum(0) / total, 0.0)
        spread = np.sqrt((z * z).sum(0) / total)
        z = np.where(spread > 0, z / spread, 0.0)
    squares = z * z
    labels = members.astype(np.float64)
    n = labels.sum(1, keepdims=True) if complete else labels @ valid.astype(np.float64)
    m = (len(z) if complete else valid.sum(0)) - n
    first, first_squares = labels @ z, labels @ squares
    second, second_squares = z.sum(0) - first, squares.sum(0) - first_squares
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = first / n - second / m
    variances = _variance(first, first_squares, n), _variance(second, second_squares, m)
    return welch_t((n, m), difference, variances, np.logical_not(valid.all(0)))


def _variance(total: Array, squares: Array, count: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (squares - total**2 / count) / (count - 1)
    return np.where(variance > FLAT, variance, 0.0)


def _discoveries(p: Array, units: int, q: float) -> int:
    """How many the step-up procedure of Benjamini and Hochberg rejects; p may leave out what is above q."""
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= q * np.arange(1, len(ordered) + 1) / units)
    return int(below[-1]) + 1 if len(below) else 0
