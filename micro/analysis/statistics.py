"""Intervals, corrections for many tests, and permutation p values: what all analyses share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from micro.errors import require

Array = NDArray[np.float64]

CHUNK_NUMBERS = 1 << 23  # weights held at once: 64 MiB


def bootstrap(
    records: int, statistic: Callable[[Array], Array], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[Array, Array]:
    """Percentile interval of a statistic under resampling of whole records (Efron 1979).

    Tokens of one record are not independent, so records are the unit.

    Args:
        records: number of records.
        statistic: weights ``[records]`` (how often each record was drawn) -> an array.
        draws: number of resamples.
        seed: of the resampling.
        level: coverage.

    Returns:
        Lower and upper bound, shaped like the statistic. Draws in which it is undefined (NaN) are left out.
    """
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(records, np.full(records, 1 / records), size=draws).astype(np.float64)
    return interval(np.stack([statistic(w) for w in weights]), level)


def interval(values: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
    """Percentile interval of draws ``[draws, ...]``; NaN draws are left out, all NaN gives NaN.

    ``level=0.9`` gives the one-sided 95 % bounds, 1 the whole range.
    """
    if not 0 < level <= 1:
        raise ValueError(f"level must lie above 0 and not above 1, got {level}")
    tail = (1 - level) / 2
    values = np.asarray(values, dtype=np.float64)
    if not np.isnan(values).any():
        low, high = np.quantile(values, [tail, 1 - tail], axis=0)
        return low, high
    rest = values.reshape(len(values), -1)
    bounds = np.full((2, rest.shape[1]), np.nan)
    known = ~np.isnan(rest).all(0)
    bounds[:, known] = np.nanquantile(rest[:, known], [tail, 1 - tail], axis=0)
    return bounds[0].reshape(values.shape[1:]), bounds[1].reshape(values.shape[1:])


def mean_interval(values: ArrayLike, *, draws: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[Array, Array]:
    """Percentile interval of the mean over items ``[items, ...]``, items resampled; NaN with fewer than two items."""
    table = np.asarray(values, dtype=np.float64)
    if len(table) < 2:
        return np.full(table.shape[1:], np.nan), np.full(table.shape[1:], np.nan)
    flat = table.reshape(len(table), -1)
    drawn = _drawn(lambda w: w @ flat / len(flat), _item_weights(len(flat)), len(flat), draws, seed)
    low, high = interval(drawn, level)
    return low.reshape(table.shape[1:]), high.reshape(table.shape[1:])


def binomial_interval(right: ArrayLike, items: ArrayLike, *, level: float = 0.95) -> tuple[Array, Array]:
    """Exact interval of a share of independent items, each right or wrong (Clopper and Pearson 1934).

    It has a width where a bootstrap has none: of four right answers in four the interval is [0.40, 1].

    Args:
        right: how many items are right, any shape.
        items: how many there are, broadcastable; 0 gives NaN.
        level: coverage, at least.

    Returns:
        Lower and upper bound, float64, shaped like the counts.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    beta = require("scipy.stats", "eval", "an exact interval").beta
    k, n = np.broadcast_arrays(np.asarray(right, dtype=np.float64), np.asarray(items, dtype=np.float64))
    tail = (1 - level) / 2
    low = np.where(k > 0, beta.ppf(tail, np.maximum(k, 1), n - k + 1), 0.0)
    high = np.where(k < n, beta.ppf(1 - tail, k + 1, np.maximum(n - k, 1)), 1.0)
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


class PairedDifference(NamedTuple):
    """Mean of a - b, its interval and two-sided p; arrays shaped like one item. ``items``: pairs that counted."""

    difference: Array
    low: Array
    high: Array
    p: Array
    items: NDArray[np.int64]


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> PairedDifference:
    """Difference of two conditions on the same items, by resampling the items (Efron and Tibshirani 1993, ch. 16).

    Args:
        a: scores ``[items, ...]`` under the first condition.
        b: scores under the second one, broadcastable to ``a``; the same items in the same order.
        draws: number of resamples.
        seed: of the resampling.
        level: coverage of the percentile interval.

    Returns:
        A :class:`PairedDifference`. The p value shifts the draws to mean zero, so that they follow the null, and counts
        those at least as far out: ``(1 + count) / (1 + draws)``. A pair with a NaN on either side is left out.

    Raises:
        ValueError: no items, or shapes that do not agree.
    """
    first = np.asarray(a, dtype=np.float64)
    second = np.asarray(b, dtype=np.float64)
    if first.ndim == 0 or second.ndim == 0 or len(first) == 0 or len(first) != len(second):
        raise ValueError(
            f"paired_bootstrap: a and b must hold the same items on their first axis, got shapes {list(first.shape)} "
            f"and {list(second.shape)}"
        )
    differences = first - second
    shape = differences.shape[1:]
    flat = differences.reshape(len(differences), -1)
    present = ~np.isnan(flat)
    values = np.where(present, flat, 0.0)
    items = present.sum(0)

    def means(weights: Array) -> Array:
        return ratio(weights @ values, weights @ present.astype(np.float64))

    observed = means(np.ones((1, len(flat))))[0]
    drawn = _drawn(means, _item_weights(len(flat)), len(flat), draws, seed)
    low, high = interval(drawn, level)
    p = permutation_p(observed, drawn - observed, alternative="two-sided")
    return PairedDifference(*(np.asarray(x).reshape(shape) for x in (observed, low, high, p, items)))


