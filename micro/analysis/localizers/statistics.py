"""Which units tell two sets of stimuli apart: Welch's t for every unit, its q-value, and the units with the largest t.

Units are anything with one number per stimulus, for example (layer, expert, component); they are tested and ranked all
together. The definitions are those of the functional localizers of the LLM language network (AlKhamissi et al. 2024),
with three additions: units without variance, stimuli that drop out, and Benjamini-Hochberg q-values that survive both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import Array, benjamini_hochberg
from micro.errors import require

Mask = NDArray[np.bool_]

FEWEST = 3  # stimuli per side below which a unit that some stimuli have no value for is not tested
BLOCK_VALUES = 1 << 20  # float64 values converted at once: eight megabytes, so that huge arrays stay where they are


class LocalizerTest(NamedTuple):
    """Per unit, float64 ``[...units]``: Welch's t, its two-sided p, and the Benjamini-Hochberg q over all units."""

    t: Array
    p: Array
    q: Array


class Moments:
    """Number, mean and variance of each unit over a stream of stimuli (Chan, Golub and LeVeque 1983).

    Values are taken relative to the unit's first one. A unit that never changes therefore has a variance of exactly
    zero, whatever its value, and blocks of any size give the same answer up to rounding.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.stimuli = 0
        self.count = np.zeros(shape)
        self.first = np.full(shape, np.nan)
        self._mean = np.zeros(shape)
        self._squares = np.zeros(shape)

    def add(self, block: Array) -> None:
        """Take in stimuli ``[n, ...units]``; NaN means that the stimulus has no value for that unit."""
        self.stimuli += len(block)
        missing = np.isnan(block)
        holes = bool(missing.any())
        added = len(block) - missing.sum(0) if holes else np.full(block.shape[1:], len(block))
        new = np.isnan(self.first)
        if new.any():
            earliest = np.take_along_axis(block, missing.argmin(0)[None], 0)[0]
            self.first = np.where(new, earliest, self.first)
        work = block - self.first
        if holes:
            work[missing] = 0.0
        mean = work.sum(0) / np.maximum(added, 1)
        work -= mean
        work *= work
        if holes:
            work[missing] = 0.0
        squares = work.sum(0)
        total = self.count + added
        share = added / np.maximum(total, 1)
        delta = mean - self._mean
        self._squares += squares + delta**2 * self.count * share
        self._mean += delta * share
        self.count = total

    @property
    def dropped(self) -> Mask:
        """Units for which some stimuli have no value."""
        dropped: Mask = self.count < self.stimuli
        return dropped

    @property
    def mean(self) -> Array:
        """NaN where there was no stimulus."""
        return self.first + self._mean

    @property
    def variance(self) -> Array:
        """With n - 1; 0 where there were fewer than two stimuli."""
        return self._squares / np.maximum(self.count - 1, 1)


def welch_t(
    counts: tuple[Array, Array], difference: Array, variances: tuple[Array, Array], dropped: Mask
) -> tuple[Array, Array]:
    """Welch's t and its degrees of freedom (Welch 1947); t = 0 where the test is not defined.

    Args:
        counts: number of stimuli on either side, broadcastable to the units.
        difference: mean of the first side minus mean of the second.
        variances: of both sides, with n - 1.
        dropped: units for which some stimuli of either side have no value, broadcastable to the units.

    Returns:
        t and the Welch-Satterthwaite degrees of freedom. A unit with no variance on both sides, or with fewer than two
        stimuli on one of them (three where stimuli dropped out), has t = 0 and one degree of freedom.
    """
    n, m = (np.asarray(c, dtype=np.float64) for c in counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = variances[0] / n, variances[1] / m
        squared = first + second
        defined = (np.minimum(n, m) >= np.where(dropped, FEWEST, 2)) & (squared > 0)
        share = first / squared
        freedom = 1 / (share**2 / (n - 1) + (1 - share) ** 2 / (m - 1))
        t = difference / np.sqrt(squared)
    return np.where(defined, t, 0.0), np.where(defined, freedom, 1.0)


def two_sided_p(t: Array, freedom: Array) -> Array:
    """Student's p on both sides; 1 where t is 0."""
    require("scipy", "eval", "a localizer's p-values")
    from scipy.special import stdtr

    p: Array = np.where(t == 0, 1.0, 2 * stdtr(freedom, -np.abs(t)))
    return p


def compare(positive: Moments, negative: Moments) -> LocalizerTest:
    """The test of two sides whose moments were gathered in a stream."""
    difference = positive.mean - negative.mean
    variances = positive.variance, negative.variance
    dropped = positive.dropped | negative.dropped
    t, freedom = welch_t((positive.count, negative.count), difference, variances, dropped)
    p = two_sided_p(t, freedom)
    return LocalizerTest(t, p, benjamini_hochberg(p))


def localizer_test(positive: Any, negative: Any, *, absolute: bool = True) -> LocalizerTest:
    """Welch's t-test of every unit between two sets of stimuli, corrected over all units.

    t = (mean+ - mean-) / sqrt(var+/n+ + var-/n-), variances with n - 1; p is two-sided; q is Benjamini and Hochberg's
    over all units together. All arithmetic is float64; values are converted block by block.

    Args:
        positive: activations ``[stimuli, ...units]``, NumPy or torch, any real dtype. NaN means that the stimulus has
            no value for that unit (its tokens were not routed there) and drops out for that unit alone.
        negative: the same for the other set; the number of stimuli may differ.
        absolute: take absolute values first.

    Returns:
        ``LocalizerTest(t, p, q)``, NumPy float64 ``[...units]``. A unit with zero variance in both sets has t = 0 and
        p = 1, as has one with a single stimulus on one side, or with fewer than three where stimuli dropped out; it
        still counts among the units of the correction.

    Raises:
        ValueError: units of different shapes, no stimuli, no units, or infinite activations.
        TypeError: not numbers.

    Source: model.md 9.5; Welch 1947, Benjamini and Hochberg 1995.
    """
    shapes = [_shape(values, name) for values, name in ((positive, "positive"), (negative, "negative"))]
    if shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"localizer_test: positive and negative must have the same units after the first axis, "
            f"got {list(shapes[0])} and {list(shapes[1])}"
        )
    if 0 in shapes[0][1:]:
        raise ValueError(f"localizer_test: there are no units in arrays of shape {list(shapes[0])}")
    sides = [_moments(values, name, absolute) for values, name in ((positive, "positive"), (negative, "negative"))]
    return compare(*sides)


