"""Actions in force: opened by ``model.intervene``, met by every forward call of that model inside the block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from micro.interventions import apply
from micro.interventions.actions import Action, BoundAction, bind
from micro.interventions.points import axis, depth, width
from micro.interventions.readings import Moments, Reading

if TYPE_CHECKING:
    from micro.modeling import MiCRoModel
    from micro.modeling.call import Call

_ACTIVE: ContextVar[tuple[Session, ...]] = ContextVar("micro_interventions", default=())


S = TypeVar("S", bound="Session")


class Findings:
    """What actions brought back: ``findings[name]``.

    Without a name an action has that of its point, or, where it is taken, the point and the action's number: "units_1".
    """

    def __init__(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if not isinstance(action, Action):
                raise TypeError(f"intervene: expected actions (micro.interventions.read, zero, ...), got {action!r}")
        self._names = _names(actions)
        self._readings: dict[int, list[Reading]] = {i: [] for i, a in enumerate(actions) if a.kind == "read"}
        self._moments: dict[int, Moments] = {}

    def __getitem__(self, name: str | int) -> Reading | Moments:
        index = name if isinstance(name, int) else self._names.get(name, -1)
        if index in self._moments:
            return self._moments[index]
        if index in self._readings:
            return Reading.cat(self._readings[index])
        raise KeyError(f"no action named {name!r} reads anything; there are {sorted(self._names)}")

    def reading(self, name: str | int) -> Reading:
        """As ``findings[name]``, of a ``read``."""
        found = self[name]
        if not isinstance(found, Reading):
            raise TypeError(f"{name!r} names moments, not a reading")
        return found

    def parts(self, name: str) -> list[Reading]:
        """What a ``read`` saw, one reading per call and layer; with ``keep_graph`` the layer went on from their values,
        so that ``torch.autograd.grad`` finds them.
        """
        if self._names.get(name) not in self._readings:
            raise KeyError(f"no read named {name!r}; there are {sorted(self._names)}")
        return self._readings[self._names[name]]

    def moments(self, name: str | int) -> Moments:
        """As ``findings[name]``, of ``moments``."""
        found = self[name]
        if not isinstance(found, Moments):
            raise TypeError(f"{name!r} names a reading, not moments")
        return found

    def keep(self, number: int, found: Reading | Moments) -> None:
        """Take in what an action saw."""
        if isinstance(found, Reading):
            self._readings[number].append(found)
        else:
            self._moments[number] = found


class Session(Findings):
    """The actions of one ``model.intervene`` block, and what they brought back."""

    def __init__(self, model: MiCRoModel, actions: Sequence[Action], *, all_experts: bool) -> None:
        super().__init__(actions)
        self.model, self.all_experts = model, all_experts
        self.actions = [bind(action, model.config, model.device) for action in actions]
        for i, action in enumerate(actions):
            if action.kind == "moments":
                self.keep(i, self._empty(action))

    def layer(self, index: int, call: Call) -> LayerHooks | None:
        """What to do in a layer; None: nothing."""
        own = [(i, bound) for i, bound in enumerate(self.actions) if index in bound.layers]
        return LayerHooks(self, index, call, own) if own or self.all_experts else None

    def drop_readings(self, number: int) -> list[Reading]:
        """What a ``read`` saw until now; it starts anew."""
        seen, self._readings[number] = self._readings[number], []
        return seen

    def count(self, number: int) -> Moments:
        return self._moments[number]

    def _empty(self, action: Action) -> Moments:
        config, point = self.model.config, action.point
        shape = (depth(config, point), axis(config, point), width(config, point))
        return Moments.zeros(*shape, covariance=action.covariance, device=self.model.device)


def _names(actions: Sequence[Action]) -> dict[str, int]:
    """Of the actions that bring something back; given names come first."""
    names: dict[str, int] = {}
    readers = [(i, action) for i, action in enumerate(actions) if action.kind in ("read", "moments")]
    for i, action in readers:
        if action.name is not None:
            if action.name in names:
                raise ValueError(f"intervene: two actions are named {action.name!r}")
            names[action.name] = i
    for i, action in readers:
        if action.name is None:
            name = action.point if action.point not in names else f"{action.point}_{i}"
            if name in names:
                raise ValueError(f"intervene: action {i} would be named {name!r}, as another is; give it a name")
            names[name] = i
    return names


@contextmanager
def intervene(model: MiCRoModel, *actions: Action, all_experts: bool = False) -> Iterator[Session]:
    """Open a block in which the actions act on the forward calls of ``model``, in the order given.

    Args:
        model: the headless model; ``MiCRoForCausalLM.intervene`` passes its own.
        actions: see :mod:`micro.interventions`.
        all_experts: every expert runs on every token, so that reading sees the experts that were not chosen; the
            layer's result is that of the usual routing (model.md 9.5, mode "all").

    Returns:
        The :class:`Session` with what was read.
    """
    with opened(Session(model, actions, all_experts=all_experts)) as session:
        yield session


@contextmanager
def opened(session: S) -> Iterator[S]:
    """A block in which a session's actions are in force; closed whatever happens."""
    token = _ACTIVE.set((*_ACTIVE.get(), session))
    try:
        yield session
    finally:
        _ACTIVE.reset(token)


