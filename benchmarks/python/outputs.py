"""Outputs first: what two sides computed is compared before either is timed; a difference ends the measurement."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "tests" / "python"))

from tolerances import BENCHMARK


class MismatchError(Exception):
    """Two sides gave different results; nothing was timed."""


def compare(what: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of each output that both sides have, as a share; whole numbers must be equal."""
    common = [name for name in got if name in want]
    if not common:
        raise MismatchError(f"{what}: the sides have no output in common ({sorted(got)} and {sorted(want)})")
    found = {}
    for name in common:
        a, b = got[name], want[name]
        if a.shape != b.shape:
            raise MismatchError(
                f"{what}: {name} has shape {list(a.shape)} on one side and {list(b.shape)} on the other"
            )
        found[name] = float((a != b).double().mean()) if not a.is_floating_point() else _difference(a, b)
        bound = BENCHMARK[dtype] if a.is_floating_point() else 0.0
        if not found[name] <= bound:
            raise MismatchError(f"{what}: {name} differs by {found[name]:.3g}, allowed is {bound:g}; nothing was timed")
    return found


def _difference(got: Tensor, want: Tensor) -> float:
    """Of vectors along the last axis: the largest distance relative to the length of what is wanted."""
    a, b = torch.atleast_1d(got).double(), torch.atleast_1d(want).double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())
