"""Routing decisions, the plan, and the losses over them."""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)
from micro.experts import Plan, Routing


def route(
    logits: Tensor | None,
    k: int,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ablate: Tensor | None = None,
    force: Tensor | None = None,
    replay: Tensor | None = None,
    weight_rule: str = "renormalized",
) -> Routing:
    """Router logits to a routing decision, with steering.

    ``p = softmax(logits + bias)`` with ``-inf`` where ablated; the ``k`` largest, of equal ones the lower id; their
    weights. Softmax, selection and weights are computed in float32 (float64 for float64).

    Args:
        logits: ``[T, E]``, float32, float64 or bfloat16. ``None`` only together with ``rows``.
        k: experts per token, ``1 .. E``.
        rows: ``[T, E]`` floating, finite, not negative, positive sum: taken in place of the softmax, without gradient.
            They win over everything below.
        bias: ``[T | 1, E]`` float32 or float64, added to the logits. Differentiable.
        ablate: ``[T | 1, E]`` bool, the logit becomes ``-inf``.
        force: ``[T | 1]`` int32, the expert the token goes to; ``-1``: free. Wins over bias and ablation.
        replay: ``[T, K]`` int32, ids to take as they are; their weights are computed anew.
        weight_rule: ``renormalized`` (``q / sum q``; its gradient in closed form, exactly 0 for ``k = 1`` in float32),
            ``probability`` (``q``) or ``straight_through`` (``q / sum q`` with the gradient of ``q``).

    Returns:
        ids int32 ``[T, K]``, weights ``[T, K]`` in the dtype of the logits, probs and effective logits ``[T, E]``. NaN
        ranks below ``-inf``; a row without a number gives ids ``0, 1, ..`` and NaN weights. Differentiable once, from
        weights, probs and effective to logits and bias; 0 at ablated experts and for forced tokens.

    Raises:
        ValueError: a shape, device, id, ``k`` or the rule does not fit.
        TypeError: a dtype does not.

    Source: model.md 2.3, 2.10, 4.3; MiCRo, token-level router; ``probability``: Fedus et al. (2022), Switch.
    """
    if logits is None and rows is None:  # without a tensor there is no device to dispatch on
        raise ValueError("micro::route: logits or rows must be given")
    return Routing(*torch.ops.micro.route(logits, k, rows, bias, ablate, force, replay, weight_rule))


def plan(ids: Tensor, num_experts: int, weights: Tensor | None = None, mask: Tensor | None = None) -> Plan:
    """Routed pairs sorted by expert: a stable counting sort, so tokens of one expert stay in slot order.

    Args:
        ids: ``[T, K]`` int32, in ``0 .. num_experts - 1``.
        num_experts: ``E``.
        weights: ``[T, K]``, float32, float64 or bfloat16: pairs of weight 0 are idle.
        mask: ``[T]`` bool, False at padded tokens: their pairs are idle.

    Returns:
        tokens and experts int32 ``[N]``, offsets int32 ``[E + 1]``, inverse int32 ``[T, K]``; ``N = T * K`` whatever
        the ids are. Idle pairs stand at rows ``n >= offsets[E]``. No gradient.

    Raises:
        ValueError: a shape or device does not fit, or an id lies outside ``[0, E)``.
        TypeError: a dtype does not.

    Source: model.md 2.8; the sorted layout of MegaBlocks, Gale et al. (2023).
    """
    return Plan(*torch.ops.micro.plan(ids, num_experts, weights, mask))


