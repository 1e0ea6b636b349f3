"""The experts' names, and the two records that pass between the operators of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

# Order, data labels, brain networks, colours and letter marks of the four experts (model.md 1.2). The order is fixed in
# checkpoints, labels, cache slots and ablation.
NAMES = ("logic", "social", "world", "language")
LABELS = ("MD", "ToM", "DMN", "LN")
NETWORKS = ("multiple demand", "theory of mind", "default mode", "language network")
COLOURS = ("#4285F4", "#FFAB40", "#A64D79", "#97D077")
MARKS = ("M", "S", "W", "L")  # readable without colour; logic has M, of multiple demand
DISPLAY_ORDER = (3, 0, 1, 2)  # figures show language, logic, social, world


class Routing(NamedTuple):
    """A routing decision for T tokens (model.md 2.3).

    ids: int32 [T,K], descending by probability; weights: [T,K] in the model dtype;
    probs, effective: [T,E] float32 (float64 for float64): probabilities, and the logits after steering.
    """

    ids: Tensor
    weights: Tensor
    probs: Tensor
    effective: Tensor


class Plan(NamedTuple):
    """Routed pairs sorted by expert. N = T*K rows, always; rows at n >= offsets[E] are idle and not computed.

    tokens: int32 [N], token of each row; experts: int32 [N], its expert; offsets: int32 [E+1], first row of each
    expert; inverse: int32 [T,K], row of each pair.
    """

    tokens: Tensor
    experts: Tensor
    offsets: Tensor
    inverse: Tensor


def default_names(num_experts: int) -> list[str]:
    """The four names for E = 4, otherwise ``expert_0 ...`` (model.md 1.2)."""
    return list(NAMES) if num_experts == len(NAMES) else [f"expert_{e}" for e in range(num_experts)]
