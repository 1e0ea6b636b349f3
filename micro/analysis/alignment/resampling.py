"""Resampling of stimuli in contiguous blocks: intervals and nulls of encoding scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from micro.analysis.alignment.ridge import Rows
from micro.analysis.statistics import Array

DRAWS_AT_ONCE = 64


def blocks_of(folds: Sequence[Rows], groups: ArrayLike | None = None, *, power: float = 1 / 3) -> list[list[Rows]]:
    """The rows of each fold in contiguous blocks of about (length of the fold)^power rows that do not cross groups.

    Neighbouring stimuli are not independent: blocks are resampled, not rows (Künsch 1989). For intervals the power is
    the usual one (Hall, Horowitz and Jing 1995); a null needs longer blocks, because what it breaks up looks more
    independent than it is.
    """
    labels = None if groups is None else np.asarray(groups)
    out = []
    for rows in folds:
        length = max(1, round(len(rows) ** power))
        runs = [rows]
        if labels is not None:
            runs = np.split(rows, np.flatnonzero(labels[rows][1:] != labels[rows][:-1]) + 1)
        out.append([block for run in runs for block in np.array_split(run, -(-len(run) // length))])
    return out


def block_weights(blocks: Sequence[Sequence[Rows]], rows: int, draws: int, seed: int) -> Array:
    """How often each row is drawn, ``[draws, rows]``: in each fold as many blocks as it has, with replacement."""
    generator = np.random.default_rng(seed)
    weights = np.zeros((draws, rows))
    for fold in blocks:
        counts = generator.multinomial(len(fold), np.full(len(fold), 1 / len(fold)), size=draws)
        for b, block in enumerate(fold):
            weights[:, block] = counts[:, b : b + 1]
    return weights


def block_orders(blocks: Sequence[Sequence[Rows]], count: int, seed: int) -> Iterator[Rows]:
    """``count`` orders of all rows in which whole blocks have changed places."""
    generator = np.random.default_rng(seed)
    flat = [block for fold in blocks for block in fold]
    for _ in range(count):
        yield np.concatenate([flat[i] for i in generator.permutation(len(flat))])


def resampled_scores(
    predictions: Array,
    responses: Array,
    folds: Sequence[Rows],
    weights: Array,
    statistic: Callable[[Array], Array],
) -> Array:
    """A statistic of the voxels' correlations under each draw of rows.

    Predictions stay as they are: the interval is about the stimuli that were predicted, not about those that trained.

    Args:
        predictions: held-out ``[n,v]``.
        responses: ``[n,v]``.
        folds: rows of each fold; correlations are averaged over folds.
        weights: ``[draws,n]``.
        statistic: correlations ``[D,v]`` -> ``[D, ...]``.

    Returns:
        ``[draws, ...]``.
    """
    pairs = [(rows, _standard(predictions[rows]), _standard(responses[rows])) for rows in folds]
    parts = []
    for start in range(0, len(weights), DRAWS_AT_ONCE):
        drawn = weights[start : start + DRAWS_AT_ONCE]
        r = np.mean([_weighted_correlation(p, y, drawn[:, rows]) for rows, p, y in pairs], axis=0)
        parts.append(statistic(r))
    return np.concatenate(parts)


def _standard(values: Array) -> Array:
    """Columns with mean 0 and deviation 1 (0 where they do not vary): sums of squares keep their digits."""
    centred = values - values.mean(0)
    deviation = centred.std(0)
    varies = deviation > 1e-12 * np.abs(values).max(0)
    result: Array = np.where(varies, centred / np.where(varies, deviation, 1), 0)
    return result


def _weighted_correlation(p: Array, y: Array, w: Array) -> Array:
    """Pearson correlation under weights ``[D,n]`` of columns ``[n,v]``; 0 where nothing varies."""
    total = w.sum(1, keepdims=True)
    mean_p, mean_y = w @ p / total, w @ y / total
    both = w @ (p * y) / total - mean_p * mean_y
    spread = (w @ p**2 / total - mean_p**2) * (w @ y**2 / total - mean_y**2)
    result: Array = np.where(spread > 1e-20, both / np.sqrt(np.maximum(spread, 1e-20)), 0)
    return result
