"""TIES merging: trim, elect signs, average what agrees.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from micro.deltas.deltas import ExpertDeltas, Group
from micro.deltas.merged import Merged
from micro.progress import track

if TYPE_CHECKING:
    from torch import Tensor

LOW_BITS = 16
CHUNK = 1 << 22  # entries of one expert that are merged at once, in float64


def ties(
    deltas: ExpertDeltas,
    experts: str | int | Iterable[str | int] | None = None,
    *,
    density: float = 0.2,
    scale: float = 1.0,
    trim: str = "model",
    shared: float = 1.0,
    progress: bool = False,
) -> Merged:
    """Weights base + scale * TIES(tau_1, ..., tau_n).

    Args:
        deltas: the task vectors.
        experts: which to merge; all if not given.
        density: share of each task vector's entries that are kept, the largest by magnitude (the paper's k; 20 %).
        scale: the paper's lambda; 0 gives the base's bits.
        trim: "model" chooses the kept entries over all of an expert's tensors together (the paper), which reads all
            tensors twice more; "tensor" within each tensor.
        shared: see :class:`micro.deltas.Merged`.
        progress: show a bar while thresholds are searched.

    Returns:
        A :class:`micro.deltas.Merged`. With density 1, deltas that are all equal return themselves.

    Raises:
        ValueError: density outside (0, 1], an unknown trim or expert.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if trim not in ("model", "tensor"):
        raise ValueError(f'trim must be "model" or "tensor", got {trim!r}')
    chosen = deltas.indices(experts, "experts")
    thresholds: Tensor | None = None
    if trim == "model" and density < 1:
        thresholds = model_thresholds(deltas, chosen, density, progress=progress)

    def delta(group: Group) -> Tensor:
        tau = deltas.tau(group)[chosen]
        limits = thresholds
        if limits is None and density < 1:
            limits = _thresholds(lambda: iter([tau]), density)
        return merge(tau, limits)

    names = [deltas.experts[e] for e in chosen]
    settings = {"experts": names, "density": density, "trim": trim}
    how = f"TIES of {', '.join(names)}: density {density:g} per {trim}, scale {scale:g}"
    return Merged(deltas, delta, how, scale, shared, settings)


def merge(tau: Tensor, thresholds: Tensor | None) -> Tensor:
    """Trim, elect, average: tau [n, ...] and limits [n] (None: keep all) -> the merged delta [...].

    An entry is kept where |tau| >= limit. The elected sign is that of the sum of kept entries; the result is the mean,
    formed in float64, of the kept entries of that sign; 0 where the sum is exactly 0.
    """
    import torch

    pieces = tau.flatten(1).split(CHUNK, 1)
    return torch.cat([_merge(piece, thresholds) for piece in pieces]).view(tau.shape[1:])


def _merge(tau: Tensor, thresholds: Tensor | None) -> Tensor:
    import torch

    kept = tau.double()
    if thresholds is not None:
        kept = torch.where(magnitude(tau) >= thresholds[:, None], kept, 0)
    elected = kept.sum(0).sign()
    agree = (kept.sign() == elected) & (elected != 0)
    count = agree.sum(0).clamp(min=1)
    return (torch.where(agree, kept, 0).sum(0) / count).to(tau.dtype)


def magnitude(tau: Tensor) -> Tensor:
    """|tau| in float32, in which thresholds are searched and compared."""
    return tau.abs().float()


def model_thresholds(deltas: ExpertDeltas, chosen: list[int], density: float, *, progress: bool = False) -> Tensor:
    """Per expert the magnitude from which on the largest ``density`` of all its entries lie, float32 [n]."""

    def stream() -> Iterator[Tensor]:
        for group in track(deltas.groups, "TIES: thresholds", unit="tensors", enabled=progress):
            yield deltas.tau(group)[chosen]

    return _thresholds(stream, density)


def _thresholds(stream: Callable[[], Iterator[Tensor]], density: float) -> Tensor:
    """The k-th largest magnitude of each row over a stream of [n, ...] tensors, k = round(density * entries), >= 1.

    Exact without a sort: non-negative floats are ordered as their bit patterns are, so one pass counts the upper half
    of the bits and a second one, inside the bin that holds the k-th, the lower half.
    """
    import torch

    high: Tensor | None = None
    for tau in stream():
        counts = _counts(_bits(tau) >> LOW_BITS)
        high = counts if high is None else high + counts
    assert high is not None, "a mixture has tensors"
    k = (high.sum(1).double() * density).round().clamp(min=1).long()
    bins, above = _kth_bin(high, k)
    low = torch.zeros(len(high), 1 << LOW_BITS, dtype=torch.int64, device=high.device)
    for tau in stream():
        bits = _bits(tau)
        for row in range(len(bits)):
            inside = bits[row][(bits[row] >> LOW_BITS) == bins[row]]
            low[row] += torch.bincount(inside & ((1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)
    last, _ = _kth_bin(low, k - above)
    return ((bins << LOW_BITS) | last).to(torch.int32).view(torch.float32)


def _bits(tau: Tensor) -> Tensor:
    import torch

    return magnitude(tau).flatten(1).contiguous().view(torch.int32)


def _counts(bins: Tensor) -> Tensor:
    import torch

    return torch.stack([torch.bincount(row, minlength=1 << (31 - LOW_BITS)) for row in bins])


def _kth_bin(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of the k-th largest entry of each row, and how many entries lie in higher bins."""
    import torch

    from_top = counts.flip(1).cumsum(1)
    index = torch.searchsorted(from_top, k[:, None]).squeeze(1)
    above = torch.where(index > 0, from_top.gather(1, (index - 1).clamp(min=0)[:, None]).squeeze(1), 0)
    return counts.shape[1] - 1 - index, above
