"""Ablation with the routes of the intact run, so that later routers cannot make up for what was removed.

    with record_routes(model) as routes:
        suite.score(model, {})
    with replayed_routes(model, routes):
        suite.score(model, {"ablate": "logic"})

An ablated expert changes the hidden states behind it, and with them what later routers choose. *Free* routes let them;
*replayed* routes hold every choice of the intact run, except where it is ablated. The difference between the two is
what routing compensates (capabilities.md 7; McGrath et al. 2023, The Hydra Effect).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from micro.modeling.controls import ControlReader
from micro.modeling.trace import RoutingTrace

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

STEERED = ("ablate", "keep")  # what may differ between the recorded and the replayed calls


def without(trace: RoutingTrace, ablate: Tensor) -> RoutingTrace:
    """The choices of a trace, with the next-best expert of that layer and token wherever a chosen one is ablated.

    Next-best is by the trace's effective logits, of equal ones the lower id; where nothing chosen is ablated, the
    choices are the trace's own, in their order. A token with fewer than K experts left holds ablated ones in the
    surplus places, whose weight a replay with the same ``ablate`` makes 0.

    Args:
        trace: of the intact run; ids [L,B,S,K].
        ablate: bool [B|1, L|1, S|1, E], True = ablated.

    Returns:
        A trace with other ``ids``; its scores stay those of the intact run (a replay computes its own).

    Raises:
        ValueError: a real token has no expert left.
    """
    return replace(trace, ids=_choices(_ranking(trace), ablate, trace.mask, trace.ids.shape[-1]).to(trace.ids.dtype))


def _ranking(trace: RoutingTrace) -> Tensor:
    """All experts of each token, best first: the chosen ones as they stand, then the rest by effective logit.

    uint8 [L,B,S,E].
    """
    experts, chosen = trace.num_experts, trace.ids.long()
    order = torch.argsort(trace.logits, dim=-1, descending=True, stable=True)
    places = torch.arange(experts, device=order.device)
    rank = torch.empty_like(order).scatter(-1, order, places.expand_as(order))
    first = places[: chosen.shape[-1]] - experts  # before everybody else
    ranking = torch.argsort(rank.scatter(-1, chosen, first.expand_as(chosen)), dim=-1)
    return ranking.to(torch.uint8)


def _choices(ranking: Tensor, ablate: Tensor, real: Tensor, k: int) -> Tensor:
    """The K best experts that are not ablated, int64 [L,B,S,K]; ``real`` bool [B,S]."""
    layers, rows, slots, experts = ranking.shape
    gone = ablate.to(ranking.device).expand(rows, layers, slots, experts).transpose(0, 1)
    if bool((gone.all(-1) & real).any()):
        raise ValueError("replayed routes: every expert of a token is ablated; leave at least one")
    order = ranking.long()
    # A stable sort by "is it ablated" moves those behind the others and keeps both in their order.
    kept_first = torch.argsort(gone.gather(-1, order).to(torch.uint8), dim=-1, stable=True)
    return order.gather(-1, kept_first)[..., :k]


class _Call(NamedTuple):
    """One recorded forward pass: its input, and how every token ranked the experts."""

    key: str
    ranking: Tensor
    real: Tensor
    start: int
    k: int


@dataclass
class RecordedRoutes:
    """The choices of every forward pass of a model in one :func:`record_routes` block, in the order of the calls.

    One byte per layer, token and expert.
    """

    calls: list[_Call] = field(default_factory=list)


@contextmanager
def record_routes(model: MiCRoForCausalLM) -> Iterator[RecordedRoutes]:
    """Record the routes of every forward pass of ``model`` inside the block; results do not change by it.

    Yields:
        A :class:`RecordedRoutes` that is filled inside the block.
    """
    routes = RecordedRoutes()

    def traced(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        starts.append((_call_key(args, kwargs), 0 if cache is None else int(cache.get_seq_length())))
        return args, {**kwargs, "output_routing": True}

    def taken(_: Any, output: Any) -> None:
        (key, start), trace = starts.pop(), output.routing
        routes.calls.append(_Call(key, _ranking(trace), trace.mask, start, trace.ids.shape[-1]))

    starts: list[tuple[str, int]] = []
    before = model.model.register_forward_pre_hook(traced, with_kwargs=True)
    behind = model.model.register_forward_hook(lambda module, _, output: taken(module, output))
    try:
        yield routes
    finally:
        before.remove()
        behind.remove()


@contextmanager
def replayed_routes(model: MiCRoForCausalLM, routes: RecordedRoutes) -> Iterator[None]:
    """Inside the block, the n-th forward pass of ``model`` takes the choices of the n-th recorded one.

    A token whose expert of some layer is ablated there (``ablate`` or ``keep`` of the call) goes to its next-best
    expert, as in :func:`without`; everything else goes where it went. Weights and hidden states are computed anew.
    Without ablation the results are those of the recorded calls, bit for bit. With it, the probabilities of the chosen
    experts are those among themselves (unless the weight rule is "probability"): a router that meets changed states may
    give a held choice so little that the published ``q / (q + 1e-9)`` would take its weight away.

    Calls of the same model in other threads are affected while the block is open; nothing stays behind.

    Raises:
        ValueError: a call has other input than the recorded one (text that is generated under ablation, say), there are
            more or fewer calls, or a call replays or normalises its controls by itself.
    """
    reader, among_themselves = ControlReader(model.config), model.config.weight_rule != "probability"
    left = iter(routes.calls)

    def replaced(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        recorded = next(left, None)
        if recorded is None or recorded.key != _call_key(args, kwargs):
            raise ValueError(
                "replayed routes: this forward pass has other input than the recorded one; only tasks that read the "
                "same texts in the same batches under every condition can be replayed, not generated text"
            )
        return args, {**kwargs, **_held(recorded, _ablated(reader, kwargs), among_themselves)}

    handle = model.model.register_forward_pre_hook(replaced, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if next(left, None) is not None:
        raise ValueError("replayed routes: fewer forward passes than were recorded; run the same scoring in both")


def _held(recorded: _Call, ablate: Tensor, among_themselves: bool) -> dict[str, Any]:
    """Controls of a call that make its routes those of the recorded one."""
    ids = _choices(recorded.ranking, ablate, recorded.real, recorded.k)
    if among_themselves and bool(ablate.any()):
        chosen = torch.zeros(recorded.ranking.shape, dtype=torch.bool, device=ids.device).scatter(-1, ids, True)
        return {"ablate": ~chosen.transpose(0, 1) | ablate.to(ids.device), "keep": None}
    nothing = torch.zeros((), device=ids.device)  # a replay takes nothing but the ids
    scores = nothing.expand(recorded.ranking.shape)
    weights = nothing.expand(ids.shape)
    trace = RoutingTrace(ids.to(torch.int32), weights, scores, scores, scores, recorded.real, start=recorded.start)
    return {"replay": trace}


def _ablated(reader: ControlReader, kwargs: dict[str, Any]) -> Tensor:
    """What a call ablates, bool [B|1, L|1, S|1, E]."""
    for name in ("replay", "steering"):
        if kwargs.get(name) is not None:
            raise ValueError(f"replayed routes: a call with {name} has its routes already; score without it")
    ablate = torch.zeros(1, 1, 1, reader.config.num_experts, dtype=torch.bool)
    for name in STEERED:
        control = reader.read(name, kwargs.get(name))
        if control is not None and not isinstance(control, Tensor):
            raise ValueError(f"{name}: replayed routes need the control of this call, not one for each step")
        ablate = ablate if control is None else control
    return ablate


def _call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Of the texts of a call: ids, positions, mask, number of cached slots."""
    cache = kwargs.get("past_key_values")
    digest = hashlib.sha256(repr(0 if cache is None else int(cache.get_seq_length())).encode())
    inputs = {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")}
    for name, value in [*enumerate(args), *inputs.items()]:
        if isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digest.update(f"{name}: {value.dtype} {list(value.shape)}".encode() + content)
    return digest.hexdigest()