def _shape(values: Any, name: str) -> tuple[int, ...]:
    shape = tuple(values.shape) if hasattr(values, "shape") else np.shape(values)
    if not shape or shape[0] == 0:
        raise ValueError(f"localizer_test: {name} must be [stimuli, ...units] with stimuli, got {list(shape)}")
    return shape


def _moments(values: Any, name: str, absolute: bool) -> Moments:
    if not hasattr(values, "shape"):
        values = np.asarray(values)
    shape = tuple(values.shape)
    moments = Moments(shape[1:])
    rows = max(1, BLOCK_VALUES // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        block = as_float64(values[start : start + rows], f"localizer_test: {name}")
        if np.isinf(block).any():
            raise ValueError(f"localizer_test: {name} holds infinite activations; run the model in a wider dtype")
        moments.add(np.abs(block) if absolute else block)
    return moments


def as_float64(values: Any, name: str) -> Array:
    """NumPy, torch or nested lists as float64 on the host."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float64).reshape(array.shape)


def localizer_mask(
    t: Any,
    *,
    percent: float | None = None,
    units: int | None = None,
    range: tuple[float, float] | None = None,
    seed: int | None = None,
) -> Mask:
    """The units with the largest t, ranked over all units together.

    k = floor(percent / 100 * number of units), or ``units``. Without ``range``, a unit is selected when its t is among
    the k largest *distinct* values, so exact ties can select more than k. A unit with t = 0 (what
    :func:`localizer_test` gives a unit without variance) or NaN is never selected; 0 still takes one place among the
    distinct values, so that nothing on the other side of zero moves up for it.

    Args:
        t: ``[...units]``, NumPy or torch.
        percent: share of all units, in (0, 100].
        units: k itself; give either this or ``percent``.
        range: (low, high) percentiles of t over all units, ends included: k units drawn at random from those between
            them, as a control. (0, 0) stands for the k lowest distinct values.
        seed: of that draw; None counts as 0, so that a call can be repeated.

    Returns:
        bool ``[...units]``, NumPy.

    Raises:
        ValueError: k is zero or larger than the number of units, both or neither of ``percent`` and ``units``, or a
            band that holds fewer than k units.

    Source: model.md 9.5.
    """
    values = as_float64(t, "localizer_mask: t")
    flat = values.reshape(-1)
    k = wanted_units(percent, units, flat.size)
    selectable = ~np.isnan(flat) & (flat != 0)
    if range is None:
        mask = selectable & (flat >= _kth(flat, k))
    else:
        low, high = _percentiles(range)
        if (low, high) == (0.0, 0.0):
            mask = selectable & (-flat >= _kth(-flat, k))
        else:
            mask = _drawn(flat, selectable, (low, high), k, 0 if seed is None else seed)
    selected: Mask = mask.reshape(values.shape)
    return selected


def wanted_units(percent: float | None, units: int | None, total: int) -> int:
    """The k of :func:`localizer_mask` for ``total`` units, with its errors."""
    if (percent is None) == (units is None):
        raise ValueError("localizer_mask: give either percent or units")
    if percent is not None:
        if not 0 < percent <= 100:
            raise ValueError(f"localizer_mask: percent must lie in (0, 100], got {percent}")
        k = int(percent * total / 100)  # in this order: 29 / 100 * 100 is less than 29
        if k == 0:
            raise ValueError(f"localizer_mask: {percent} % of {total} units is less than one unit; raise percent")
        return k
    k = int(units or 0)
    if k != units or not 1 <= k <= total:
        raise ValueError(f"localizer_mask: units must be a whole number in 1..{total}, got {units}")
    return k


def _kth(flat: Array, k: int) -> float:
    """The k-th largest distinct value, or the smallest where there are fewer; infinity where there is none."""
    distinct = np.unique(flat[~np.isnan(flat)])
    return float(distinct[-min(k, len(distinct))]) if len(distinct) else np.inf


def _percentiles(band: tuple[float, float]) -> tuple[float, float]:
    low, high = (float(x) for x in band)
    if not 0 <= low <= high <= 100:
        raise ValueError(f"localizer_mask: range must be (low, high) with 0 <= low <= high <= 100, got {band}")
    return low, high


def _drawn(flat: Array, selectable: Mask, band: tuple[float, float], k: int, seed: int) -> Mask:
    known = flat[~np.isnan(flat)]
    low, high = np.percentile(known, band) if len(known) else (0.0, 0.0)
    candidates = np.flatnonzero(selectable & (flat >= low) & (flat <= high))
    if len(candidates) < k:
        raise ValueError(
            f"localizer_mask: only {len(candidates)} units with a t other than 0 lie between the percentiles "
            f"{band[0]:g} and {band[1]:g}, and {k} are wanted; widen range or ask for fewer"
        )
    mask = np.zeros(flat.shape, dtype=np.bool_)
    mask[np.random.default_rng(seed).choice(candidates, k, replace=False)] = True
    return mask
