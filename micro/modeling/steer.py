"""Steering of one call: the normalised controls, and what they mean for the rows, slots and layers of one forward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro.modeling.config import MiCRoConfig
from micro.modeling.controls import ACTIVE, Control, ControlReader, StepReader, TensorPhases

if TYPE_CHECKING:
    from micro.modeling.bound import BoundSteering
    from micro.modeling.trace import RoutingTrace


@dataclass
class Steering:
    """Normalised controls of one call or one ``generate`` (interface.md 2). Not a tensor, so that ``generate`` leaves
    it alone; its rows are expanded by :meth:`repeat`.

    ablate, bias, force: several controls, outermost first (context managers, then the argument): union, sum, innermost
    wins. labels int64 [B,S] or [B] (-1 resolved at binding), weights float [B,S,E] or [B,E]; origin: absolute slot of
    the S axes' first slot; prompt: number of prompt slots in ``generate``, None in a plain forward; first_id:
    absolute slot of the first returned id; trace: where ``generate`` collects the routing of its forward passes.
    """

    config: MiCRoConfig
    ablate: tuple[Control, ...] = ()
    bias: tuple[Control, ...] = ()
    force: tuple[Control, ...] = ()
    labels: Tensor | None = None
    weights: Tensor | None = None
    by_labels: bool = False
    experts_per_token: int | None = None
    replay: RoutingTrace | None = None
    origin: int = 0
    prompt: int | None = None
    first_id: int = 0
    expand: int = 1
    trace: list[RoutingTrace] | None = None
    stop_ids: list[int] = field(default_factory=list)
    _steps: dict[int, StepReader] = field(default_factory=dict, repr=False)

    # ------------------------------------------------------------------ making
    @classmethod
    def make(
        cls,
        config: MiCRoConfig,
        *,
        ablate: Any = None,
        keep: Any = None,
        bias: Any = None,
        force: Any = None,
        experts_per_token: int | None = None,
        routing_labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        route_by: str | None = None,
        replay: RoutingTrace | None = None,
    ) -> Steering:
        """Normalise the arguments of a call and the context managers that are open around it."""
        if ablate is not None and keep is not None:
            raise ValueError("give ablate or keep, not both")
        given = [*ACTIVE.get(), ("ablate", ablate), ("keep", keep), ("bias", bias), ("force", force)]
        reader = ControlReader(config)
        read: dict[str, list[Control]] = {"ablate": [], "bias": [], "force": []}
        for name, value in given:
            if (control := reader.read(name, value)) is not None:
                read["ablate" if name == "keep" else name].append(control)
        by_labels = _who_routes(config, routing_labels, routing_weights, route_by)
        return cls(
            config,
            ablate=tuple(read["ablate"]),
            bias=tuple(read["bias"]),
            force=tuple(read["force"]),
            labels=_check_labels(routing_labels),
            weights=_check_weights(routing_weights, config.num_experts),
            by_labels=by_labels,
            experts_per_token=_check_k(experts_per_token, config.num_experts),
            replay=_check_replay(replay, config),
        )

    @property
    def k(self) -> int:
        """Experts per token of this call."""
        return self.experts_per_token or self.config.num_experts_per_tok

    @property
    def free(self) -> bool:
        """Whether nothing but the router decides."""
        return not (self.ablate or self.bias or self.force or self.by_labels or self.replay is not None)

    def repeat(self, count: int) -> Steering:
        """Every row ``count`` times, as beams and several return sequences need."""

        def repeated(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.repeat_interleave(count, 0) if value.shape[0] > 1 else value
            if isinstance(value, TensorPhases):
                return TensorPhases(repeated(value.prompt), repeated(value.answer))
            return value

        trace = self.replay
        if trace is not None and trace.ids.shape[1] > 1:
            trace = trace.rows(torch.arange(trace.ids.shape[1]).repeat_interleave(count))
        return replace(
            self,
            ablate=tuple(map(repeated, self.ablate)),
            bias=tuple(map(repeated, self.bias)),
            force=tuple(map(repeated, self.force)),
            labels=repeated(self.labels),
            weights=repeated(self.weights),
            replay=trace,
            expand=self.expand * count,
            _steps={},
        )

    # ------------------------------------------------------------------ binding
    def bind(self, rows: int, slots: int, start: int, real: Tensor | None, like: Tensor) -> BoundSteering:
        """The controls for B rows of S slots from absolute slot ``start`` on; real bool [B*S] or None; device and dtype
        as ``like``. Raises for every contradiction at a real slot, before anything is computed (model.md 4.4).
        """
        from micro.modeling.bound import BoundSteering

        return BoundSteering(self, rows, slots, start, None if real is None else real.view(rows, slots), like)

    def step_reader(self, rows: int) -> StepReader:
        """Evaluator of callable controls, kept for the whole ``generate``."""
        if rows not in self._steps:
            self._steps[rows] = StepReader(self.config, rows, self.expand)
        return self._steps[rows]


def _who_routes(config: MiCRoConfig, labels: object, weights: object, route_by: str | None) -> bool:
    """Whether labels or rows decide (True) or the router (False)."""
    given = labels is not None or weights is not None
    if labels is not None and weights is not None:
        raise ValueError("give routing_labels or routing_weights, not both")
    if route_by not in (None, "labels", "router"):
        raise ValueError(f'route_by is {route_by!r}, expected "labels", "router" or None')
    if route_by == "labels" and not given:
        raise ValueError('route_by="labels" needs routing_labels or routing_weights')
    by_labels = given and route_by != "router"
    if not by_labels and not config.use_router and route_by is None:
        raise ValueError(
            "the config says use_router=False and neither routing_labels nor routing_weights are given; "
            'pass them, or route_by="router"'
        )
    return by_labels


def _check_labels(labels: Tensor | None) -> Tensor | None:
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"routing_labels: expected an integer tensor [B,S] or [B], got {kind}")
    if labels.dim() not in (1, 2):
        raise ValueError(f"routing_labels has shape {list(labels.shape)}, expected [B,S] or [B]")
    return labels.long()


def _check_weights(weights: Tensor | None, experts: int) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point:
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"routing_weights: expected a float tensor [B,S,E] or [B,E], got {kind}")
    if weights.dim() not in (2, 3) or weights.shape[-1] != experts:
        raise ValueError(f"routing_weights has shape {list(weights.shape)}, expected [B,S,{experts}] or [B,{experts}]")
    return weights


def _check_k(k: int | None, experts: int) -> int | None:
    if k is None:
        return None
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"experts_per_token: expected an integer 1..{experts}, got {k!r}")
    if not 1 <= k <= experts:
        raise ValueError(f"experts_per_token is {k}, expected 1..{experts}")
    return k


def _check_replay(trace: RoutingTrace | None, config: MiCRoConfig) -> RoutingTrace | None:
    if trace is None:
        return None
    from micro.modeling.trace import RoutingTrace

    if not isinstance(trace, RoutingTrace):
        raise TypeError(f"replay: expected a RoutingTrace, got {type(trace).__name__}")
    if trace.ids.shape[0] != config.num_hidden_layers or trace.num_experts != config.num_experts:
        raise ValueError(
            f"replay: the trace has {trace.ids.shape[0]} layers of {trace.num_experts} experts, "
            f"the model {config.num_hidden_layers} of {config.num_experts}"
        )
    return trace