def hierarchical_bootstrap(
    levels: Sequence[ArrayLike],
    statistic: Callable[[Array], Array],
    *,
    strata: ArrayLike | None = None,
    crossed: bool = False,
    draws: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Array, Array]:
    """Percentile interval under resampling at several levels, for example seed > template > item (Saravanan 2020).

    Args, returns and errors are those of :func:`hierarchical_draws`; ``level`` is the coverage.
    """
    values = hierarchical_draws(levels, statistic, strata=strata, crossed=crossed, draws=draws, seed=seed)
    return interval(values, level)


def hierarchical_draws(
    levels: Sequence[ArrayLike],
    statistic: Callable[[Array], Array],
    *,
    strata: ArrayLike | None = None,
    crossed: bool = False,
    draws: int = 10_000,
    seed: int = 0,
) -> Array:
    """The statistic under resampling at several levels.

    Args:
        levels: outermost first, one array ``[N]`` of labels (numbers or strings) each: seed, template and item of each
            observation, say.
        statistic: weights ``[D,N]`` of D draws (how often each observation was drawn) -> ``[D, ...]``.
        strata: labels ``[N]``, for example the domain. A level whose groups each lie in one stratum (the templates of a
            domain) is drawn within its stratum; one that crosses strata (seeds) is drawn as a whole.
        crossed: False = nested: every drawn seed draws its own templates, every drawn template its own items. True =
            the groups of the first level share one draw of everything below, and the multiplicities are multiplied
            (Owen 2007): right where all seeds see the same templates and items, and wider there.
        draws: number of resamples.
        seed: of the resampling.

    Returns:
        float64 ``[draws, ...]``.

    Raises:
        ValueError: no observations, or labels of different lengths.
    """
    arrays = [np.asarray(labels) for labels in levels]
    lengths = [a.shape for a in arrays] + ([] if strata is None else [np.asarray(strata).shape])
    if not arrays or any(shape != lengths[0] or len(shape) != 1 or shape[0] == 0 for shape in lengths):
        raise ValueError(
            "hierarchical_bootstrap: levels (and strata) must be label arrays [N] of one length above 0, got shapes "
            f"{[list(shape) for shape in lengths]}"
        )
    stratum = np.zeros(len(arrays[0]), np.int64) if strata is None else label_codes(np.asarray(strata))
    plan = _crossed_weights(arrays, stratum) if crossed and len(arrays) > 1 else _nested_weights(arrays, stratum)
    return _drawn(statistic, plan, len(arrays[0]), draws, seed)


_Weights = Callable[[np.random.Generator, int], Array]  # (generator, D) -> [D,N]


def _drawn(statistic: Callable[[Array], Array], weights: _Weights, size: int, draws: int, seed: int) -> Array:
    """The statistic of all draws, in pieces that fit into memory."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    generator = np.random.default_rng(seed)
    parts = [np.asarray(statistic(weights(generator, part))) for part in pieces(draws, CHUNK_NUMBERS // size)]
    return np.concatenate(parts).astype(np.float64)


def pieces(draws: int, most: int) -> list[int]:
    """How many draws are made at a time, at most ``most`` of them (at least one), so that they fit into memory."""
    step = max(1, most)
    return [min(step, draws - i) for i in range(0, draws, step)]


def _item_weights(items: int) -> _Weights:
    def draw(generator: np.random.Generator, draws: int) -> Array:
        return generator.multinomial(items, np.full(items, 1 / items), size=draws).astype(np.float64)

    return draw


def label_codes(labels: ArrayLike) -> NDArray[np.int64]:
    """Labels [N] as numbers 0, 1, ..., equal ones alike."""
    return np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _pools(groups: NDArray[np.int64], stratum: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each observation the pool from which its group is drawn: its stratum, or one pool if groups cross strata."""
    pairs = np.unique(np.stack([groups, stratum], 1), axis=0)
    return stratum if len(pairs) == len(np.unique(groups)) else np.zeros_like(stratum)


