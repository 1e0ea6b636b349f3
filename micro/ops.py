"""The operators of the core as Python functions.

Thin on purpose: checks, dispatch and autograd live in C++ (csrc/ops).
"""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)
from micro.experts import BlockParameters, Plan, Routing


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


def rope_frequencies(head_dim: int, theta: float, scaling: tuple[float, float, float, float] | None = None) -> Tensor:
    """``f[i] = 1 / theta ** (2 * i / D)``, in this order, in float32.

    Args:
        head_dim: ``D``, even.
        theta: the base, positive.
        scaling: ``(factor, low, high, old context)`` of Llama 3: wavelengths below ``context / high`` stay, above
            ``context / low`` are divided by ``factor``, in between they are blended.

    Returns:
        ``[D / 2]`` float32 on the CPU.

    Raises:
        ValueError: ``head_dim`` is odd, or a number is not positive.

    Source: Su et al. (2021); Llama 3.1 (Grattafiori et al. 2024); model.md 2.2.
    """
    result: Tensor = torch.ops.micro.rope_frequencies(head_dim, theta, scaling)
    return result


def rope_table(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``position * frequency``, all in float32.

    Args:
        position_ids: ``[P]`` int64.
        frequencies: ``[D / 2]`` float32, on the same device.

    Returns:
        Two tensors ``[P, D / 2]`` float32. Round them to the model dtype where the family does so (Llama).

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not.
    """
    result: tuple[Tensor, Tensor] = torch.ops.micro.rope_table(position_ids, frequencies)
    return result


def rope(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Rotary position embedding, half-split pairing.

    ``(x[i], x[i + D/2]) -> (x[i] * cos - x[i + D/2] * sin, x[i + D/2] * cos + x[i] * sin)``

    Args:
        x: ``[..., T, heads, D]``, or ``[N, heads, D]`` with ``tokens``; float32, float64 or bfloat16.
        cos: ``[T, D / 2]`` float32 or float64, a constant.
        sin: like ``cos``.
        tokens: ``[N]`` int32, the table row of each row of ``x``.

    Returns:
        A tensor like ``x``, computed in float32 (float64 for float64) and rounded once. Differentiable once, in ``x``.

    Raises:
        ValueError: a shape, device or token does not fit.
        TypeError: a dtype does not.

    Source: Su et al. (2021), equation 34, with the pairing of GPT-NeoX and Llama; model.md 2.2.
    """
    result: Tensor = torch.ops.micro.rope(x, cos, sin, tokens)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``, computed in float32 (float64 for float64) and rounded once.

    Args:
        gate: ``[...]``, float32, float64 or bfloat16.
        up: same shape, dtype and device.

    Returns:
        A tensor like ``gate``. Differentiable once; the backward keeps only the two inputs.

    Raises:
        ValueError: shapes or devices differ.
        TypeError: a dtype does not fit.

    Source: Shazeer (2020), SwiGLU.
    """
    result: Tensor = torch.ops.micro.swiglu(gate, up)
    return result


def rms_norm(
    x: Tensor, gain: Tensor, expert: Tensor | None = None, *, eps: float, gain_in_float32: bool = False
) -> Tensor:
    """Root-mean-square norm with one gain vector per expert.

    ``y[t] = gain[expert[t]] * x[t] / sqrt(mean(x[t] ** 2) + eps)``

    Args:
        x: ``[..., H]``, float32, float64 or bfloat16.
        gain: ``[E, H]``, same dtype and device as ``x``.
        expert: ``[...]`` int32, the expert of each row. ``None``: ``E`` is 1, or ``x`` is ``[E, ..., H]`` (slice ``e``
            has gain ``e``) or ``[1, ..., H]`` (every expert reads it), and the result is ``[E, ..., H]``.
        eps: added to the mean square, without unit.
        gain_in_float32: round before the gain (``False``, Llama) or after it (``True``, OLMo-2).

    Returns:
        A tensor of the dtype of ``x``. Differentiable once, in ``x`` and ``gain``.

    Raises:
        ValueError: a shape, device or expert index does not fit.
        TypeError: a dtype does not.

    Source: MiCRo, block norms; Zhang and Sennrich (2019), equation 4.
    """
    result: Tensor = torch.ops.micro.rms_norm(x, gain, expert, eps, gain_in_float32)
    return result


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Language-model head and loss in one, in chunks over the target rows only.

    ``-log softmax(hidden[t] @ weight.T)[targets[t]]``, summed over ``targets[t] != ignore_index``. The logits of a
    chunk take at most 32 MiB; both gradients are formed in the same pass, and only where they are wanted.

    Args:
        hidden: ``[T, H]``, float32, float64 or bfloat16.
        weight: ``[V, H]``, same dtype and device; the embedding itself for a tied head.
        targets: ``[T]`` int64, already shifted.
        ignore_index: the target that does not count.

    Returns:
        The sum, a scalar in float32 (float64 for float64); 0 without target. Differentiable once, in ``hidden`` and
        ``weight``; the caller divides by its number of items.

    Raises:
        ValueError: a shape or device does not fit, or a target lies outside ``[0, V)``.
        TypeError: a dtype does not fit.

    Source: model.md 7.1; chunking as in Wijmans et al. (2024), Cut Your Losses.
    """
    result: Tensor = torch.ops.micro.cross_entropy(hidden, weight, targets, ignore_index)
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


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    previous: Tensor | None = None,
    min_new_tokens: int = 0,
    stop_ids: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """The next token of each row: the distribution of transformers' processors, in their order.

    Repetition penalty, stop ids, temperature, top-k, top-p, then a draw. It depends on the row's logits, seed and step
    and on nothing else in the batch: ``u`` in [0, 1) by Philox 4x32-10 (key = seed, counter = step), looked up in the
    probabilities summed in the order of ids. Computed in float32 (float64 for float64).

    Args:
        logits: ``[B, V]``, float32, float64 or bfloat16.
        temperature: 0 takes the largest logit, of equal ones the lowest id; ``top_k`` and ``top_p`` change nothing.
        top_k: the ``k`` largest and those equal to the last of them; 0: all.
        top_p: the largest that together have this share of the probability, at least one; 1: all.
        repetition_penalty: divides the logits of ``previous`` ids where they are positive, multiplies negative ones.
        previous: ``[B, P]`` int64, ids of each row so far; pad with -1, ids outside ``0 .. V - 1`` are skipped.
        min_new_tokens: rows with fewer ``steps`` than this get no stop id.
        stop_ids: ``[n]`` int64.
        seeds: ``[B]`` int64, one per row; needed with a temperature above 0. Rows of equal logits, seed and step get
            equal tokens.
        steps: ``[B]`` int64, tokens that each row has been given; needed with ``seeds`` or ``min_new_tokens``.

    Returns:
        ids int64 ``[B]``. NaN is chosen only in a row that holds nothing else. No gradient.

    Raises:
        ValueError: a shape, device or number does not fit, or an option lacks the tensor that it needs.
        TypeError: a dtype does not fit.

    Source: Fan et al. (2018), top-k; Holtzman et al. (2020), top-p; Keskar et al. (2019), repetition penalty; Salmon et
    al. (2011), Philox.
    """
    result: Tensor = torch.ops.micro.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        previous=previous,
        min_new_tokens=min_new_tokens,
        stop_ids=stop_ids,
        seeds=seeds,
        steps=steps,
    )
    return result


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The global norm of gradients, summed in float64 in an order that threads cannot change.

    Args:
        gradients: at least one tensor, float32, float64 or bfloat16, all on one device.

    Returns:
        A float64 scalar, not differentiable; NaN or infinite if any gradient is.

    Raises:
        ValueError: the list is empty, or devices differ.
        TypeError: a dtype does not fit.

    Source: Pascanu et al. (2013), clipping by the global norm.
    """
    result: Tensor = torch.ops.micro.gradient_norm(gradients)
    return result


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    masters: list[Tensor],
    *,
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gradient_scale: float = 1.0,
) -> None:
    """One step of AdamW with decoupled weight decay, in place, one pass over the memory of each tensor.

    Args:
        parameters: dense tensors of any shape, float32, float64 or bfloat16. Call it under ``no_grad``.
        gradients: same shapes and dtypes.
        first_moments: same shapes and layouts, float32 (float64 for float64); zero before step 1.
        second_moments: as ``first_moments``.
        masters: empty, or for bfloat16 parameters one float32 copy each, which carries the value.
        step: 1 for the first.
        learning_rate: not negative, as ``eps`` and ``weight_decay``.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: multiplied by the learning rate and taken from the value.
        gradient_scale: multiplies every gradient (clipping).

    Raises:
        ValueError: a number, shape, layout or device does not fit.
        TypeError: a dtype does not.

    Source: Loshchilov and Hutter (2019), algorithm 2.
    """
    torch.ops.micro.adamw_step(
        parameters,
        gradients,
        first_moments,
        second_moments,
        masters,
        step=step,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        gradient_scale=gradient_scale,
    )


def expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """One weight matrix per expert, rows in plan order.

    ``y[n] = weight[e] @ x[n]`` for ``offsets[e] <= n < offsets[e + 1]``

    Args:
        x: ``[N, in]``, float32, float64 or bfloat16.
        weight: ``[E, out, in]``, same dtype and device as ``x``. With ``E = 1`` and offsets ``[0, N]`` this is a plain
            linear map that is fast for one row, such as a head.
        offsets: ``[E + 1]`` int32, ascending from 0 to at most ``N`` (``plan().offsets``).

    Returns:
        ``[N, out]``; rows at ``n >= offsets[E]`` are 0. Differentiable once, in ``x`` and ``weight``; an expert without
        rows gets a zero gradient.

    Raises:
        ValueError: a shape, device or offset does not fit.
        TypeError: a dtype does not.

    Source: MiCRo, expert blocks (model.md 2.6).
    """
    result: Tensor = torch.ops.micro.expert_linear(x, weight, offsets)
    return result


def stacked_linear(x: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Every token through every expert that is used: keys and values.

    ``y[e, t] = weight[e] @ x[e, t]``

    Args:
        x: ``[E, T, in]``, or ``[1, T, in]`` which every expert reads; float32, float64 or bfloat16.
        weight: ``[E, out, in]``, same dtype and device as ``x``.
        offsets: ``[E + 1]`` int32 (``plan().offsets``): experts with ``offsets[e] == offsets[e + 1]`` are skipped,
            their output and gradients are 0. ``None``: every expert is used.

    Returns:
        ``[E, T, out]``. Differentiable once, in ``x`` and ``weight``.

    Raises:
        ValueError: a shape, device or offset does not fit.
        TypeError: a dtype does not.

    Source: MiCRo, keys and values of all experts (model.md 2.6).
    """
    result: Tensor = torch.ops.micro.stacked_linear(x, weight, offsets)
    return result


