"""Operators behind ``model.intervene``: rows with some elements changed, streaming moments of rows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Change = Literal["zero", "scale", "shift", "replace"]


def intervene(
    x: Tensor,
    change: Change,
    *,
    touched: Tensor | None = None,
    experts: Tensor | None = None,
    columns: Tensor | None = None,
    value: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Rows with some elements changed: 0, ``x * v``, ``x + v`` or ``v``; everything else keeps its bits.

    Args:
        x: ``[N, W]``, float32, float64 or bfloat16.
        change: what happens.
        touched: bool ``[N]``, the rows that are changed; None: all.
        experts: int32 ``[N]``, in ``[0, E')`` where the row is touched; None: 0.
        columns: bool ``[E', W]``, the columns that are changed; None: all.
        value: ``[R or 1, W or 1]`` of x's dtype, for all but "zero": v is ``value[index]`` or, without an index,
            ``value[experts]``.
        index: int64 ``[N]``, in ``[0, R)`` where the row is touched: rows of another run.

    Returns:
        ``[N, W]``. Differentiable once, in ``x`` and ``value``; the gradient of ``value`` is added up in a fixed order,
        in float32 (float64 for float64).

    Raises:
        ValueError: a shape, device, expert or index does not fit.
        TypeError: a dtype does not.

    Source: model.md 9.3 and 9.5 (ablation, lesions); Vig et al. 2020, Geiger et al. 2021 (interchange of activations).
    """
    result: Tensor = torch.ops.micro.intervene(x, change, touched, experts, columns, value, index)
    return result


def moments_(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    scatter: Tensor | None = None,
    *,
    touched: Tensor | None = None,
    experts: Tensor | None = None,
) -> None:
    """Take rows into streaming moments, in place.

    Args:
        x: ``[N, W]``, float32, float64 or bfloat16.
        count: float64 ``[E']``, as the next three; all zero at the start.
        mean: ``[E', W]``.
        m2: ``[E', W]``, sums of squared deviations from the mean; the variance is ``m2 / (count - 1)``.
        scatter: ``[E', W, W]``, sums of products of deviations, or None.
        touched: bool ``[N]``, the rows that are taken in; None: all.
        experts: int32 ``[N]``, in ``[0, E')`` where the row is taken in; None: 0.

    Raises:
        ValueError: a shape, device or expert does not fit, or a state is not contiguous.
        TypeError: a dtype does not.

    Source: Welford 1962; Chan, Golub, LeVeque 1979. On the CPU rows are taken in one by one, so that the cut into calls
    changes no bit of count, mean and m2.
    """
    torch.ops.micro.moments_(x, count, mean, m2, scatter, touched, experts)
