"""Bootstrap intervals over records."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


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
    values = np.stack([statistic(w) for w in weights])
    tail = (1 - level) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail], axis=0)
    return low, high


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
