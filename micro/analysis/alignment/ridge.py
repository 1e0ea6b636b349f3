"""Encoding models: ridge regression from features to responses, scored on data that it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from micro.analysis.statistics import Array

Rows = NDArray[np.int64]
LAMBDAS = tuple(10.0**k for k in range(-3, 7))


@dataclass(frozen=True)
class RidgeScore:
    """What an encoding model predicts of responses ``[n,v]`` that were held out.

    ``r``: Pearson correlation per voxel, mean over folds, ``[v]``; NaN where the responses of a fold do not vary.
    ``by_fold``: ``[folds,v]``. ``lambdas``: the penalty chosen, ``[folds,v]``. ``predictions``: ``[n,v]``, every row
    from the fold that held it out.
    """

    r: Array
    by_fold: Array
    lambdas: Array
    predictions: Array

    @property
    def score(self) -> float:
        """Median of ``r`` over the voxels in which it is defined."""
        return float(np.nanmedian(self.r)) if np.isfinite(self.r).any() else float("nan")


def contiguous_folds(n: int, folds: int, groups: ArrayLike | None = None) -> list[Rows]:
    """The rows of each fold: contiguous blocks of nearly equal length, in order.

    Neighbouring stimuli resemble each other (one passage, slow drifts of a recording), so folds are never drawn at
    random. With ``groups`` (one label per row, equal labels adjacent) no border of a fold cuts a group.

    Raises:
        ValueError: fewer than two folds, fewer than three rows a fold, or fewer groups than folds.
    """
    if folds < 2 or n < 3 * folds:
        raise ValueError(f"folds must be at least 2 with at least 3 rows each, got {folds} folds of {n} rows")
    if groups is None:
        return [np.asarray(rows, dtype=np.int64) for rows in np.array_split(np.arange(n), folds)]
    labels = np.asarray(groups)
    if labels.shape != (n,):
        raise ValueError(f"groups must hold one label for each of the {n} rows, got shape {list(labels.shape)}")
    allowed = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    wanted = [int(allowed[np.abs(allowed - i * n / folds).argmin()]) if len(allowed) else 0 for i in range(1, folds)]
    borders = [0, *wanted, n]
    if min(np.diff(borders)) < 3:
        raise ValueError(f"groups do not part {n} rows into {folds} folds of at least 3 rows: use fewer folds")
    return [np.arange(a, b) for a, b in pairwise(borders)]


def correlation(predicted: Tensor, responses: Tensor) -> Tensor:
    """Pearson correlation of columns, ``[..., n, v]`` twice -> ``[..., v]``.

    0 where the prediction does not vary (it carries nothing), NaN where the responses do not vary.
    """
    mean_p, mean_y = predicted.mean(-2, keepdim=True), responses.mean(-2, keepdim=True)
    p, y = predicted - mean_p, responses - mean_y
    scale_p, scale_y = p.norm(dim=-2), y.norm(dim=-2)
    # Rounding leaves a constant column of large numbers with a small norm: compare with its mean.
    tiny = 1e-12 * predicted.shape[-2] ** 0.5
    flat_p, flat_y = scale_p <= tiny * mean_p.abs().squeeze(-2), scale_y <= tiny * mean_y.abs().squeeze(-2)
    r = (p * y).sum(-2) / (scale_p * scale_y)
    return torch.where(flat_y, torch.nan, torch.where(flat_p, torch.zeros_like(r), r))


@dataclass(frozen=True)
class _Part:
    """A training part, ready for any responses and penalties.

    Prediction of the held-out rows = ``left · diag(1 / (values + λ)) · right · (Y − mean)`` + mean.
    """

    train: Tensor
    test: Tensor
    left: Tensor  # [test, rank]
    values: Tensor  # [rank]
    right: Tensor  # [rank, train]

    @classmethod
    def of(cls, features: Tensor, train: Tensor, test: Tensor) -> _Part:
        """One eigendecomposition: of ``ΦᵀΦ`` where d <= n, else of ``ΦΦᵀ`` (dual form)."""
        fit, held = _standardised(features[train], features[test])
        if fit.shape[1] > fit.shape[0]:
            values, vectors = torch.linalg.eigh(fit @ fit.T)
            left, right = (held @ fit.T) @ vectors, vectors.T
        else:
            values, vectors = torch.linalg.eigh(fit.T @ fit)
            left, right = held @ vectors, (fit @ vectors).T
        return cls(train, test, left, values.clamp(min=0), right)

    def project(self, responses: Tensor) -> tuple[Tensor, Tensor]:
        """(right · centred responses, their mean), of the training rows of ``[n,v]``."""
        y = responses[self.train]
        mean = y.mean(0)
        return self.right @ (y - mean), mean

    def predict(self, projected: Tensor, penalty: Tensor | float) -> Tensor:
        """Centred prediction ``[test,v]``; ``penalty``: a number, or one per voxel."""
        return self.left @ (projected / (self.values[:, None] + penalty))


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and standard deviation of the training part; columns that do not vary there become 0."""
    mean = train.mean(0)
    deviation = train.std(0, correction=0)
    varies = deviation > 1e-12 * train.abs().amax(0)
    scale = torch.where(varies, 1 / torch.where(varies, deviation, 1), 0)
    return (train - mean) * scale, (test - mean) * scale


