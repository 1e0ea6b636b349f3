"""The optimiser."""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)


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