def active(model: MiCRoModel) -> Session | None:
    """The session around a call of this model.

    Raises:
        ValueError: two blocks of one model are open; their order would be anyone's guess.
    """
    own = [session for session in _ACTIVE.get() if session.model is model]
    if len(own) > 1:
        raise ValueError("two model.intervene blocks are open; put their actions into one, in the order wanted")
    return own[0] if own else None


class LayerHooks:
    """The actions of one layer in one call.

    ``all_experts`` asks the layer to run every expert on every token.
    """

    def __init__(self, session: Session, layer: int, call: Call, actions: list[tuple[int, BoundAction]]) -> None:
        self.session, self.layer, self.call, self.actions = session, layer, call, actions
        self.all_experts = session.all_experts
        self.chosen: Tensor | None = None  # bool [T,E], where every expert runs on every token

    def tokens(self, point: str, x: Tensor) -> Tensor:
        """Token rows [T,W] through the actions at a point."""
        mine = [(i, bound) for i, bound in self.actions if bound.action.point == point]
        if not mine:
            return x
        every = torch.arange(x.shape[0], device=x.device)
        real = torch.ones_like(every, dtype=torch.bool) if self.call.real is None else self.call.real.to(x.device)
        return self._run(mine, apply.Rows(every, torch.full_like(every, -1), real, real), x)

    def routed(self, point: str, x: Tensor, tokens: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
        """Rows [N,W] in plan order through the actions at a point; tokens, experts: [N]; offsets: [E+1]."""
        mine = [(i, bound) for i, bound in self.actions if bound.action.point == point]
        if not mine:
            return x
        real = torch.arange(x.shape[0], device=x.device) < offsets[-1]
        tokens, experts = tokens.long(), experts.long()
        chosen = real if self.chosen is None else real & self.chosen[tokens, experts]
        return self._run(mine, apply.Rows(tokens, experts, real, chosen), x)

    def _run(self, actions: list[tuple[int, BoundAction]], rows: apply.Rows, x: Tensor) -> Tensor:
        for number, bound in actions:
            wanted = apply.selected(bound.action, rows, self.call)
            if bound.action.kind == "read":
                if not bound.action.keep_graph:
                    seen = apply.reading(bound, self.layer, rows, wanted, x.detach(), self.call)
                else:
                    seen = apply.reading(bound, self.layer, rows, wanted, x, self.call)
                    x = x.index_copy(0, wanted.nonzero()[:, 0], seen.values)
                self.session.keep(number, seen)
            elif bound.action.kind == "moments":
                apply.count(self.session.count(number), self.layer, rows, wanted, x.detach())
            else:
                x = apply.changed(bound, self.layer, rows, wanted, x, self.call)
        return x
