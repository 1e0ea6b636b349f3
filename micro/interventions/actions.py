"""What to do with the rows at a point: actions as a user writes them, and bound to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from micro.interventions.points import Point, axis, check_point, depth, width

if TYPE_CHECKING:
    from micro.interventions.readings import Reading
    from micro.modeling import MiCRoConfig

Kind = Literal["read", "moments", "zero", "scale", "shift", "replace", "resample"]
Positions = Sequence[int] | slice | Tensor | None


@dataclass(frozen=True, eq=False)
class Action:
    """One action on some columns of some rows at a point. Made by :func:`read`, :func:`zero`, ...

    layers, experts, heads, units, rows, positions say where; None means everywhere. ``experts`` takes names or ids;
    ``heads`` (point "heads") and ``units`` take column numbers, ``units`` also a bool mask [W] or [L,E',W]; ``rows``
    are rows of the batch as the layers see it (in ``generate`` every beam is one); ``positions`` absolute slots,
    padding included: numbers, a slice of the slots that there are in a call, or bool [B|1,S].
    """

    kind: Kind
    point: Point
    layers: int | Sequence[int] | None = None
    experts: int | str | Sequence[int | str] | None = None
    heads: Sequence[int] | None = None
    units: Sequence[int] | Tensor | None = None
    rows: Sequence[int] | None = None
    positions: Positions = None
    name: str | None = None
    value: float | Tensor | None = None
    source: Reading | None = None
    seed: int = 0
    covariance: bool = False
    only_chosen: bool = False
    keep_graph: bool = False
    first_row: int = 0  # the row of the batch that counts as row 0 of the source: variants side by side

    def __post_init__(self) -> None:
        check_point(self.point)
        if self.heads is not None and self.point != "heads":
            raise ValueError(f'heads are columns of the point "heads" only, not of {self.point!r}; give units')
        if self.heads is not None and self.units is not None:
            raise ValueError("give heads or units, not both")
        _check_places("rows", self.rows)
        _check_places("positions", self.positions)


def _check_places(what: str, given: Positions) -> None:
    """Rows and slots count from the start: where a row ends changes from call to call."""
    if given is None or (isinstance(given, Tensor) and given.dtype == torch.bool):
        return
    if isinstance(given, slice):
        numbers = [n for n in (given.start, given.stop, given.step) if n is not None]
        if given.step == 0:
            raise ValueError(f"{what}: a slice with step 0 names nothing")
    else:
        numbers = torch.as_tensor(given).flatten().tolist()
    if wrong := [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < 0]:
        raise ValueError(f"{what}: expected numbers from 0 on, counted from the start, got {wrong[0]!r}")


def check_behind(actions: Sequence[Action], prefix: int, argument: str) -> None:
    """Refuse actions that name slots of a shared prefix alone: it is read without them, so they would do nothing."""
    for action in actions:
        last = None if action.positions is None else _last_slot(action.positions)
        if last is not None and last < prefix:
            name = "" if action.name is None else f", name={action.name!r}"
            raise ValueError(
                f'{argument} is {prefix}, but {action.kind}("{action.point}"{name}) names slots up to {last} alone, '
                "all in the prefix, where nothing acts: let the prefix end before its slots, or leave the action out"
            )


def _last_slot(positions: Sequence[int] | slice | Tensor) -> int | None:
    """The last slot named; None: no end, or no slot at all."""
    if isinstance(positions, slice):
        if positions.stop is None:
            return None
        return max(range(positions.start or 0, positions.stop, positions.step or 1), default=None)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return max(positions.nonzero()[:, -1].tolist(), default=None)
    return max(torch.as_tensor(positions).flatten().tolist(), default=None)


def read(point: Point, *, keep_graph: bool = False, **where: Any) -> Action:
    """Keep the rows: ``run[name]`` is a :class:`Reading`. ``keep_graph=True`` does not detach them, and the layer goes
    on from them (:meth:`Session.parts`); it takes whole rows only.
    """
    if keep_graph and any(where.get(name) is not None for name in ("heads", "units", "experts")):
        raise ValueError("read: keep_graph=True takes whole rows; do not give experts, heads or units")
    return Action("read", point, keep_graph=keep_graph, **where)


def moments(point: Point, *, covariance: bool = False, **where: Any) -> Action:
    """Streaming mean and variance of the rows, with ``covariance`` of all pairs of columns: ``run[name]`` is
    :class:`Moments`.
    """
    return Action("moments", point, covariance=covariance, **where)


def zero(point: Point, **where: Any) -> Action:
    """Set the columns to 0."""
    return Action("zero", point, **where)


def scale(point: Point, factor: float | Tensor, **where: Any) -> Action:
    """Multiply by a number or a tensor that fits [L,E',W] (point "heads": also [L,E',A,1]); differentiable."""
    return Action("scale", point, value=factor, **where)


def shift(point: Point, value: float | Tensor, **where: Any) -> Action:
    """Add a number or a tensor that fits [L,E',W]; differentiable."""
    return Action("shift", point, value=value, **where)


def replace(
    point: Point, value: float | Tensor | None = None, *, source: Reading | None = None, **where: Any
) -> Action:
    """Put other values in: a number or a tensor that fits [L,E',W] (a mean, say), or what another run read at the same
    layer, expert, row and slot (``layers`` not given: those of the source). Rows that the source does not hold are an
    error: read it with ``all_experts=True``, or replay its routes.
    """
    if (value is None) == (source is None):
        raise ValueError("replace: give value or source, exactly one of them")
    return Action("replace", point, value=value, source=source, **where)


def resample(point: Point, source: Reading, *, seed: int = 0, **where: Any) -> Action:
    """Put in the values of a random row that another run read at the same layer and expert, one draw per row.

    A draw depends on seed, layer, expert, row of the batch and slot alone: chunks and batches change none.
    """
    return Action("resample", point, source=source, seed=seed, **where)


@dataclass(frozen=True, eq=False)
class BoundAction:
    """An action on one model: layers that it acts in, bool columns [L,E',W] (None: all), value [L,E',W] (broadcast).

    ``pools`` keeps the source's rows by layer and device, sorted for look-ups.
    """

    action: Action
    layers: frozenset[int]
    columns: Tensor | None
    value: Tensor | None
    pools: dict[tuple[int, torch.device], Any] = field(default_factory=dict)

    def columns_of(self, layer: int) -> Tensor | None:
        """Bool [E',W]."""
        return None if self.columns is None else self.columns[min(layer, self.columns.shape[0] - 1)]

    def value_of(self, layer: int) -> Tensor | None:
        """[E'|1,W|1]."""
        return None if self.value is None else self.value[min(layer, self.value.shape[0] - 1)]


def bind(action: Action, config: MiCRoConfig, device: torch.device) -> BoundAction:
    """Check an action against a model.

    Raises:
        ValueError: a layer, expert, head, unit or shape that the model does not have.
        TypeError: something else than documented was given.
    """
    layers = _numbers(action.layers, depth(config, action.point), "layers")
    if layers is None:
        layers = list(
            range(depth(config, action.point)) if action.source is None else action.source.layer.unique().tolist()
        )
    columns = _columns(action, config)
    return BoundAction(
        action,
        frozenset(layers),
        None if columns is None else columns.to(device),
        _value(action, config, device),
    )


def _numbers(given: Any, end: int, what: str) -> list[int] | None:
    if given is None:
        return None
    numbers = [given] if isinstance(given, int) else list(given)
    for i, number in enumerate(numbers):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{what}: expected integers, got {number!r}")
        if not -end <= number < end:
            raise ValueError(f"{what}: {number} does not exist, expected 0..{end - 1} (or negative, from the end)")
        numbers[i] = number % end
    return numbers


def _columns(action: Action, config: MiCRoConfig) -> Tensor | None:
    """Bool [L,E',W] (or broadcast over layers: [1,E',W]) of what is touched; None: everything."""
    if action.heads is None and action.units is None and action.experts is None:
        return None
    experts, columns = axis(config, action.point), width(config, action.point)
    touched = _units(action, config, columns).broadcast_to(-1, experts, columns).clone()
    if action.experts is not None:
        from micro.modeling.controls import ExpertNames

        if experts == 1 and config.num_experts > 1:
            raise ValueError(f"experts: rows at {action.point!r} belong to tokens, not to experts, in this model")
        wanted = ExpertNames(config).many(action.experts, "experts")
        touched[:, [e for e in range(experts) if e not in wanted]] = False
    return touched


def _units(action: Action, config: MiCRoConfig, columns: int) -> Tensor:
    """Bool [1 or L, 1 or E', W]."""
    units = action.units
    if isinstance(units, Tensor) and units.dtype == torch.bool:
        shape = (depth(config, action.point), axis(config, action.point), columns)
        if tuple(units.shape) not in (shape, shape[2:]):
            raise ValueError(f"units: a mask has shape {list(units.shape)}, expected {list(shape)} or [{columns}]")
        return units.reshape(-1 if units.dim() == 3 else 1, shape[1] if units.dim() == 3 else 1, columns)
    touched = torch.zeros(columns, dtype=torch.bool)
    if action.heads is not None:
        size = int(config.head_dim or 0)
        heads = _numbers(action.heads, config.num_attention_heads, "heads")
        touched.view(-1, size)[heads] = True
    elif units is not None:
        touched[_numbers(units.tolist() if isinstance(units, Tensor) else units, columns, "units")] = True
    else:
        touched[:] = True
    return touched.view(1, 1, columns)


def _value(action: Action, config: MiCRoConfig, device: torch.device) -> Tensor | None:
    """[1 or L, 1 or E', 1 or W]."""
    if action.value is None:
        return None
    value = torch.as_tensor(action.value, device=device)
    full = (depth(config, action.point), axis(config, action.point), width(config, action.point))
    if value.dim() == 4 and action.point == "heads":
        value = value.expand(*value.shape[:2], config.num_attention_heads, int(config.head_dim or 0)).flatten(2)
    if value.dim() > 3 or any(a not in (1, b) for a, b in zip(reversed(value.shape), reversed(full), strict=False)):
        raise ValueError(f"{action.kind}: a value of shape {list(value.shape)} does not fit {list(full)}")
    return value.reshape(*(1,) * (3 - value.dim()), *value.shape)
