"""Deltas as singular vectors: how much experts interfere, merging without interference, low-rank experts.

Source: Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", 2025 (interference and
merging); Eckart and Young, 1936 (the error of the best approximation of rank k).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from micro.deltas.deltas import ExpertDeltas, Group
from micro.deltas.merged import Merged, add, rewritten, save_rewritten
from micro.deltas.report import CompressionReport, InterferenceReport
from micro.progress import track

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from micro.modeling import MiCRoForCausalLM

RANDOMISED_FROM = 1024  # smaller side from which on few singular vectors are found by a randomised method


class Factors(NamedTuple):
    """u [n,a,k], s [n,k] descending, v [n,b,k]: tau_i is u_i diag(s_i) v_i' up to what was cut; squares: |tau_i|^2."""

    u: Tensor
    s: Tensor
    v: Tensor
    squares: Tensor

    def product(self) -> Tensor:
        """U S V' [n,a,b]."""
        return (self.u * self.s[:, None]) @ self.v.mT


def factors_of(
    deltas: ExpertDeltas, group: Group, rank: int, *, experts: list[int] | None = None, seed: int = 0
) -> Factors:
    """:func:`factors` of the deltas of a matrix, of all experts or of some."""
    import torch

    tau = deltas.tau(group) if experts is None else deltas.tau(group)[experts]
    return factors(tau if deltas.dtype == torch.float64 else tau.float(), rank, seed=seed)


def factors(tau: Tensor, rank: int, *, seed: int = 0) -> Factors:
    """The ``rank`` largest singular values and vectors of each of tau [n,a,b].

    Exact decomposition where the smaller side is below 1024 or the rank above a quarter of it; else the randomised
    method of Halko et al. (2011) with 16 extra vectors and 4 power iterations, from ``seed``. In float64 where the
    mixture is, else in float32.
    """
    import torch

    side = min(tau.shape[1:])
    if not 1 <= rank <= side:
        raise ValueError(f"rank must lie in 1..{side} for a matrix {list(tau.shape[1:])}, got {rank}")
    squares = tau.double().square().sum((1, 2))
    if side < RANDOMISED_FROM or 4 * rank > side:
        u, s, vt = torch.linalg.svd(tau, full_matrices=False)
        return Factors(u[..., :rank], s[..., :rank], vt.mT[..., :rank], squares)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(tau, q=min(rank + 16, side), niter=4)
    return Factors(u[..., :rank], s[..., :rank], v[..., :rank], squares)


def interference_of(u: Tensor, s: Tensor, v: Tensor) -> float:
    """||(U'U - I) S (V'V - I)||_1 of concatenated singular vectors: u [n,a,k], s [n,k], v [n,b,k].

    The norm is the sum of magnitudes. 0 where the vectors of different experts are orthogonal. Directions whose
    singular value is zero to rounding are arbitrary and left out.
    """
    import torch

    left, sigma, right = (x.double() for x in side_by_side(u, s, v))
    one = torch.eye(len(sigma), dtype=torch.float64, device=left.device)
    return float(((left.mT @ left - one) * sigma @ (right.mT @ right - one)).abs().sum())