def permute(x: Tensor, tokens: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """Token rows in plan order: ``x[tokens]``, 0 for idle rows.

    Args:
        x: ``[T, H]``, float32, float64 or bfloat16.
        tokens: ``[N]`` int32, ``plan.tokens``.
        offsets: ``[E + 1]`` int32, ``plan.offsets``.
        inverse: ``[T, K]`` int32, ``plan.inverse``.

    Returns:
        ``[N, H]``. Differentiable once, in ``x``: a token's K rows are added by rank, in float32 (float64 for
        float64), and rounded once.

    Raises:
        ValueError: a shape, device or index does not fit.
        TypeError: a dtype does not.
    """
    result: Tensor = torch.ops.micro.permute(x, tokens, offsets, inverse)
    return result


def combine(y: Tensor, weights: Tensor, experts: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """Weighted sum of a token's expert outputs, back in token order.

    ``out[t] = sum_i y[inverse[t, i]] * weights[t, i]``, experts ascending, from 0; each product and each sum is rounded
    to the dtype of ``y``. Idle pairs add nothing.

    Args:
        y: ``[N, H]`` in plan order, float32, float64 or bfloat16.
        weights: ``[T, K]``, any floating dtype, rounded to that of ``y`` before use.
        experts: ``[N]`` int32, ``plan.experts``.
        offsets: ``[E + 1]`` int32, ``plan.offsets``.
        inverse: ``[T, K]`` int32, ``plan.inverse``.

    Returns:
        ``[T, H]``. Differentiable once, in ``y`` and ``weights``; idle pairs get exactly 0.

    Raises:
        ValueError: a shape, device or index does not fit.
        TypeError: a dtype does not.

    Source: model.md 2.8.
    """
    result: Tensor = torch.ops.micro.combine(y, weights, experts, offsets, inverse)
    return result


def load_balancing_loss(probs: Tensor, ids: Tensor, mask: Tensor | None = None, *, pooled: bool = True) -> Tensor:
    """Load balancing of the routers: ``E * sum_k sum_e f[k, e] P[e]``.

    ``f``: share of real tokens whose k-th choice is ``e``; ``P``: mean probability. K for uniform routing.

    Args:
        probs: ``[L, T, E]``, float32 or float64.
        ids: ``[L, T, K]`` int32, the experts chosen.
        mask: ``[T]`` bool, true for a real token.
        pooled: one pool over layers and tokens (Mixtral), or per layer and then the mean over layers (Switch).

    Returns:
        A scalar like ``probs``; 0 without a real token. Differentiable once, in ``probs``.

    Raises:
        ValueError: a shape, device or expert id does not fit.
        TypeError: a dtype does not.

    Source: model.md 7.2; Jiang et al. (2024), Mixtral; Fedus et al. (2022), Switch, equation 4.
    """
    result: Tensor = torch.ops.micro.load_balancing_loss(probs, ids, mask, pooled)
    return result


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and real tokens of ``logsumexp(logits) ** 2``, which keeps router logits small.

    Args:
        logits: ``[L, T, E]``, float32, float64 or bfloat16, before steering.
        mask: ``[T]`` bool, true for a real token.

    Returns:
        A scalar in float32 (float64 for float64); 0 without a real token. Differentiable once, in ``logits``.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not.

    Source: model.md 7.3; Zoph et al. (2022), ST-MoE, equation 5.
    """
    result: Tensor = torch.ops.micro.z_loss(logits, mask)
    return result


def label_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, layer_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the routers against token labels, summed over tokens, weighted mean over layers.

    Args:
        logits: ``[L, T, E]``, float32, float64 or bfloat16, before steering.
        labels: ``[T]`` int64, expert ids; negative: no label.
        mask: ``[T]`` bool, true for a real token.
        layer_weights: ``[L]``, without gradient; ``None``: every layer counts 1.

    Returns:
        A scalar in float32 (float64 for float64), to be divided by the number of labelled tokens. Differentiable once,
        in ``logits``.

    Raises:
        ValueError: a shape or device does not fit, or a label is ``E`` or more.
        TypeError: a dtype does not fit.

    Source: model.md 7.4.
    """
    result: Tensor = torch.ops.micro.label_loss(logits, labels, mask, layer_weights)
    return result


def routing_entropy(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Decision entropy: mean over real tokens of ``-sum p log p``, natural logarithm.

    Args:
        probs: ``[..., T, E]``, float32 or float64.
        mask: ``[T]`` bool, true for a real token.

    Returns:
        ``[...]``, one mean per leading index (per layer); 0 without a real token. Differentiable once, in ``probs``,
        with gradient 0 where a probability is 0.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not.

    Source: model.md 7.5.
    """
    result: Tensor = torch.ops.micro.routing_entropy(probs, mask)
    return result
