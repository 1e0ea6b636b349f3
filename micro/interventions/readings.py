"""What actions bring back: rows as they were seen, or their moments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor


@dataclass(repr=False)
class Reading:
    """Rows seen at one point, in the order of the calls, layers and experts.

    values: [N,W], detached unless asked otherwise; layer, expert (-1 at token rows), row (of the batch), slot
    (absolute): int64 [N]; chosen: bool [N], whether routing chose the expert for the token (always, unless every expert
    runs on every token).
    """

    values: Tensor
    layer: Tensor
    expert: Tensor
    row: Tensor
    slot: Tensor
    chosen: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Reading({len(self)} rows of {self.values.shape[-1]}, layers {sorted(set(self.layer.tolist()))})"

    def select(self, wanted: Tensor) -> Reading:
        """The rows under a bool mask or an index."""
        return Reading(*(getattr(self, part.name)[wanted] for part in fields(self)))

    def at(self, layer: int, expert: int | None = None) -> Reading:
        """The rows of one layer, and of one expert if given."""
        wanted = self.layer == layer
        return self.select(wanted if expert is None else wanted & (self.expert == expert))

    @classmethod
    def cat(cls, parts: list[Reading]) -> Reading:
        """Rows of several readings, one after the other.

        Raises:
            ValueError: there is none; nothing was seen.
        """
        if not parts:
            raise ValueError("nothing was read: no forward pass met this action's layers, rows and positions")
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass(repr=False)
class Moments:
    """Streaming mean and variance per layer, expert and column (Welford 1962; merged as Chan et al. 1979), float64.

    count: [L,E']; mean, m2 (sum of squared deviations): [L,E',W]; scatter: [L,E',W,W] sum of products of deviations, or
    None. E' is 1 at token rows.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    scatter: Tensor | None = field(default=None)

    @classmethod
    def zeros(cls, layers: int, experts: int, width: int, *, covariance: bool, device: torch.device) -> Moments:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(layers, experts, *shape, dtype=torch.float64, device=device)

        return cls(zero(), zero(width), zero(width), zero(width, width) if covariance else None)

    @property
    def variance(self) -> Tensor:
        """[L,E',W], n - 1; NaN where fewer than two rows were seen."""
        return self.m2 / self._freedom()[..., None]

    @property
    def covariance(self) -> Tensor | None:
        """[L,E',W,W], n - 1, if it was asked for."""
        return None if self.scatter is None else self.scatter / self._freedom()[..., None, None]

    def _freedom(self) -> Tensor:
        return torch.where(self.count > 1, self.count - 1, torch.nan)

    def add(self, layer: int, expert: int, rows: Tensor) -> None:
        """Take rows [n,W] in."""
        if not len(rows):
            return
        wide = rows.double()
        mean = wide.mean(0)
        deviations = wide - mean
        scatter = None if self.scatter is None else deviations.T @ deviations
        self._join(layer, expert, float(len(rows)), mean, deviations.square().sum(0), scatter)

    def merge(self, other: Moments) -> Moments:
        """Of both together; this one is changed and returned.

        Raises:
            ValueError: the shapes differ.
        """
        if self.mean.shape != other.mean.shape or (self.scatter is None) != (other.scatter is None):
            raise ValueError(f"moments of {list(self.mean.shape)} cannot take in those of {list(other.mean.shape)}")
        for layer, expert in (other.count > 0).nonzero().tolist():
            scatter = None if other.scatter is None else other.scatter[layer, expert]
            count = float(other.count[layer, expert])
            self._join(layer, expert, count, other.mean[layer, expert], other.m2[layer, expert], scatter)
        return self

    def _join(self, layer: int, expert: int, count: float, mean: Tensor, m2: Tensor, scatter: Tensor | None) -> None:
        at = (layer, expert)
        own = float(self.count[at])
        total = own + count
        delta = mean - self.mean[at]
        self.m2[at] += m2 + delta.square() * (own * count / total)
        if self.scatter is not None and scatter is not None:
            self.scatter[at] += scatter + torch.outer(delta, delta) * (own * count / total)
        self.mean[at] += delta * (count / total)
        self.count[at] = total

    def __repr__(self) -> str:
        layers, experts, width = self.mean.shape
        return f"Moments({layers} layers, {experts} experts, {width} columns, {int(self.count.sum())} rows)"