def side_by_side(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[U_1 | ... | U_n], all singular values, [V_1 | ... | V_n], without the directions of zero singular values."""
    import torch

    sigma = s.flatten()
    largest = s.amax(1, keepdim=True).expand_as(s).flatten()
    floor = largest * max(u.shape[1], v.shape[1]) * torch.finfo(s.dtype).eps
    held = (sigma > floor).nonzero()[:, 0]
    return torch.cat(list(u), 1)[:, held], sigma[held], torch.cat(list(v), 1)[:, held]


def interference(
    deltas: ExpertDeltas,
    experts: str | int | Iterable[str | int] | None = None,
    *,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    matrices: Sequence[str] | None = None,
    controls: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> InterferenceReport:
    """Singular task interference of every matrix, beside that of random directions with the same singular values.

    Args:
        deltas: the task vectors.
        experts: at least two; all if not given.
        rank: singular vectors per expert; the smaller side divided by the number of experts if not given (the paper).
        layers: which to look at; all if not given.
        matrices: their names (``["q_proj"]``); all linear maps if not given. Gains are left out.
        controls: draws of random orthonormal vectors per matrix.
        seed: of the controls and of the randomised decomposition.
        progress: show a bar on stderr.

    Returns:
        An :class:`InterferenceReport`; values divided by the sum of the singular values, so that matrices compare.

    Raises:
        ValueError: fewer than two experts, a bad rank, layer or name.
    """
    import torch

    chosen = deltas.indices(experts, "experts")
    if len(chosen) < 2:
        raise ValueError("interference: give at least two experts")
    groups = [group for group in deltas.select(layers, matrices) if group.is_matrix]
    generator = torch.Generator().manual_seed(seed)
    report = InterferenceReport(
        experts=[deltas.experts[e] for e in chosen],
        settings={
            "mixture": deltas.mixture.name, "base": deltas.base_name, "rank": rank or "smaller side / experts",
            "controls": controls, "seed": seed,
        },
    )  # fmt: skip
    for group in track(groups, "interference", unit="matrices", enabled=progress):
        k = rank or max(1, min(group.shape) // len(chosen))
        found = factors_of(deltas, group, k, experts=chosen, seed=seed)
        total = float(found.s.double().sum())
        scale = total if total > 0 else 1.0
        value = interference_of(found.u, found.s, found.v)
        null = [
            interference_of(_random_frames(found.u, generator), found.s, _random_frames(found.v, generator))
            for _ in range(controls)
        ]
        report.rows.append(
            {
                "layer": group.layer,
                "matrix": group.name,
                "rank": k,
                "interference": value / scale,
                "random": sum(null) / len(null) / scale if null else None,
                "random_low": min(null) / scale if null else None,
                "random_high": max(null) / scale if null else None,
                "singular_sum": total,
                "energy": [float(x) for x in found.s.double().square().sum(1) / found.squares.clamp(min=1e-300)],
            }
        )
    return report


def _random_frames(like: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns in the shape of ``like`` [n,a,k], uniform over all of them."""
    import torch

    q: Tensor = torch.linalg.qr(torch.randn(like.shape, generator=generator, dtype=torch.float64))[0]
    return q.to(like.device)


def decorrelated(
    deltas: ExpertDeltas,
    experts: str | int | Iterable[str | int] | None = None,
    *,
    rank: int | None = None,
    scale: float = 1.0,
    shared: float = 1.0,
    seed: int = 0,
) -> Merged:
    """Weights base + scale * U S V', where the concatenated singular vectors are replaced by the nearest orthonormal
    ones (orthogonal Procrustes): the sum of the deltas without their interference.

    Args:
        deltas: the task vectors.
        experts: which to merge; all if not given.
        rank: singular vectors per expert; at most the smaller side divided by the number of experts, which is the
            default.
        scale: 0 gives the base's bits.
        shared: see :class:`micro.deltas.Merged`.
        seed: of the randomised decomposition of large matrices.

    Gains (vectors) are averaged, as in the paper. Raises ValueError for a rank that leaves no room for orthogonality.
    """
    chosen = deltas.indices(experts, "experts")
    side = min(min(group.shape) for group in deltas.groups if group.is_matrix) // len(chosen)
    if rank is not None and not 1 <= rank <= side:
        raise ValueError(f"rank must lie in 1..{side}, so that {len(chosen)} experts fit beside each other, got {rank}")

    def delta(group: Group) -> Tensor:
        if not group.is_matrix:
            tau = deltas.tau(group)[chosen]
            return tau.double().mean(0).to(tau.dtype)
        k = rank or max(1, min(group.shape) // len(chosen))
        left, sigma, right = side_by_side(*factors_of(deltas, group, k, experts=chosen, seed=seed)[:3])
        return (_orthonormal(left) * sigma) @ _orthonormal(right).mT

    names = [deltas.experts[e] for e in chosen]
    settings = {"experts": names, "rank": rank or "smaller side / experts", "seed": seed}
    return Merged(
        deltas, delta, f"task singular vectors of {', '.join(names)}, scale {scale:g}", scale, shared, settings
    )


def _orthonormal(columns: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to the given one [a,k], k <= a."""
    import torch

    p, _, q = torch.linalg.svd(columns, full_matrices=False)
    nearest: Tensor = p @ q
    return nearest


class LowRank:
    """A mixture whose experts are base + (best approximation of rank k of their delta).

    Args:
        deltas: the task vectors.
        fraction: k = max(1, round(fraction * smaller side)); give this or ``rank``.
        rank: k for every matrix, at most its smaller side.
        seed: of the randomised decomposition of large matrices.

    Gains keep their full delta. Raises ValueError for a bad fraction or rank.
    """

    def __init__(
        self, deltas: ExpertDeltas, *, fraction: float | None = None, rank: int | None = None, seed: int = 0
    ) -> None:
        if (fraction is None) == (rank is None):
            raise ValueError("LowRank: give either fraction or rank")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.deltas, self.fraction, self.rank, self.seed = deltas, fraction, rank, seed
        self._kept: tuple[Group, Tensor] | None = None  # experts of a tensor are asked for one after the other

    def rank_of(self, group: Group) -> int:
        """Singular vectors of one matrix."""
        side = min(group.shape)
        return min(side, self.rank) if self.rank is not None else max(1, round(float(self.fraction or 0) * side))

    def tensors(self, group: Group) -> Tensor:
        """The experts' new tensors [E, ...], in the mixture's dtype."""
        if self._kept is not None and self._kept[0] == group:
            return self._kept[1]
        if not group.is_matrix or self.rank_of(group) == min(group.shape):
            new = self.deltas.stack(group)
        else:
            found = factors_of(self.deltas, group, self.rank_of(group), seed=self.seed)
            new = add(self.deltas.base(group)[None], found.product(), 1.0)
        self._kept = group, new
        return new

    def report(
        self, *, layers: Sequence[int] | None = None, matrices: Sequence[str] | None = None, progress: bool = False
    ) -> CompressionReport:
        """Sizes and errors of the approximation, per matrix and expert."""
        report = CompressionReport(
            experts=self.deltas.experts,
            settings={
                "mixture": self.deltas.mixture.name, "base": self.deltas.base_name, "fraction": self.fraction,
                "rank": self.rank, "seed": self.seed,
            },
        )  # fmt: skip
        groups = [group for group in self.deltas.select(layers, matrices) if group.is_matrix]
        for group in track(groups, "low rank", unit="matrices", enabled=progress):
            report.rows.append(self._row(group))
        return report

    def _row(self, group: Group) -> dict[str, object]:
        k, side = self.rank_of(group), min(group.shape)
        found = factors_of(self.deltas, group, min(k + 1, side), seed=self.seed)
        kept = found.s[:, :k].double().square().sum(1)
        lost = (found.squares - kept).clamp(min=0)
        next_one = found.s[:, k].double() if k < side else found.s.new_zeros(len(found.s)).double()
        error = (lost / found.squares.clamp(min=1e-300)).sqrt() if k < side else next_one
        a, b = group.shape
        return {
            "layer": group.layer,
            "matrix": group.name,
            "rank": k,
            "parameters": a * b,
            "low_rank_parameters": min(k * (a + b), a * b),
            "relative_error": [float(x) for x in error],
            "spectral_error": [float(x) for x in next_one],
        }

    def receipt(self) -> dict[str, Any]:
        """What was approximated, and how."""
        size = f"rank {self.rank}" if self.rank is not None else f"{self.fraction:g} of full rank"
        return {
            "how": f"experts are base + delta of low rank ({size})", "mixture": self.deltas.mixture.name,
            "base": self.deltas.base_name, "fraction": self.fraction, "rank": self.rank, "seed": self.seed,
        }  # fmt: skip

    def model(self) -> MiCRoForCausalLM:
        """A copy of the mixture with the approximated experts, as full matrices."""
        return rewritten(self.deltas, lambda group, e: self.tensors(group)[e])

    def save(self, out: str | Path, *, overwrite: bool = False, progress: bool = False) -> Path:
        """As :meth:`model`, written as a folder, tensor by tensor."""
        return save_rewritten(
            self.deltas,
            lambda group, e: self.tensors(group)[e],
            out,
            self.receipt(),
            overwrite=overwrite,
            progress=progress,
        )