def _nested_weights(levels: list[NDArray[Any]], stratum: NDArray[np.int64]) -> _Weights:
    """A group drawn m times draws its n children m*n times with equal chance: m independent resamples are one
    multinomial with m*n trials.
    """
    size = len(stratum)
    parent = np.zeros(size, np.int64)
    steps: list[tuple[NDArray[np.int64], list[tuple[int, NDArray[np.int64]]]]] = []
    for labels in levels:
        group = label_codes(np.stack([parent, label_codes(labels)], 1).view([("", np.int64)] * 2).reshape(-1))
        pool = _pools(group, stratum)
        first = np.unique(group, return_index=True)[1]  # one observation of each group
        families = label_codes(np.stack([parent, pool], 1).view([("", np.int64)] * 2).reshape(-1))[first]
        children = [np.flatnonzero(families == f) for f in range(families.max() + 1)]
        steps.append((group, [(int(parent[first[c[0]]]), c) for c in children]))
        parent = group

    def draw(generator: np.random.Generator, draws: int) -> Array:
        above = np.ones((draws, 1), np.int64)
        for group, families in steps:
            counts = np.zeros((draws, int(group.max()) + 1), np.int64)
            for source, children in families:
                n = len(children)
                counts[:, children] = generator.multinomial(above[:, source] * n, np.full(n, 1 / n))
            above = counts
        return above[:, steps[-1][0]].astype(np.float64)

    return draw


def _crossed_weights(levels: list[NDArray[Any]], stratum: NDArray[np.int64]) -> _Weights:
    """Groups of the first level times one nested resample of the rest, which all of them share."""
    outer, inner = _nested_weights(levels[:1], stratum), _nested_weights(levels[1:], stratum)
    return lambda generator, draws: outer(generator, draws) * inner(generator, draws)


def holm(p: ArrayLike) -> Array:
    """The p values, adjusted by Holm's step-down method (Holm 1979); the whole array is one family.

    NaN (a test that could not be made) stays NaN and is not counted. Same shape, float64. The same as statsmodels'
    ``multipletests(method="holm")``, which runs the garbage collector in every call: half a second beside a model.
    """

    def adjust(values: Array) -> Array:
        order = np.argsort(values, kind="stable")
        steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
        out = np.empty_like(values)
        out[order] = np.minimum(steps, 1.0)
        return out

    return _corrected(p, adjust)


def benjamini_hochberg(p: ArrayLike) -> Array:
    """The q values that control the false discovery rate (Benjamini and Hochberg 1995) over the whole array.

    NaN (a test that could not be made) stays NaN and is not counted. Same shape, float64.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    control = require("scipy.stats", "eval", "the false discovery rate").false_discovery_control
    return _corrected(p, control)


def _corrected(p: ArrayLike, method: Callable[[Array], Array]) -> Array:
    values = np.asarray(p, dtype=np.float64)
    known = ~np.isnan(values)
    if ((values[known] < 0) | (values[known] > 1)).any():
        raise ValueError("p values must lie in 0..1; give p values, not statistics")
    out = np.full(values.shape, np.nan)
    if known.any():
        out[known] = method(values[known])
    return out


def permutation_p(observed: ArrayLike, null: ArrayLike, *, alternative: str = "greater") -> Array:
    """The p value of a statistic against its null draws, ``(1 + count) / (1 + draws)`` (Phipson and Smyth 2010).

    Args:
        observed: the statistic, any shape.
        null: draws ``[draws, ...]`` of the same statistic under the null; NaN draws are left out.
        alternative: "greater", "less", or "two-sided" (distance from 0, so centre the null where it is not 0).

    Returns:
        float64, shaped like ``observed``; NaN where it is NaN. Draws that differ by rounding only count as equal.

    Raises:
        ValueError: an unknown alternative, or no draws.
    """
    value, drawn = np.asarray(observed, dtype=np.float64), np.asarray(null, dtype=np.float64)
    if drawn.ndim == 0 or len(drawn) == 0:
        raise ValueError("permutation_p: null needs at least one draw on its first axis")
    if alternative == "two-sided":
        value, drawn = np.abs(value), np.abs(drawn)
    elif alternative == "less":
        value, drawn = -value, -drawn
    elif alternative != "greater":
        raise ValueError(f"permutation_p: alternative must be greater, less or two-sided, got {alternative!r}")
    slack = 1e-12 * np.maximum(np.abs(value), 1e-300)
    count = (drawn >= value - slack).sum(0)
    result: Array = (1.0 + count) / (1.0 + (~np.isnan(drawn)).sum(0))
    return np.where(np.isnan(value), np.nan, result)


def weighted_correlation(weights: Array, x: Array, y: Array) -> Array:
    """Pearson's r of the columns of ``x`` [N,E] with those of ``y`` [N,E] or [N,1] under weights [D,N] (resamples):
    [D,E], NaN where a column does not vary.
    """
    total = weights.sum(1, keepdims=True)
    x, y = x - x.mean(0), y - y.mean(0)  # first, so that the moments below do not cancel
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    square = (weights @ x**2 / total - mean_x**2) * (weights @ y**2 / total - mean_y**2)
    r: Array = np.clip(ratio(covariance, np.sqrt(np.where(square > 1e-24, square, 0.0))), -1, 1)
    return r


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
