"""What decides a score, as text: a model's weights, the controls of a call, the contexts that are open around it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from micro.interventions.session import Session, active
from micro.modeling.controls import ACTIVE, Phases

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@torch.no_grad()
def model_fingerprint(model: Any) -> str:
    """Of the config and the bits of every parameter, row by row: integer sums, so it does not depend on device or
    threads, and a training step or an exchange of experts changes it. Not made against forgery.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        bits = parameter.detach().contiguous().reshape(-1, parameter.shape[-1] if parameter.dim() else 1)
        rows = bits.view(_INTEGERS[bits.element_size()]).sum(-1, dtype=torch.int64)
        digest.update(
            repr((name, tuple(parameter.shape), str(parameter.dtype))).encode() + rows.cpu().numpy().tobytes()
        )
    return digest.hexdigest()


def comparable(value: Any) -> Any:
    """A control as JSON types; tensors by their content.

    Raises:
        TypeError: a callable or another object whose content cannot be compared.
    """
    if isinstance(value, torch.Tensor):
        bytes_ = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(bytes_).hexdigest()]
    if isinstance(value, Phases):
        return ["phases", comparable(value.prompt), comparable(value.answer)]
    if isinstance(value, Mapping):
        return {str(key): comparable(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(comparable(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [comparable(inner) for inner in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(
        f"controls: {value!r} of type {type(value).__name__} cannot be compared between runs; give names, numbers or "
        "tensors"
    )


def steering_contexts() -> list[tuple[str, Any]]:
    """Name and value of every ``micro.steering`` context that is open, outermost first."""
    return list(ACTIVE.get())


def open_session(model: Any) -> Session | None:
    """The ``model.intervene`` block that is open around a model."""
    return active(getattr(model, "model", model))
