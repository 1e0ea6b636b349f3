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
