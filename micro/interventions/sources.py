"""Rows of another run that take the place of rows of this one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from micro.interventions.actions import BoundAction
    from micro.interventions.readings import Reading

_SLOT_BITS, _ROW_BITS = 24, 20  # of a key; the expert has the rest


class Places(NamedTuple):
    """Rows of a source in one layer by their sorted keys: row ``order[i]`` has key ``keys[i]``."""

    keys: Tensor
    order: Tensor


class Pools(NamedTuple):
    """Rows of a source in one layer by expert: those of expert e are ``order[first[e + 1]:][: number[e + 1]]``."""

    order: Tensor
    first: Tensor
    number: Tensor


def picked(bound: BoundAction, layer: int, experts: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """For each row [N] the row of the action's source that takes its place, int64 [N]; -1: there is none.

    experts (-1 at token rows), row (of the batch), slot: int64 [N].
    """
    action = bound.action
    assert action.source is not None
    at = (layer, row.device)
    row = row - action.first_row
    if action.kind == "resample":
        if at not in bound.pools:
            bound.pools[at] = _pools(action.source, layer, row.device)
        return _random(bound.pools[at], action.seed, layer, experts, row, slot)
    if at not in bound.pools:
        bound.pools[at] = _places(action.source, layer, row.device)
    places: Places = bound.pools[at]
    if not len(places.keys):
        return torch.full_like(row, -1)
    keys = _keys(experts, row, slot)
    found = torch.searchsorted(places.keys, keys, right=True).sub_(1).clamp_(min=0)
    return torch.where(places.keys[found] == keys, places.order[found], -1)


def _keys(experts: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    return ((experts + 1) << (_ROW_BITS + _SLOT_BITS)) + (row << _SLOT_BITS) + slot


def _mine(source: Reading, layer: int, device: torch.device) -> tuple[Tensor, ...]:
    mine = (source.layer == layer).nonzero()[:, 0]
    parts = (mine, source.expert[mine], source.row[mine], source.slot[mine])
    return tuple(part.to(device) for part in parts)


def _places(source: Reading, layer: int, device: torch.device) -> Places:
    mine, experts, row, slot = _mine(source, layer, device)
    keys, order = torch.sort(_keys(experts, row, slot), stable=True)  # of equal places the last one read
    return Places(keys, mine[order])


def _pools(source: Reading, layer: int, device: torch.device) -> Pools:
    mine, experts, _, _ = _mine(source, layer, device)
    order = torch.argsort(experts, stable=True)
    number = torch.bincount(experts + 1, minlength=2)
    return Pools(mine[order], number.cumsum(0) - number, number)


def _random(pools: Pools, seed: int, layer: int, experts: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    expert = (experts + 1).clamp(max=len(pools.number) - 1)
    count = torch.where(experts + 1 == expert, pools.number[expert], 0)
    draw = (_uniform(seed, layer, experts, row, slot) * count).floor().long()
    if not len(pools.order):
        return torch.full_like(row, -1)
    pick = pools.order[(pools.first[expert] + draw).clamp(max=len(pools.order) - 1)]
    return torch.where(count > 0, pick, -1)


def _uniform(seed: int, *place: int | Tensor) -> Tensor:
    """float64 in [0, 1) from whole numbers, the same on every device and in the engine (SplitMix64, Steele, Lea and
    Flood 2014).
    """
    state = _mixed(torch.tensor(_signed(seed)))
    for part in place:
        other = torch.as_tensor(part)
        state = _mixed(state.to(other.device) ^ other)
    return _shifted(state, 11).double() * 2.0**-53


def _mixed(z: Tensor) -> Tensor:
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
