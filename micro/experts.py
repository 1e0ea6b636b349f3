"""The experts' names, and the records that pass between the operators of a layer."""

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


class BlockParameters(NamedTuple):
    """The parameters of one layer (model.md 2.4, 2.5, 2.12). E experts; what FFN experts share (attention and norms)
    has no axis E.

    q_proj [E,A*D,H], k_proj and v_proj [E,G*D,H], o_proj [E,H,A*D], gate_proj and up_proj [E,F,H], down_proj [E,H,F];
    router_in [R,H] and router_out [E,R], or None and one folded map [E,H] in float32 (float64 for float64);
    post_attention_norm [E,H]; input_norm [E,H] (Llama), or post_ffn_norm [E,H], q_norm [E,A*D] and k_norm [E,G*D]
    (OLMo-2).
    """

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    router_in: Tensor | None
    router_out: Tensor
    input_norm: Tensor | None
    post_attention_norm: Tensor
    post_ffn_norm: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def default_names(num_experts: int) -> list[str]:
    """The four names for E = 4, otherwise ``expert_0 ...`` (model.md 1.2)."""
    return list(NAMES) if num_experts == len(NAMES) else [f"expert_{e}" for e in range(num_experts)]
