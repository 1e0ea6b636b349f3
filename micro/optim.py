"""AdamW over the fused operator :func:`micro.ops.adamw_step`, with clipping and float32 masters inside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from math import isfinite
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from micro import ops

MOST_SKIPPED_IN_A_ROW = 10
_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names, so that its state can be loaded


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, one pass over the memory of each parameter.

    bfloat16 (on CUDA also float16) parameters keep a float32 master in the state: the master learns, the parameter is
    its rounding. Masters are made from the parameters at their first step, so load weights before it. Frozen parameters
    have no state.

    The global norm of all gradients is taken before the step, in float64. A norm that is not finite skips the step: no
    parameter, moment or step count changes, ``skipped_steps`` counts it, and the tenth in a row raises.

    Args:
        params: parameters, or groups of them (see :func:`parameter_groups`).
        lr: learning rate; schedulers set it per group.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: multiplied by the learning rate and taken from the value.
        max_grad_norm: clip to this global norm over all groups; ``None`` (or 0): no clipping. Leave it out under a
            trainer that clips by itself.

    Attributes:
        grad_norm: global norm of the last step's gradients, before clipping.
        skipped_steps: steps skipped so far.

    Raises:
        ValueError: a number lies outside its range.
        TypeError: a parameter is neither float32, float64 nor bfloat16 (on CUDA float16), or a gradient is sparse.
        FloatingPointError: ten steps in a row had a gradient norm that was not finite.

    Source: Loshchilov and Hutter (2019), algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_range("lr", lr)
        _check_range("eps", eps)
        _check_range("weight_decay", weight_decay)
        for i, beta in enumerate(betas):
            _check_range(f"betas[{i}]", beta, below=1.0)
        if max_grad_norm is not None:
            _check_range("max_grad_norm", max_grad_norm)
        self.max_grad_norm = max_grad_norm
        self.grad_norm = 0.0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step with the gradients that are there; parameters without one are left alone.

        Returns what ``closure`` returns, which is called first and with gradients on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [_gradient(p) for p in self._with_gradient()]
        if gradients and self._is_finite(gradients):
            scale = self._clip_factor()
            for group in self.param_groups:
                self._step_group(group, scale)
        return loss

    def _with_gradient(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _is_finite(self, gradients: list[Tensor]) -> bool:
        """Measures the norm; counts a step that must be skipped, and raises when there are too many in a row."""
        self.grad_norm = float(ops.gradient_norm(gradients))
        if isfinite(self.grad_norm):
            self._skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradient norm was {self.grad_norm} in {self._skipped_in_a_row} steps in a row: lower the "
                "learning rate, or look for inputs or weights that are not finite"
            )
        return False

    def _clip_factor(self) -> float:
        """As torch.nn.utils.clip_grad_norm_, whose 1e-6 keeps the quotient finite."""
        if not self.max_grad_norm:
            return 1.0
        return min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))

    def _step_group(self, group: dict[str, Any], scale: float) -> None:
        """One call of the operator for all parameters that share a step count, a device and the need of a master."""
        buckets: dict[tuple[int, torch.device, bool], list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self._state_of(p)
            state["step"] += 1
            buckets[state["step"], p.device, "master" in state].append(p)
        for (step, _, has_master), parameters in buckets.items():
            states = [self.state[p] for p in parameters]
            ops.adamw_step(
                parameters,
                [_gradient(p) for p in parameters],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["master"] for s in states] if has_master else [],
                step=step,
                learning_rate=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                gradient_scale=scale,
            )

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = 0
            for name in _MOMENTS:
                state[name] = torch.zeros_like(p, dtype=_moment_dtype(p))
            if _needs_master(p):
                state["master"] = p.detach().float()
        return state

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's, with the counts of skipped steps."""
        counts = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self._skipped_in_a_row}
        return super().state_dict() | counts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Exact: moments and masters keep float32 where torch would round them to the parameter's dtype.

        Takes the state of ``torch.optim.AdamW`` as well.

        Raises:
            ValueError: the groups do not fit.
        """
        super().load_state_dict(state_dict)
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self._skipped_in_a_row = state_dict.get("skipped_in_a_row", 0)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(saved_ids, parameters, strict=True):
            if saved := state_dict["state"].get(saved_id):
                self.state[p] = _restored(saved, p)


def _moment_dtype(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _needs_master(p: Tensor) -> bool:
    return p.dtype in (torch.bfloat16, torch.float16)


def _restored(saved: dict[str, Any], p: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {"step": int(saved["step"])}
    for name in _MOMENTS:
        state[name] = torch.empty_like(p, dtype=_moment_dtype(p), requires_grad=False).copy_(saved[name])
    if _needs_master(p):
        master = saved.get("master", p.detach())
        state["master"] = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(master)
    return state


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.layout != torch.strided:
        raise TypeError(f"AdamW takes dense gradients, got {p.grad.layout}: build embeddings with sparse=False")
    return p.grad


def _check_range(name: str, value: float, below: float = float("inf")) -> None:
    if not 0 <= value < below:
        raise ValueError(f"{name} must lie in [0, {below}), got {value}")


def is_decayed(parameter_name: str) -> bool:
    """Whether weight decay applies: to matrices, embedding and head, not to norm gains and biases (model.md 6.2).

    By name, because the gains of all experts form a matrix ``[E, H]``.
    """
    *_, owner, kind = ["", *parameter_name.split(".")]
    return kind != "bias" and not owner.endswith("norm")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: what decays, and norm gains and biases, which do not. Frozen ones are left out.

    Raises:
        ValueError: nothing is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter: every one has requires_grad=False")
    groups = [
        {"params": [p for name, p in trainable if is_decayed(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not is_decayed(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
