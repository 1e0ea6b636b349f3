"""Steering as the engine takes it: tensors per phase, in the axes of the full forms (model.md 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from micro.modeling.controls import ExpertNames, PerStep, window
from micro.modeling.steer import Steering

ControlTensors = dict[str, Tensor]
_MERGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ablate": torch.logical_or,
    "bias": torch.add,
    "force": lambda outer, inner: torch.where(inner >= 0, inner, outer),
}


def padded_labels(labels: Any) -> Tensor | None:
    """routing_labels as a tensor: lists of unequal length are filled up at their ends."""
    if labels is None or isinstance(labels, Tensor):
        return labels
    rows = [list(row) if isinstance(row, Sequence) else row for row in labels]
    if not all(isinstance(row, list) for row in rows):
        return torch.tensor(rows)
    longest = max(map(len, rows), default=0)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def call_controls(steering: Steering, rows: int, slots: int) -> ControlTensors:
    """Controls of one call of ``slots`` slots: S axes cover exactly these, or are 1."""
    return _tensors(steering, rows, 0, slots, None)


def prompt_controls(steering: Steering, rows: int, slots: int) -> ControlTensors:
    """Controls while a prompt is read; ``slots``: length of the longest."""
    return _tensors(steering, rows, 0, slots, slots)


def answer_controls(steering: Steering, rows: int, slots: int, step: int) -> ControlTensors:
    """Controls of the forward pass of new token number ``step`` (from 1) behind prompts of up to ``slots`` slots."""
    return _tensors(steering, rows, slots + step - 1, slots + step, slots)


def changes_by_step(steering: Steering) -> bool:
    """Whether a control is a function of (row, step)."""
    return any(isinstance(c, PerStep) for name in _MERGE for c in getattr(steering, name))


def _tensors(steering: Steering, rows: int, first: int, last: int, prompt: int | None) -> ControlTensors:
    if steering.weights is not None or steering.replay is not None:
        raise ValueError("the engine takes no routing_weights and no replay; use the model's forward() or generate()")
    out: ControlTensors = {}
    for name, merge in _MERGE.items():
        merged = None
        for control in getattr(steering, name):
            part = window(name, control, first, last, prompt, steering.step_reader(rows)).cpu()
            merged = part if merged is None else merge(merged, part)
        if merged is not None:
            out[name] = merged.detach().contiguous()
    if "bias" in out:
        out["bias"] = out["bias"].to(torch.promote_types(out["bias"].dtype, torch.float32))
    labels = _labels(steering, first, prompt)
    return out if labels is None else {**out, "labels": labels}


def _labels(steering: Steering, first: int, prompt: int | None) -> Tensor | None:
    """Labels [B,S] of the call or the prompt, or [B,1] for all slots; those of a prompt end with it."""
    labels = steering.labels
    if not steering.by_labels or labels is None:
        return None
    language = ExpertNames(steering.config).language()
    labels = labels.cpu()
    if language is not None:
        labels = torch.where(labels == -1, language, labels)
    if labels.dim() == 1:
        return labels[:, None].contiguous()
    return labels.contiguous() if prompt is None or first < prompt else None
