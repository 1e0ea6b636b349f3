"""One action on the rows of one point in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from micro.interventions.actions import Action, BoundAction
from micro.interventions.readings import Moments, Reading

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
    """Take the wanted rows into the moments, expert by expert."""
    if moments.mean.shape[1] == 1:
        moments.add(layer, 0, x[wanted])
        return
    for expert in range(moments.mean.shape[1]):
        moments.add(layer, expert, x[wanted & (rows.experts == expert)])


def changed(bound: BoundAction, layer: int, rows: Rows, wanted: Tensor, x: Tensor, call: Call) -> Tensor:
    """Of x [N,W] a copy with the wanted rows and columns changed."""
    experts = rows.experts.clamp(min=0)
    touched = wanted[:, None]
    columns = bound.columns_of(layer)
    if columns is not None:
        touched = touched & columns[experts]
        wanted = touched.any(-1)
    if not bool(wanted.any()):
        return x
    return torch.where(touched, _new(bound, layer, rows, wanted, x, call), x)


def _new(bound: BoundAction, layer: int, rows: Rows, wanted: Tensor, x: Tensor, call: Call) -> Tensor:
    kind, source = bound.action.kind, bound.action.source
    if kind == "zero":
        return torch.zeros_like(x)
    if source is not None:
        pick = _same(source, layer, rows, call) if kind == "replace" else _random(bound, layer, rows)
        if bool((pick[wanted] < 0).any()):
            raise ValueError(f"{kind}: the source holds no row of layer {layer} for some of the rows to be changed")
        return source.values.to(x)[pick.clamp(min=0)]
    table = bound.value_of(layer)
    assert table is not None
    value = table.expand(table.shape[0], x.shape[1]).to(x.dtype)
    value = value if len(value) == 1 else value[rows.experts.clamp(min=0)]
    if kind == "scale":
        return x * value
    return x + value if kind == "shift" else value.expand_as(x)


def _same(source: Reading, layer: int, rows: Rows, call: Call) -> Tensor:
    """For each row the source's row of the same layer, expert, batch row and slot; -1: none."""
    row, slot = place(rows, call)
    place_of = {
        key: i
        for i, key in enumerate(
            zip(source.layer.tolist(), source.expert.tolist(), source.row.tolist(), source.slot.tolist(), strict=True)
        )
    }
    keys = zip(rows.experts.tolist(), row.tolist(), slot.tolist(), strict=True)
    return torch.tensor([place_of.get((layer, *key), -1) for key in keys], device=row.device)


def _random(bound: BoundAction, layer: int, rows: Rows) -> Tensor:
    """For each row a random row of the source of the same layer and expert; -1: none. Another draw in every layer."""
    source = bound.action.source
    assert source is not None
    generator = torch.Generator().manual_seed(bound.action.seed * 1_000_003 + layer)
    pick = torch.full((len(rows.tokens),), -1)
    experts = rows.experts.cpu()
    for expert in experts.unique().tolist():
        pool = ((source.layer == layer) & (source.expert == expert)).nonzero()[:, 0].cpu()
        mine = (experts == expert).nonzero()[:, 0]
        if len(pool):
            pick[mine] = pool[torch.randint(len(pool), (len(mine),), generator=generator)]
    return pick.to(rows.tokens.device)
