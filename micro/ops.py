"""The operators of the core as Python functions.

Thin on purpose: checks, dispatch and autograd live in C++ (csrc/ops).
"""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)
from micro.testing.reference import *  # noqa: F403  (bridge: what the core does not have yet)


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
