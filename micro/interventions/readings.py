"""What actions bring back: rows as they were seen, or their moments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from micro import ops


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
        device = parts[0].values.device  # a model may lie on several
        return cls(*(torch.cat([getattr(part, f.name).to(device) for part in parts]) for f in fields(cls)))


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

        with torch.inference_mode(False):  # may be added to outside
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
        """Take rows [n,W] of one expert in."""
        self.take(layer, rows, None, torch.full((len(rows),), expert, dtype=torch.int32, device=rows.device))

    def take(self, layer: int, x: Tensor, touched: Tensor | None, experts: Tensor | None) -> None:
        """Take the touched rows (bool [N]; None: all) of x [N,W] in, each into its expert's (int32 [N]; None: 0)."""
        if x.device != self.mean.device:  # a model on several devices
            part = Moments.zeros(1, *self.mean.shape[1:], covariance=self.scatter is not None, device=x.device)
            part.take(0, x, touched, experts)
            self._join(layer, *(None if t is None else t[0].to(self.mean.device) for t in part._states()))
            return
        count, mean, m2, scatter = (None if t is None else t[layer] for t in self._states())
        assert count is not None and mean is not None and m2 is not None
        ops.moments_(x, count, mean, m2, scatter, touched=touched, experts=experts)

    def merge(self, other: Moments) -> Moments:
        """Of both together; this one is changed and returned.

        Raises:
            ValueError: the shapes differ.
        """
        if self.mean.shape != other.mean.shape or (self.scatter is None) != (other.scatter is None):
            raise ValueError(f"moments of {list(self.mean.shape)} cannot take in those of {list(other.mean.shape)}")
        self._join(slice(None), *(None if t is None else t.to(self.mean.device) for t in other._states()))
        return self

    def _states(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.count, self.mean, self.m2, self.scatter

    def _join(
        self, layer: int | slice, count: Tensor | None, mean: Tensor | None, m2: Tensor | None, scatter: Tensor | None
    ) -> None:
        """Other moments of a layer, or of all (Chan, Golub and LeVeque 1979)."""
        assert count is not None and mean is not None and m2 is not None
        own, total = self.count[layer], (self.count[layer] + count).clamp(min=1)
        delta, weight = mean - self.mean[layer], own * count / total
        self.m2[layer] += m2 + delta.square() * weight[..., None]
        if self.scatter is not None and scatter is not None:
            self.scatter[layer] += scatter + delta[..., :, None] * delta[..., None, :] * weight[..., None, None]
        self.mean[layer] += delta * (count / total)[..., None]
        self.count[layer] += count

    def __repr__(self) -> str:
        layers, experts, width = self.mean.shape
        return f"Moments({layers} layers, {experts} experts, {width} columns, {int(self.count.sum())} rows)"
