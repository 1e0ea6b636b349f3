"""The parts of a layer: linear maps, norms, rotation, attention, the gated unit."""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)


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
