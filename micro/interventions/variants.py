"""Several interventions as rows of one batch, behind a prefix that is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro.engine import Engine
from micro.interventions.actions import Action, check_behind
from micro.interventions.session import intervene
from micro.modeling.cache import MiCRoCache, MiCRoCacheLayer
from micro.modeling.controls import ControlReader, free_value
from micro.progress import track

if TYPE_CHECKING:
    from micro.modeling import MiCRoConfig, MiCRoForCausalLM, RoutingTrace

_CONTROLS = ("ablate", "keep", "bias", "force")
# (actions of the rows, steering by argument, trace of the rows or None, number of rows) -> logits [rows,S-prefix,V]
_Rows = Callable[[list[Action], dict[str, Any], "RoutingTrace | None", int], Tensor]


@torch.no_grad()
def variants(
    model: MiCRoForCausalLM | Engine,
    input_ids: Tensor,
    actions: Sequence[Sequence[Action]],
    *,
    prefix: int | None = None,
    controls: Sequence[Mapping[str, Any]] | None = None,
    replay: RoutingTrace | None = None,
    batch: int = 8,
    progress: bool = False,
) -> Tensor:
    """Logits of one input under K interventions. Each acts on a row of its own; the slots before the first one that any
    may touch are computed once and shared.

    Args:
        model: in eval mode, or an engine, which forgets the rows that it holds.
        input_ids: int64 [S] or [1,S], without padding.
        actions: K lists of actions that change something (zero, scale, shift, replace, resample); a list may be empty.
            ``rows`` is not given, or holds row 0: the input.
        prefix: number of shared slots, 0..S-1, behind which all actions, controls and replay act. None: up to the
            first slot that an action's ``positions`` name (without positions: 0), and 0 where there are controls.
        controls: K mappings of steering as in ``forward`` (ablate, keep, bias, force); an S axis counts the slots
            behind the prefix.
        replay: a trace of this input, of one row, or of K; not with an engine.
        batch: variants per forward pass.
        progress: show a bar.

    Returns:
        [K,S-prefix,V], in the dtype of the model's logits (engine: float32, or float64 for float64): what K calls of
        ``model`` with the prefix in its cache give, on the CPU bit for bit. Cost: ``prefix`` slots once and S-prefix
        slots K times; each variant of a batch has a copy of the prefix's keys and values.

    Raises:
        ValueError: shapes, the prefix, an action whose positions all lie in the prefix, or actions that only read:
            read in ``model.intervene``.
    """
    ids = _one_row(input_ids)
    _check(model, actions, controls, replay, batch)
    shared = _shared_slots(actions, ids.shape[1], prefix, controls is not None or replay is not None)
    out: list[Tensor] = []
    starts = range(0, len(actions), batch)
    with _engine_rows(model, ids, shared) if isinstance(model, Engine) else _model_rows(model, ids, shared) as behind:
        for first in track(starts, "variants") if progress else starts:
            own = range(first, min(first + batch, len(actions)))
            table = side_by_side([actions[k] for k in own])
            steering = {} if controls is None else _joined(model.config, [controls[k] for k in own])
            out.append(behind(table, steering, _traces(replay, own, len(actions)), len(own)))
    return torch.cat(out)


def side_by_side(actions: Sequence[Sequence[Action]]) -> list[Action]:
    """K lists of actions on one input as one table for a batch of K rows: those of list k act on row k alone.

    ``rows`` of an action is not given, or holds row 0: the input; a source's row 0 is the input, too. Names get the
    number of their list: what list k names "r" is found as "r_k" (``findings["r_0"]``, ``findings["r_1"]``, ...).
    """
    return [_in_row(action, row) for row, own in enumerate(actions) for action in own]


@contextmanager
def _model_rows(model: MiCRoForCausalLM, ids: Tensor, shared: int) -> Iterator[_Rows]:
    cache = MiCRoCache(model.config)
    if shared:
        model(ids[:, :shared], past_key_values=cache)

    def run(table: list[Action], steering: dict[str, Any], replay: RoutingTrace | None, count: int) -> Tensor:
        with intervene(model.model, *table):
            got = model(
                ids[:, shared:].expand(count, -1),
                past_key_values=_copies(cache, model.config, count),
                replay=replay,
                **steering,
            )
        logits: Tensor = got.logits
        return logits

    yield run


@contextmanager
def _engine_rows(engine: Engine, ids: Tensor, shared: int) -> Iterator[_Rows]:
    def run(table: list[Action], steering: dict[str, Any], replay: RoutingTrace | None, count: int) -> Tensor:
        if shared:
            engine.truncate(shared)
            engine.select([0] * count)
        else:
            engine.reset()
        rest = ids[:, shared:].expand(count, -1)
        return engine.prefill(rest, all_logits=True, interventions=table, **steering).logits

    engine.reset()
    try:
        if shared:
            engine.prefill(ids[:, :shared])
        yield run
    finally:
        engine.reset()


def _one_row(input_ids: Tensor) -> Tensor:
    ids = input_ids if input_ids.dim() == 2 else input_ids[None]
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"variants: input_ids has shape {list(input_ids.shape)}, expected [S] or [1,S]")
    return ids


def _check(
    model: MiCRoForCausalLM | Engine,
    actions: Sequence[Sequence[Action]],
    controls: Sequence[Mapping[str, Any]] | None,
    replay: RoutingTrace | None,
    batch: int,
) -> None:
    if isinstance(model, Engine):
        if replay is not None:
            raise ValueError("variants: the engine takes no replay; give the model")
    elif model.training:
        raise ValueError("variants: call model.eval() first; noise and dropped states would differ from row to row")
    if not len(actions):
        raise ValueError("variants: there are no lists of actions")
    if batch < 1:
        raise ValueError(f"variants: batch is {batch}, expected at least 1")
    if controls is not None and len(controls) != len(actions):
        raise ValueError(f"variants: {len(controls)} controls for {len(actions)} lists of actions")
    for action in (action for own in actions for action in own):
        if not isinstance(action, Action):
            raise TypeError(f"variants: expected lists of actions, got {action!r}")
        if action.kind in ("read", "moments"):
            raise ValueError("variants gives logits; read in model.intervene or in the engine's calls")


def _shared_slots(actions: Sequence[Sequence[Action]], slots: int, prefix: int | None, everywhere: bool) -> int:
    if prefix is not None:
        if not 0 <= prefix < slots:
            raise ValueError(f"variants: prefix is {prefix}, expected 0..{slots - 1}: at least one slot is behind it")
        check_behind([action for own in actions for action in own], prefix, "variants: prefix")
        return prefix
    if everywhere:
        return 0
    return min([slots - 1, *(_first_slot(action, slots) for own in actions for action in own)])


def _first_slot(action: Action, slots: int) -> int:
    """The first slot that an action may touch."""
    positions = action.positions
    if positions is None:
        return 0
    if isinstance(positions, slice):
        named: Any = range(slots)[positions]
    elif isinstance(positions, Tensor) and positions.dtype == torch.bool:
        named = positions.any(0).nonzero().flatten().tolist()
    else:
        named = torch.as_tensor(positions).flatten().tolist()
    return min(named, default=slots)


def _in_row(action: Action, row: int) -> Action:
    """The action on one row of the batch, which its source knows as row 0."""
    mine = action.rows is None or 0 in action.rows
    name = None if action.name is None else f"{action.name}_{row}"
    return changed(action, rows=[row] if mine else [], first_row=row, name=name)


def _copies(cache: MiCRoCache, config: MiCRoConfig, count: int) -> MiCRoCache:
    """A cache with the one row ``count`` times."""
    out = MiCRoCache(config)
    for own, layer in zip(cache.layers, out.layers, strict=True):
        assert isinstance(own, MiCRoCacheLayer) and isinstance(layer, MiCRoCacheLayer)
        if own.keys is not None and own.values is not None and own.get_seq_length():
            pair = (t.unflatten(1, (cache.experts, -1)).expand(count, -1, -1, -1, -1) for t in (own.keys, own.values))
            layer.append(*pair)
    return out


def _traces(replay: RoutingTrace | None, own: range, count: int) -> RoutingTrace | None:
    if replay is None:
        return None
    rows = replay.ids.shape[1]
    if rows not in (1, count):
        raise ValueError(f"variants: replay has {rows} rows, expected 1 or {count}")
    return replay.rows(torch.tensor([0 if rows == 1 else k for k in own]))


def _joined(config: MiCRoConfig, controls: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Controls of the rows of one batch in their full forms, [n,L|1,S|1,...]."""
    reader, given = ControlReader(config), {}
    for one in controls:
        if unknown := set(one) - set(_CONTROLS):
            raise ValueError(f"variants: controls may hold {', '.join(_CONTROLS)}, got {sorted(unknown)}")
        if one.get("ablate") is not None and one.get("keep") is not None:
            raise ValueError("give ablate or keep, not both")
    for name, aliases in (("ablate", ("ablate", "keep")), ("bias", ("bias",)), ("force", ("force",))):
        found = [_read(reader, one, aliases) for one in controls]
        present = [tensor for tensor in found if tensor is not None]
        if not present:
            continue
        layers, slots = (max(tensor.shape[axis] for tensor in present) for axis in (1, 2))
        free = present[0].new_full((1, 1, 1, *present[0].shape[3:]), free_value(name))
        rows = [free if tensor is None else tensor for tensor in found]
        given[name] = torch.cat([row.expand(1, layers, slots, *row.shape[3:]) for row in rows])
    return given


def _read(reader: ControlReader, control: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    for name in names:
        if control.get(name) is not None:
            tensor = reader.tensor(name, control[name])
            if tensor.shape[0] != 1:
                raise ValueError(f"variants: {name} holds {tensor.shape[0]} rows; each variant has one")
            return tensor
    return None
