"""Arithmetic on what experts learned: add, negate, combine, analogies, an expert of another run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from micro.deltas.deltas import ExpertDeltas, Group
from micro.deltas.merged import Merged

if TYPE_CHECKING:
    from torch import Tensor

Expert = str | int


def combine(
    deltas: ExpertDeltas, coefficients: Mapping[Expert, float], *, scale: float = 1.0, shared: float = 1.0
) -> Merged:
    """Weights base + scale * sum_e c_e tau_e.

    Args:
        deltas: the task vectors.
        coefficients: expert -> number; experts that are not named have 0.
        scale: of the whole sum; 0 gives the base's bits.
        shared: how much of what changed outside the experts is taken, see :class:`micro.deltas.Merged`.

    Returns:
        A :class:`micro.deltas.Merged`: ``.dense()``, ``.into(expert)`` and their ``save_``.

    Raises:
        ValueError: an unknown or repeated expert, or a number that is not finite.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", 2023: learning by addition, forgetting by negation.
    """
    import math

    indices = deltas.indices(list(coefficients), "coefficients")
    numbers = [float(value) for value in coefficients.values()]
    if not all(map(math.isfinite, [*numbers, scale, shared])):
        raise ValueError(f"coefficients, scale and shared must be finite, got {dict(coefficients)}, {scale}, {shared}")
    pairs = [(e, c) for e, c in zip(indices, numbers, strict=True) if c]

    def delta(group: Group) -> Tensor:
        import torch

        tau = deltas.tau(group)
        total = torch.zeros_like(tau[0])
        for e, c in pairs:
            total.add_(tau[e], alpha=c)
        return total

    terms = " ".join(f"{c:+g} {deltas.experts[e]}" for e, c in pairs) or "nothing"
    settings = {"coefficients": {deltas.experts[e]: c for e, c in pairs}}
    return Merged(deltas, delta, f"task arithmetic: base + {scale:g} * ({terms})", scale, shared, settings)


def add(deltas: ExpertDeltas, experts: Expert | Iterable[Expert], *, scale: float = 1.0, shared: float = 1.0) -> Merged:
    """Weights base + scale * (sum of the experts' deltas). Arguments as in :func:`combine`."""
    indices = deltas.indices([experts] if isinstance(experts, (str, int)) else experts, "experts")
    return combine(deltas, dict.fromkeys(indices, 1.0), scale=scale, shared=shared)


def negate(
    deltas: ExpertDeltas, experts: Expert | Iterable[Expert], *, scale: float = 1.0, shared: float = 1.0
) -> Merged:
    """Weights base - scale * (sum of the experts' deltas): the base moved away from what these experts learned.

    Written into the expert itself (``.into``) or made dense it forgets a domain; on other domains it should do little,
    which only a measurement tells.
    """
    return add(deltas, experts, scale=-scale, shared=shared)


def analogy(
    deltas: ExpertDeltas, a: Expert, b: Expert, c: Expert, *, scale: float = 1.0, shared: float = 1.0
) -> Merged:
    """The answer to "a is to b as c is to d": tau_d = tau_c + (tau_b - tau_a); an expert may stand in two places."""
    indices = [deltas.indices([expert], "analogy")[0] for expert in (a, b, c)]
    coefficients: dict[Expert, float] = {}
    for index, sign in zip(indices, (-1.0, 1.0, 1.0), strict=True):
        coefficients[index] = coefficients.get(index, 0.0) + sign
    merged = combine(deltas, coefficients, scale=scale, shared=shared)
    merged.how = "analogy: {} is to {} as {} is to this, scale {:g}".format(
        *(deltas.experts[i] for i in indices), scale
    )
    return merged


def graft(
    deltas: ExpertDeltas, other: ExpertDeltas, expert: Expert, *, scale: float = 1.0, shared: float = 1.0
) -> Merged:
    """Weights own base + scale * (delta of an expert of another run).

    Both should be deltas from the same base; with other bases the weights that the delta belongs to are missing.

    Raises:
        ValueError: the runs have other shapes.
    """
    index = other.indices([expert], "expert")[0]
    theirs = {(group.layer, group.name): group for group in other.groups}
    shapes = {(group.layer, group.name): group.shape for group in deltas.groups}
    if shapes != {key: group.shape for key, group in theirs.items()}:
        raise ValueError(f"graft: {other.mixture.name} has other layers or shapes than {deltas.mixture.name}")

    def delta(group: Group) -> Tensor:
        return other.tau(theirs[group.layer, group.name])[index]

    name = other.experts[index]
    settings = {"from": other.mixture.name, "from_base": other.base_name, "expert": name}
    return Merged(deltas, delta, f"{scale:+g} * {name} of {other.mixture.name}", scale, shared, settings)
