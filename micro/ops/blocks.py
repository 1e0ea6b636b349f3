"""Whole layers in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)
from micro.experts import BlockParameters, Routing


def block_forward(
    x: Tensor,
    parameters: BlockParameters,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    whole_block: bool,
    eps: float,
    slots: int,
    start: int = 0,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    mask: Tensor | None = None,
    real: Tensor | None = None,
    k: int = 1,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ablate: Tensor | None = None,
    force: Tensor | None = None,
    replay: Tensor | None = None,
    weight_rule: str = "renormalized",
    run_router: bool = True,
) -> tuple[Tensor, Tensor | None, Routing]:
    """One whole layer without gradient, on the CPU: bit for bit what the separate operators give in their order,
    without the memory traffic and the calls between them.

    Args:
        x: ``[B, S, H]`` or ``[T, H]`` with ``T = B * S``, float32, float64 or bfloat16.
        parameters: of the layer, in the dtype of ``x``.
        cos: ``[T, D / 2]`` float32 (float64 for float64); ``D`` is a multiple of 8, at most 256.
        sin: like ``cos``.
        heads: ``A``, query heads; the number of key heads follows from ``k_proj``.
        whole_block: experts are whole blocks; ``False``: feed-forward parts under one attention.
        eps: of the norms.
        slots: ``S``, slots of this call.
        start: ``C``, slots cached before it.
        keys: ``[B, E, G, J, D]`` (FFN experts: ``[B, 1, G, J, D]``) with at least ``C + S`` slots, any strides with
            ``D`` contiguous. Slots ``C .. C + S - 1`` are written in place, the others read. ``None``: no cache;
            experts that nobody uses get no keys.
        values: like ``keys``.
        mask: as for :func:`expert_attention`, over ``C + S`` slots.
        real: ``[T]`` bool, False at padded tokens: their experts are not computed.
        k: experts per token, ``1 .. E``.
        rows: as for :func:`route`, like ``bias``, ``ablate``, ``force``, ``replay`` and ``weight_rule``.
        bias: see ``rows``.
        ablate: see ``rows``.
        force: see ``rows``.
        replay: see ``rows``.
        weight_rule: see ``rows``.
        run_router: with ``rows``: run the router although it decides nothing, for its logits.

    Returns:
        A tensor like ``x``; the router's logits ``[T, E]`` or ``None`` where it did not run; the decision.

    Raises:
        ValueError: a shape, device, id or ``k`` does not fit.
        TypeError: a dtype does not.
        RuntimeError: a gradient is wanted.

    Source: model.md 2.4 - 2.8, 2.12.
    """
    y, raw, *routing = torch.ops.micro.block_forward(
        x, parameters, cos, sin, heads, whole_block, eps, slots, start, keys, values, mask, real, k,
        (rows, bias, ablate, force, replay), weight_rule, run_router,
    )  # fmt: skip
    return y, raw if run_router or rows is None else None, Routing(*routing)


def block_train(
    x: Tensor,
    parameters: BlockParameters,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    eps: float,
    slots: int,
    mask: Tensor | None = None,
    real: Tensor | None = None,
    k: int = 1,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ablate: Tensor | None = None,
    force: Tensor | None = None,
    replay: Tensor | None = None,
    weight_rule: str = "renormalized",
    run_router: bool = True,
    activations: str = "save",
) -> tuple[Tensor, Tensor | None, Routing]:
    """:func:`block_forward` of whole-block experts without a cache, with a gradient: one node for the layer.

    It keeps ``x``, the decision, rotated queries, keys and values, what attention gave, the row behind attention, and
    with ``activations="save"`` also gate and up in front of the gated unit. Norms, gathered rows and gated units are
    computed again in the backward pass; experts' outputs are kept only where a gradient reads them (``k`` above 1,
    OLMo-2). ``"recompute"`` runs the products of the feed-forward part once more.

    Args:
        x: as for :func:`block_forward`, like all arguments that it has; ``parameters.router_in`` is given.
        parameters: see ``x``.
        cos: see ``x``.
        sin: see ``x``.
        heads: see ``x``.
        eps: see ``x``.
        slots: see ``x``.
        mask: see ``x``.
        real: see ``x``.
        k: see ``x``.
        rows: see ``x``.
        bias: see ``x``.
        ablate: see ``x``.
        force: see ``x``.
        replay: see ``x``.
        weight_rule: see ``x``.
        run_router: see ``x``.
        activations: ``save`` or ``recompute``.

    Returns:
        As :func:`block_forward`. Differentiable once, from all but ids, to ``x``, the parameters and ``bias``: the
        gradients of the separate operators, on the CPU bit for bit, on CUDA to rounding. An expert without tokens gets
        a zero gradient.

    Raises:
        ValueError: a shape, device, id, ``k`` or the policy does not fit.
        TypeError: a dtype does not.
        NotImplementedError: an OLMo-2 layer on CUDA; its separate operators have gradients there.

    Source: model.md 2.4 - 2.8, 2.10; no gathered copies: SonicMoE, Guo et al. (2025).
    """
    y, raw, *routing = torch.ops.micro.block_train(
        x, parameters, cos, sin, heads, eps, slots, mask, real, k, (rows, bias, ablate, force, replay), weight_rule,
        run_router, activations,
    )  # fmt: skip
    return y, raw if run_router or rows is None else None, Routing(*routing)