def expert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    *,
    slots: int,
    start: int = 0,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Some queries, all keys of their expert, causal by slot.

    ``out[n, a] = softmax_j(scale * q[n, a] . k[b, e, g, j]) @ v[b, e, g]`` with ``g = a // (A // G)``, for row ``n`` of
    expert ``e``. Token ``t = tokens[n]`` stands in row ``b = t // slots`` at slot ``start + t % slots`` and sees the
    key slots up to its own.

    Args:
        q: ``[N, A, D]`` in plan order, float32, float64 or bfloat16; ``D`` at most 256; a size that is
            no multiple of 8 costs a copy of q, k and v.
        k: ``[B, E, G, J, D]``, same dtype and device; any strides with ``D`` contiguous (else a copy is made). ``J``
            may be larger than ``start + slots``, as in a static cache; slots that nobody may see are never read.
        v: like ``k``.
        tokens: ``[N]`` int32, ascending within each expert (``plan().tokens``).
        offsets: ``[E + 1]`` int32 (``plan().offsets``).
        slots: ``S``, slots of this call.
        start: ``C``, slots cached before it.
        mask: ``None``; bool ``[B, J]``, true where the slot is real (a query at a slot that is not real sees nothing);
            or ``[B, S, J]`` or ``[1, S, J]``, bool (true = visible) or floating (added to the scores), which replace
            the causal rule. The mask gets no gradient.
        scale: ``None`` is ``1 / sqrt(D)``.

    Returns:
        ``[N, A, D]``; idle rows and queries that see no key are 0. Differentiable once, in ``q``, ``k`` and ``v``.
        The softmax runs in float32 (float64 for float64); nothing of size ``S x J`` is stored. A query's result does
        not depend on the other queries, on the split of a sequence into calls or on the number of threads.

    Raises:
        ValueError: a shape, device, token or offset does not fit.
        TypeError: a dtype does not.

    Source: MiCRo, routed attention (model.md 2.6, 2.7); online softmax: Milakov and Gimelshein (2018).
    """
    result: Tensor = torch.ops.micro.expert_attention(q, k, v, tokens, offsets, slots, start, mask, scale)
    return result


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
        As :func:`block_forward`. Differentiable once, from all but ids, to ``x``, the parameters and ``bias``: bit for
        bit the gradients of the separate operators. An expert without tokens gets a zero gradient.

    Raises:
        ValueError: a shape, device, id, ``k`` or the policy does not fit.
        TypeError: a dtype does not.

    Source: model.md 2.4 - 2.8, 2.10; no gathered copies: SonicMoE, Guo et al. (2025).
    """
    y, raw, *routing = torch.ops.micro.block_train(
        x, parameters, cos, sin, heads, eps, slots, mask, real, k, (rows, bias, ablate, force, replay), weight_rule,
        run_router, activations,
    )  # fmt: skip
    return y, raw if run_router or rows is None else None, Routing(*routing)
