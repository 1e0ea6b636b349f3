"""One action on the rows of one point in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from micro import ops
from micro.interventions.actions import Action, BoundAction
from micro.interventions.readings import Moments, Reading
from micro.interventions.sources import picked

if TYPE_CHECKING:
    from micro.modeling.call import Call


class Rows(NamedTuple):
    """What the rows of a point are: token and expert (-1 at token rows) int64 [N]; computed, chosen bool [N]."""

    tokens: Tensor
    experts: Tensor
    computed: Tensor
    chosen: Tensor


def place(rows: Rows, call: Call) -> tuple[Tensor, Tensor]:
    """Row of the batch and absolute slot of each row, [N]."""
    return rows.tokens // call.slots, rows.tokens % call.slots + call.start


def selected(action: Action, rows: Rows, call: Call) -> Tensor:
    """Bool [N]: the rows that an action means."""
    wanted = rows.chosen if action.only_chosen else rows.computed
    row, slot = place(rows, call)
    if action.rows is not None:
        wanted = wanted & torch.isin(row, torch.as_tensor(list(action.rows), device=row.device))
    positions = action.positions
    if positions is None:
        return wanted
    if isinstance(positions, slice):
        first, last, step = positions.indices(call.length)
        return wanted & (slot >= first) & (slot < last) & ((slot - first) % step == 0)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        table = positions.to(slot.device)
        if table.dim() != 2 or table.shape[0] not in (1, call.rows):
            raise ValueError(f"positions: a mask has shape {list(table.shape)}, expected [{call.rows} or 1, S]")
        inside = slot < table.shape[1]
        line = row if table.shape[0] > 1 else torch.zeros_like(row)
        return wanted & inside & table[line, slot.clamp(max=table.shape[1] - 1)]
    return wanted & torch.isin(slot, torch.as_tensor(positions, device=slot.device))


def reading(bound: BoundAction, layer: int, rows: Rows, wanted: Tensor, x: Tensor, call: Call) -> Reading:
    """The wanted rows; columns that the action does not name are left out where it names the same for all experts."""
    index = wanted.nonzero()[:, 0]
    row, slot = place(rows, call)
    values = x[index]
    columns = bound.columns_of(layer)
    if columns is not None:
        index, values = _named(index, values, columns, rows)
    where = torch.full_like(index, layer)
    return Reading(values, where, rows.experts[index], row[index], slot[index], rows.chosen[index])


def _named(index: Tensor, values: Tensor, columns: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows of experts that have a named column, and their columns."""
    keep = columns.any(-1)[rows.experts[index].clamp(min=0)]
    index, values = index[keep], values[keep]
    named = columns[columns.any(-1)]
    if len(named) and bool((named == named[:1]).all()):
        return index, values[:, named[0]]
    raise ValueError("read: units must name the same columns for every expert")


def count(moments: Moments, layer: int, rows: Rows, wanted: Tensor, x: Tensor) -> None:
    """Take the wanted rows into the moments, each into its expert's."""
    moments.take(layer, x, wanted, _experts(rows, moments.mean.shape[1]))


def changed(bound: BoundAction, layer: int, rows: Rows, wanted: Tensor, x: Tensor, call: Call) -> Tensor:
    """Of x [N,W] a copy with the wanted rows and columns changed."""
    kind, source = bound.action.kind, bound.action.source
    columns, value, index = bound.columns_of(layer), bound.value_of(layer), None
    columns = None if columns is None else columns.to(x.device)
    if source is not None:
        if columns is not None:
            wanted = wanted & columns.any(-1)[rows.experts.clamp(min=0)]
        if not bool(wanted.any()):
            return x
        index = picked(bound, layer, rows.experts, *place(rows, call))
        if bool((index[wanted] < 0).any()):
            raise ValueError(f"{kind}: the source holds no row of layer {layer} for some of the rows to be changed")
        value = source.values
        if value.shape[-1] != x.shape[1]:
            raise ValueError(
                f"{kind}: the source holds {value.shape[-1]} columns, {bound.action.point!r} has {x.shape[1]}: read it "
                "without units and heads; give those to this action"
            )
    tables = (columns, value) if index is None else (columns,)
    return ops.intervene(
        x,
        "replace" if kind == "resample" else kind,  # type: ignore[arg-type]
        touched=wanted,
        experts=_experts(rows, max(1 if table is None else len(table) for table in tables)),
        columns=columns,
        value=None if value is None else value.to(x),
        index=index,
    )


def _experts(rows: Rows, axis: int) -> Tensor | None:
    """int32 [N], or None where there is nothing to tell apart."""
    return None if axis <= 1 else rows.experts.int()