class Encoder:
    """Cross-validated ridge regression of one feature set, for any number of response sets.

    ``W = (ΦᵀΦ + λI)⁻¹ ΦᵀY``, Φ standardised on the training part, Y centred there; dual form when d > n; one
    eigendecomposition per training part for all λ and voxels. λ is chosen per voxel as the one with the highest Pearson
    correlation, mean over inner folds of the training part; of equal ones the largest.

    Args:
        features: ``[n,d]``, finite.
        folds: outer folds, contiguous blocks.
        inner_folds: folds of each training part for the choice of λ.
        lambdas: penalties to choose from.
        groups: one label per row; borders of folds do not cut groups.
        device: of the linear algebra, which runs in float64.

    Raises:
        ValueError: wrong shapes, values that are not finite, too few rows, a penalty that is not positive.

    Source: ridge regression in dual form (Saunders, Gammerman and Vovk 1998); brain encoding as in Huth et al. 2016.
    """

    def __init__(
        self,
        features: ArrayLike,
        *,
        folds: int = 5,
        inner_folds: int = 5,
        lambdas: Sequence[float] = LAMBDAS,
        groups: ArrayLike | None = None,
        device: str = "cpu",
    ) -> None:
        self._features = torch.as_tensor(matrix(features, "features"), device=device)
        n = len(self._features)
        self._groups = None if groups is None else np.asarray(groups)
        self._inner = inner_folds
        self._lambdas = sorted(float(value) for value in lambdas)
        if not self._lambdas or not (self._lambdas[0] > 0 and np.isfinite(self._lambdas[-1])):
            raise ValueError(f"lambdas must be positive and finite, got {list(lambdas)}")
        self.folds = contiguous_folds(n, folds, groups)
        self._parts = [self._part(np.setdiff1d(np.arange(n), rows), rows) for rows in self.folds]

    def _part(self, train: Rows, test: Rows) -> _Part:
        device = self._features.device
        return _Part.of(self._features, torch.as_tensor(train, device=device), torch.as_tensor(test, device=device))

    def _responses(self, responses: ArrayLike) -> Tensor:
        y = torch.as_tensor(matrix(responses, "responses"), device=self._features.device)
        if len(y) != len(self._features):
            raise ValueError(f"responses have {len(y)} rows and features {len(self._features)}: one per stimulus each")
        return y

    def score(self, responses: ArrayLike) -> RidgeScore:
        """Choose penalties, fit and score responses ``[n,v]``."""
        y = self._responses(responses)
        lambdas = torch.stack([self._choose(part.train.cpu().numpy(), y) for part in self._parts])
        predictions, by_fold = self._held_out(y, lambdas)
        return RidgeScore(*(t.cpu().numpy() for t in (by_fold.mean(0), by_fold, lambdas, predictions)))

    def refit(self, responses: ArrayLike, lambdas: ArrayLike) -> Array:
        """Pearson correlation per voxel ``[v]`` with given penalties ``[folds,v]``: the null of shuffled responses."""
        y = self._responses(responses)
        given = torch.as_tensor(np.asarray(lambdas, dtype=np.float64), device=y.device)
        result: Array = self._held_out(y, given)[1].mean(0).cpu().numpy()
        return result

    def _held_out(self, y: Tensor, lambdas: Tensor) -> tuple[Tensor, Tensor]:
        predictions = torch.empty_like(y)
        scores = []
        for part, penalty in zip(self._parts, lambdas, strict=True):
            projected, mean = part.project(y)
            predictions[part.test] = part.predict(projected, penalty) + mean
            scores.append(correlation(predictions[part.test], y[part.test]))
        return predictions, torch.stack(scores)

    def _choose(self, train: Rows, y: Tensor) -> Tensor:
        """The best penalty per voxel ``[v]`` by contiguous inner folds of the training rows."""
        groups = None if self._groups is None else self._groups[train]
        total = torch.zeros(len(self._lambdas), y.shape[1], dtype=y.dtype, device=y.device)
        for rows in contiguous_folds(len(train), self._inner, groups):
            part = self._part(np.delete(train, rows), train[rows])
            projected, _ = part.project(y)
            for k, penalty in enumerate(self._lambdas):
                total[k] += correlation(part.predict(projected, penalty), y[part.test]).nan_to_num()
        largest = len(self._lambdas) - 1 - total.flip(0).argmax(0)
        return torch.tensor(self._lambdas, dtype=y.dtype, device=y.device)[largest]


def ridge(features: ArrayLike, responses: ArrayLike, **options: Any) -> RidgeScore:
    """Encoding score of features ``[n,d]`` for responses ``[n,v]``; options as for :class:`Encoder`."""
    return Encoder(features, **options).score(responses)


def matrix(values: ArrayLike, name: str) -> Array:
    """``values`` as a finite float64 matrix.

    Raises:
        ValueError: another rank, no rows or columns, or a value that is not finite; the message says where.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a matrix [stimuli, columns], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name}: row {row}, column {column} is {array[row, column]}; leave such rows or columns out")
    return array
