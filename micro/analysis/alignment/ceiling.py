"""How well a perfect model could do: reliability of responses by split halves, and scores relative to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from micro.analysis.alignment.ridge import correlation
from micro.analysis.statistics import Array

LEAST_RELIABILITY = 0.05


def spearman_brown(half: ArrayLike, factor: float = 2.0) -> Array:
    """Reliability of data ``factor`` times as long: ``f ρ / (1 + (f − 1) ρ)``; ``2ρ / (1 + ρ)`` for halves.

    Correlations that are not positive are returned as they are: the formula is for reliabilities, and changes sign
    below −1 / (f − 1).
    """
    rho = np.asarray(half, dtype=np.float64)
    result: Array = np.where(rho > 0, factor * rho / (1 + (factor - 1) * np.maximum(rho, 0)), rho)
    return result


def split_half(repetitions: ArrayLike, *, splits: int = 100, seed: int = 0) -> Array:
    """Reliability ρ' ``[v]`` of the mean over repetitions (or subjects) ``[k,n,v]``.

    Repetitions are split at random into two halves, their means are correlated over stimuli, the correlation is
    averaged over ``splits`` splits and stepped up to k repetitions. With an odd k one repetition sits out of each
    split, and the step is ``k / ⌊k/2⌋`` instead of 2.

    Raises:
        ValueError: fewer than two repetitions or three stimuli, or values that are not finite.

    Source: Spearman 1910; Brown 1910.
    """
    data = np.asarray(repetitions, dtype=np.float64)
    if data.ndim != 3 or len(data) < 2 or data.shape[1] < 3:
        raise ValueError(f"repetitions must be [repetitions >= 2, stimuli >= 3, voxels], got shape {list(data.shape)}")
    if not np.isfinite(data).all():
        raise ValueError("repetitions hold values that are not finite: leave those voxels or repetitions out")
    k = len(data)
    half = k // 2
    values = torch.as_tensor(data)
    total = torch.zeros(data.shape[2], dtype=torch.float64)
    generator = np.random.default_rng(seed)
    splits = 1 if k == 2 else splits
    for _ in range(splits):
        order = torch.as_tensor(generator.permutation(k))
        total += correlation(values[order[:half]].mean(0), values[order[half : 2 * half]].mean(0))
    return spearman_brown((total / splits).nan_to_num().numpy(), k / half)


@dataclass(frozen=True)
class Ceiling:
    """Reliability ρ' of voxels ``[v]``, and which of them are scored."""

    reliability: Array

    @property
    def included(self) -> NDArray[np.bool_]:
        """Which voxels ``[v]`` have ρ' above 0.05; a ratio to less is noise."""
        return np.asarray(self.reliability > LEAST_RELIABILITY)

    @property
    def excluded(self) -> int:
        """Voxels that are left out."""
        return int((~self.included).sum())

    def normalise(self, r: ArrayLike) -> Array:
        """``r / √ρ'`` ``[..., v]``, NaN in excluded voxels: a perfect model of the noiseless response reaches 1."""
        values = np.asarray(r, dtype=np.float64)
        best = np.sqrt(np.where(self.included, self.reliability, np.nan))
        result: Array = values / best
        return result
