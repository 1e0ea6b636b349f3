"""The controls that a user may give to one call, from any of their forms to tensors (model.md 4.2).

Full forms are tensors ``[B|1, L|1, S|1, E]`` (force: without the last axis). Short forms name experts. In ``generate``
a control may also be :class:`Phases` or a callable ``f(row, step)``.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from micro.experts import LABELS, NAMES, NETWORKS
from micro.modeling.config import MiCRoConfig

NAMES_OF_CONTROLS = ("ablate", "keep", "bias", "force")

# Controls of the context managers that are open in this thread, outermost first: (control, value).
ACTIVE: ContextVar[tuple[tuple[str, Any], ...]] = ContextVar("micro_steering", default=())


@dataclass(frozen=True)
class Phases:
    """Two values of one control in ``generate``: one for the prompt, one for the answer. None = free."""

    prompt: Any = None
    answer: Any = None


@dataclass(frozen=True)
class TensorPhases:
    """:class:`Phases` after normalisation."""

    prompt: Tensor | None
    answer: Tensor | None


StepFunction = Callable[[int, int], Any]


@dataclass(frozen=True)
class PerStep:
    """A callable control: ``function(row, step)`` gives a short form for that row; step 0 is the prompt, step n the
    forward pass of the n-th new token.
    """

    name: str
    function: StepFunction


Control = Tensor | TensorPhases | PerStep


class ExpertNames:
    """What an expert may be called: index, name, and for the four named experts data label and network, in any case."""

    def __init__(self, config: MiCRoConfig) -> None:
        self.config = config
        self.names = list(config.expert_names or [])
        self.aliases: dict[str, int] = {}
        for e, name in enumerate(self.names):
            self.aliases[name.lower()] = e
            if name.lower() in NAMES:
                known = NAMES.index(name.lower())
                self.aliases.setdefault(LABELS[known].lower(), e)
                self.aliases.setdefault(NETWORKS[known].lower(), e)

    def one(self, value: Any, what: str) -> int | None:
        """Index of one expert; None for "none", the empty string and None."""
        if value is None:
            return None
        if isinstance(value, str):
            key = value.strip().lower()
            if key in ("", "none"):
                return None
            if key not in self.aliases:
                raise ValueError(f"{what}: unknown expert {value!r}; known are {', '.join(self._known())}")
            return self.aliases[key]
        if isinstance(value, bool):
            raise TypeError(f"{what}: {value!r} is no expert; give a name or an index")
        try:
            index = operator.index(value)
        except TypeError:
            raise TypeError(f"{what}: {value!r} is no expert; give a name or an index") from None
        if not 0 <= index < self.config.num_experts:
            raise ValueError(f"{what}: expert {index} is outside 0..{self.config.num_experts - 1}")
        return index

    def many(self, value: Any, what: str) -> list[int]:
        """Indices of one set of experts: a name, an index, or a collection of them."""
        members = list(value) if _is_collection(value) else [value]
        return [e for e in (self.one(member, what) for member in members) if e is not None]

    def language(self) -> int | None:
        """The expert that label -1 means."""
        return self.aliases.get(NAMES[-1])

    def _known(self) -> list[str]:
        return [f"{e} = {name}" for e, name in enumerate(self.names)] + sorted(set(self.aliases) - {*self.names})


def _is_collection(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, Tensor))


def _is_rows(value: Any) -> bool:
    """A list is one value per row if any element is itself a collection or a mapping; otherwise it is one set."""
    return isinstance(value, (list, tuple)) and any(_is_collection(v) or isinstance(v, Mapping) for v in value)


class ControlReader:
    """Reads the forms of ablate, keep, bias and force for one config."""

    def __init__(self, config: MiCRoConfig) -> None:
        self.config, self.names = config, ExpertNames(config)

    def read(self, name: str, value: Any) -> Control | None:
        """One control in any form; None where it says nothing."""
        if value is None:
            return None
        if isinstance(value, Phases):
            parts = [self._phase(name, part, value) for part in (value.prompt, value.answer)]
            return TensorPhases(*parts)
        if callable(value):
            return PerStep(name, value)
        return self.tensor(name, value)

    def _phase(self, name: str, part: Any, whole: Phases) -> Tensor | None:
        if isinstance(part, Phases) or callable(part):
            raise TypeError(f"{name}: Phases holds plain values, got {part!r}")
        tensor = None if part is None else self.tensor(name, part)
        if tensor is not None and part is whole.answer and tensor.shape[2] != 1:
            raise ValueError(f"{name}: the answer's control has {tensor.shape[2]} slots; it must hold for all (axis 1)")
        return tensor

    def tensor(self, name: str, value: Any) -> Tensor:
        """A plain value as the full form: ablate and keep bool (True = ablated), bias float, force int64."""
        if isinstance(value, Tensor):
            return self._full_form(name, value)
        if isinstance(value, Mapping) and (name != "bias" or self._maps_layers(value)):
            return self._per_layer(name, value)
        if (name != "force" and _is_rows(value)) or (name in ("force", "bias") and isinstance(value, (list, tuple))):
            if not value:
                raise ValueError(f"{name}: the list of rows is empty")
            return torch.cat([self._one_row(name, row) for row in value])
        return self._one_value(name, value)

    def _one_row(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Mapping) and (name != "bias" or self._maps_layers(value)):
            return self._per_layer(name, value)
        return self._one_value(name, value)

    def _maps_layers(self, value: Mapping[Any, Any]) -> bool:
        return bool(value) and all(isinstance(inner, Mapping) for inner in value.values())

    def _one_value(self, name: str, value: Any) -> Tensor:
        experts = self.config.num_experts
        if name == "force":
            chosen = self.names.one(value, name)
            return torch.full((1, 1, 1), -1 if chosen is None else chosen, dtype=torch.int64)
        if name == "bias":
            return self._bias(value)
        tensor = torch.full((1, 1, 1, experts), name == "keep", dtype=torch.bool)
        tensor[..., self.names.many(value, name)] = name == "ablate"
        return tensor

    def _bias(self, value: Any) -> Tensor:
        if not isinstance(value, Mapping):
            raise TypeError(f"bias: expected {{name: number}} or a float tensor of rank 4, got {type(value).__name__}")
        tensor = torch.zeros(1, 1, 1, self.config.num_experts)
        for key, number in value.items():
            if not isinstance(number, numbers.Real):
                raise TypeError(f"bias: the value of {key!r} must be a number, got {number!r}")
            if (expert := self.names.one(key, "bias")) is not None:
                tensor[..., expert] += float(number)
        return tensor

    def _per_layer(self, name: str, value: Mapping[Any, Any]) -> Tensor:
        layers = self.config.num_hidden_layers
        free = self._one_value("ablate", None) if name in ("ablate", "keep") else None
        if free is None:
            free = self._one_value(name, {} if name == "bias" else None)
        tensor = free.repeat(1, layers, *[1] * (free.dim() - 2))
        for layer, inner in value.items():
            try:
                index = operator.index(layer)
            except TypeError:
                raise TypeError(f"{name}: {layer!r} is no layer number; a mapping goes from layer to experts") from None
            if not 0 <= index < layers:
                raise ValueError(f"{name}: layer {index} is outside 0..{layers - 1}")
            tensor[:, index] = self._one_value(name, inner)[:, 0]
        return tensor

    def _full_form(self, name: str, value: Tensor) -> Tensor:
        rank, layers, experts = (3 if name == "force" else 4), self.config.num_hidden_layers, self.config.num_experts
        axes = "[B|1, L|1, S|1]" if name == "force" else "[B|1, L|1, S|1, E]"
        if value.dim() != rank:
            raise ValueError(f"{name}: a tensor has rank {value.dim()}, expected {rank}: {axes}")
        if value.shape[1] not in (1, layers) or (name != "force" and value.shape[3] != experts):
            raise ValueError(
                f"{name}: a tensor has shape {list(value.shape)}, expected {axes} with L={layers}, E={experts}"
            )
        if name in ("ablate", "keep"):
            if value.dtype != torch.bool:
                raise TypeError(f"{name}: a tensor must be bool, got {value.dtype}")
            return value if name == "ablate" else ~value
        if name == "bias":
            if not value.dtype.is_floating_point:
                raise TypeError(f"bias: a tensor must be floating, got {value.dtype}")
            return value
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            raise TypeError(f"force: a tensor must hold integers, got {value.dtype}")
        return value.long().cpu()  # a force on every token saves the routers, which is decided on the host


def free_value(name: str) -> Any:
    """What stands for "no control" in a full form."""
    return {"ablate": False, "keep": False, "bias": 0.0, "force": -1}[name]


def window(name: str, control: Control, first: int, last: int, prompt: int | None, reader: StepReader) -> Tensor:
    """The part of a control for slots first..last-1 (counted from the prompt's first slot), S axis last - first or 1.

    An S axis > 1 covers the prompt; later slots are free. prompt: number of prompt slots, None in a plain forward.
    """
    if isinstance(control, Tensor):
        return control if control.shape[2] == 1 else _cut(name, control, first, last, strict=prompt is None)
    if prompt is None:
        kind = "Phases" if isinstance(control, TensorPhases) else "a callable"
        raise ValueError(f"{name}: {kind} has a meaning in generate() only; give forward() the control of this call")
    if isinstance(control, PerStep):
        return _join([reader.at(control, step) for step in _steps(first, last, prompt)])
    parts = []
    for value, begin, end in ((control.prompt, first, min(last, prompt)), (control.answer, max(first, prompt), last)):
        if end > begin:
            parts.append(_phase_window(name, value, begin, end, like=control))
    return _join(parts)


def _phase_window(name: str, value: Tensor | None, first: int, last: int, like: TensorPhases) -> Tensor:
    if value is not None and value.shape[2] > 1:
        return _cut(name, value, first, last, strict=False)
    if value is None:
        other = like.prompt if like.prompt is not None else like.answer
        assert other is not None
        value = other.new_full((1, 1, 1, *other.shape[3:]), free_value(name))
    return value.expand(-1, -1, last - first, *[-1] * (value.dim() - 3))


def _cut(name: str, value: Tensor, first: int, last: int, *, strict: bool) -> Tensor:
    if strict and value.shape[2] != last - first:
        raise ValueError(f"{name}: the S axis has {value.shape[2]} slots, this call has {last - first}")
    part = value[:, :, first:last]
    short = (last - first) - part.shape[2]
    if short:
        rest = value.new_full((*value.shape[:2], short, *value.shape[3:]), free_value(name))
        part = torch.cat([part, rest], 2)
    return part


def _steps(first: int, last: int, prompt: int) -> list[int]:
    return [max(0, slot - prompt + 1) for slot in range(first, last)]


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate along S after broadcasting rows and layers."""
    if len(parts) == 1:
        return parts[0]
    rows, layers = (max(p.shape[axis] for p in parts) for axis in (0, 1))
    return torch.cat([p.expand(rows, layers, *[-1] * (p.dim() - 2)) for p in parts], 2)


class StepReader:
    """Evaluates callable controls, once per (row, step)."""

    def __init__(self, config: MiCRoConfig, rows: int, expand: int) -> None:
        self.reader, self.rows, self.expand = ControlReader(config), rows, expand
        self._seen: dict[tuple[int, int], Tensor] = {}

    def at(self, control: PerStep, step: int) -> Tensor:
        """The control of all rows at one step, S axis 1; rows that beams repeat ask once."""
        key = (id(control), step)
        if key not in self._seen:
            values = [self._row(control, row, step) for row in range(self.rows // self.expand)]
            self._seen[key] = _join_rows(values).repeat_interleave(self.expand, 0)
        return self._seen[key]

    def _row(self, control: PerStep, row: int, step: int) -> Tensor:
        name, value = control.name, control.function(row, step)
        if value is None:
            # Free: nothing ablated (for keep: everything kept), no bias, no expert forced.
            name, value = ("ablate" if name == "keep" else name), ({} if name == "bias" else "none")
        tensor = self.reader.tensor(name, value)
        if tensor.shape[0] != 1 or tensor.shape[2] != 1:
            raise ValueError(f"{name}: a callable gives the control of one row and one step, got {list(tensor.shape)}")
        return tensor


def _join_rows(values: list[Tensor]) -> Tensor:
    layers = max(v.shape[1] for v in values)
    return torch.cat([v.expand(-1, layers, *[-1] * (v.dim() - 2)) for v in values])
