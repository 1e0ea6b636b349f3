"""One call of every operator, the same for the operator and its definition, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from micro import ops
from micro.experts import BlockParameters
from micro.testing import reference

EXPERTS, TOKENS, K, HIDDEN, INNER = 4, 37, 2, 32, 48
HEADS, GROUPS, HEAD, SLOTS = 4, 2, 16, 18  # of two rows; 36 of the 37 tokens
LAYERS, VOCABULARY = 3, 41

Inputs = dict[str, Any]


@dataclass(frozen=True)
class OpCall:
    """``make(draw)`` gives the inputs. Floating ones are drawn in float64 and take the dtype of a test, or, named in
    ``wide``, its accumulator type. ``differentiable`` names those that get a gradient.
    """

    name: str
    make: Callable[[torch.Generator], Inputs]
    differentiable: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    wide_only: bool = False  # takes nothing narrower than float32
    variant: str = ""

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Inputs:
        """The same numbers for every device."""
        wide = torch.promote_types(dtype, torch.float32)
        made = self.make(torch.Generator().manual_seed(7))

        def moved(name: str, value: Any) -> Any:
            if isinstance(value, BlockParameters):
                return BlockParameters(*(moved(name, part) for part in value))
            if isinstance(value, list):
                return [moved(name, part) for part in value]
            if not isinstance(value, Tensor):
                return value
            kind = value.dtype if not value.is_floating_point() else wide if name in self.wide else dtype
            tensor = value.to(kind).to(device)
            return tensor.requires_grad_(name in self.differentiable) if value.is_floating_point() else tensor

        return {name: moved(name, value) for name, value in made.items()}

    def leaves(self, inputs: Inputs) -> list[Tensor]:
        """The tensors that get a gradient, in order."""
        found: list[Tensor] = []
        for name in self.differentiable:
            value = inputs[name]
            found += [t for t in value if t is not None] if isinstance(value, tuple) else [value]
        return found

    def __call__(self, module: Any, inputs: Inputs) -> list[Tensor]:
        """The results of the operator (module ``ops``) or of its definition (``reference``)."""
        return flat(getattr(module, self.name)(**inputs))

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


def flat(results: Any) -> list[Tensor]:
    """Results in a list, whatever they came in; None left out."""
    if isinstance(results, Tensor):
        return [results]
    return [] if results is None else [t for part in results for t in flat(part)]


def rough(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Numbers with outliers."""
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    values.flatten()[::11] *= 3
    return values


def choices(generator: torch.Generator, tokens: int = TOKENS) -> Tensor:
    """Distinct experts per token; the third has none."""
    used = torch.tensor([0, 1, 3])
    return torch.stack([used[torch.randperm(3, generator=generator)[:K]] for _ in range(tokens)]).int()


def planned(generator: torch.Generator, tokens: int = TOKENS) -> tuple[Any, Tensor]:
    weights = torch.rand(tokens, K, generator=generator, dtype=torch.float64)
    weights[::5, 1] = 0  # idle pairs
    return reference.plan(choices(generator, tokens), EXPERTS, weights), weights


def _mask(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, generator=generator) > 0.3


def _tables(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(count, HEAD // 2, generator=generator, dtype=torch.float64) * 6
    return angle.cos(), angle.sin()


def _route(g: torch.Generator) -> Inputs:
    force = torch.full((TOKENS,), -1, dtype=torch.int32)
    force[::7] = 1
    ablate = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    ablate[3::4, 2] = True
    return {"logits": rough(g, TOKENS, EXPERTS), "k": K, "bias": rough(g, 1, EXPERTS), "ablate": ablate, "force": force}


def _combine(g: torch.Generator) -> Inputs:
    plan, weights = planned(g)
    parts = {"experts": plan.experts, "offsets": plan.offsets, "inverse": plan.inverse}
    return {"y": rough(g, TOKENS * K, HIDDEN), "weights": weights, **parts}


def _permute(g: torch.Generator) -> Inputs:
    plan, _ = planned(g)
    return {"x": rough(g, TOKENS, HIDDEN), "tokens": plan.tokens, "offsets": plan.offsets, "inverse": plan.inverse}


def _intervene(g: torch.Generator, change: str, value: tuple[int, ...] | None, *, by_index: bool = False) -> Inputs:
    """A fifth of the rows untouched, and of no expert."""
    plan, _ = planned(g)
    touched = torch.rand(TOKENS * K, generator=g) > 0.2
    inputs = {
        "x": rough(g, TOKENS * K, HIDDEN),
        "change": change,
        "touched": touched,
        "experts": torch.where(touched, plan.experts, -1),
        "columns": torch.rand(EXPERTS, HIDDEN, generator=g) > 0.3,
    }
    if value is not None:
        inputs["value"] = rough(g, *value)
    if by_index:
        inputs["index"] = torch.randint(0, inputs["value"].shape[0], (TOKENS * K,), generator=g)
    return inputs


def _attention(g: torch.Generator) -> Inputs:
    plan, _ = planned(g, 2 * SLOTS)
    keys = (2, EXPERTS, GROUPS, SLOTS, HEAD)
    q, k, v = rough(g, 2 * SLOTS * K, HEADS, HEAD), rough(g, *keys), rough(g, *keys)
    return {"q": q, "k": k, "v": v, "tokens": plan.tokens, "offsets": plan.offsets, "slots": SLOTS}


def _rope(g: torch.Generator) -> Inputs:
    plan, _ = planned(g)
    cos, sin = _tables(g, TOKENS)
    return {"x": rough(g, TOKENS * K, HEADS, HEAD), "cos": cos, "sin": sin, "tokens": plan.tokens}


def _cross_entropy(g: torch.Generator) -> Inputs:
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    targets[::3] = -100
    return {"hidden": rough(g, TOKENS, HIDDEN), "weight": rough(g, VOCABULARY, HIDDEN, scale=0.3), "targets": targets}


def _sample(g: torch.Generator) -> Inputs:
    return {
        "logits": rough(g, 5, VOCABULARY, scale=2.0),
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "previous": torch.randint(VOCABULARY, (5, 6), generator=g),
        "seeds": torch.arange(5),
        "steps": torch.arange(5) * 3,
    }


def _adamw(g: torch.Generator, narrow: bool = False) -> Inputs:
    shapes = [(HIDDEN, INNER), (7,), (3, 5)]
    parameters = [rough(g, *shape) for shape in shapes]
    return {
        "parameters": parameters,
        "gradients": [rough(g, *shape) for shape in shapes],
        "first_moments": [rough(g, *shape, scale=0.1) for shape in shapes],
        "second_moments": [rough(g, *shape, scale=0.1).square() for shape in shapes],
        "masters": [p.clone() for p in parameters] if narrow else [],
        "step": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "gradient_scale": 0.5,
    }


def _decisions(g: torch.Generator) -> tuple[Tensor, Tensor]:
    probs = rough(g, LAYERS, TOKENS, EXPERTS).softmax(-1)
    return probs, torch.stack([choices(g) for _ in range(LAYERS)])


def _balance(g: torch.Generator) -> Inputs:
    probs, ids = _decisions(g)
    return {"probs": probs, "ids": ids, "mask": _mask(g, TOKENS)}


def _layer(g: torch.Generator) -> Inputs:
    cos, sin = _tables(g, 2 * SLOTS)
    queries, keys = HEADS * HEAD, GROUPS * HEAD

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * shape[-1] ** -0.5

    def gain(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(EXPERTS, size, generator=g, dtype=torch.float64)

    parameters = BlockParameters(
        q_proj=matrix(EXPERTS, queries, HIDDEN),
        k_proj=matrix(EXPERTS, keys, HIDDEN),
        v_proj=matrix(EXPERTS, keys, HIDDEN),
        o_proj=matrix(EXPERTS, HIDDEN, queries),
        gate_proj=matrix(EXPERTS, INNER, HIDDEN),
        up_proj=matrix(EXPERTS, INNER, HIDDEN),
        down_proj=matrix(EXPERTS, HIDDEN, INNER),
        router_in=matrix(HIDDEN, HIDDEN),
        router_out=matrix(EXPERTS, HIDDEN) * 3,
        input_norm=gain(HIDDEN),
        post_attention_norm=gain(HIDDEN),
    )
    x = torch.randn(2 * SLOTS, HIDDEN, generator=g, dtype=torch.float64)
    return {"x": x, "parameters": parameters, "cos": cos, "sin": sin, "heads": HEADS, "eps": 1e-5, "slots": SLOTS}


CALLS = [
    OpCall("route", _route, ("logits", "bias"), wide=("bias",)),
    OpCall("plan", lambda g: {"ids": choices(g), "num_experts": EXPERTS, "mask": _mask(g, TOKENS)}),
    OpCall("permute", _permute, ("x",)),
    OpCall("combine", _combine, ("y", "weights")),
    OpCall("intervene", lambda g: _intervene(g, "zero", None), ("x",), variant="zero"),
    OpCall("intervene", lambda g: _intervene(g, "scale", (EXPERTS, HIDDEN)), ("x", "value"), variant="scale"),
    OpCall("intervene", lambda g: _intervene(g, "shift", (EXPERTS, 1)), ("x", "value"), variant="shift"),
    OpCall("intervene", lambda g: _intervene(g, "replace", (1, HIDDEN)), ("x", "value"), variant="replace"),
    OpCall(
        "intervene", lambda g: _intervene(g, "replace", (70, HIDDEN), by_index=True), ("x", "value"), variant="source"
    ),
    OpCall("load_balancing_loss", _balance, ("probs",), wide_only=True),
    OpCall("z_loss", lambda g: {"logits": rough(g, LAYERS, TOKENS, EXPERTS), "mask": _mask(g, TOKENS)}, ("logits",)),
    OpCall(
        "label_loss",
        lambda g: {
            "logits": rough(g, LAYERS, TOKENS, EXPERTS),
            "labels": torch.randint(-1, EXPERTS, (TOKENS,), generator=g),
            "mask": _mask(g, TOKENS),
        },
        ("logits",),
    ),
    OpCall(
        "routing_entropy", lambda g: {"probs": _decisions(g)[0], "mask": _mask(g, TOKENS)}, ("probs",), wide_only=True
    ),
    OpCall(
        "expert_linear",
        lambda g: {
            "x": rough(g, TOKENS * K, HIDDEN),
            "weight": rough(g, EXPERTS, INNER, HIDDEN, scale=0.2),
            "offsets": planned(g)[0].offsets,
        },
        ("x", "weight"),
    ),
    OpCall(
        "stacked_linear",
        lambda g: {
            "x": rough(g, 1, TOKENS, HIDDEN),
            "weight": rough(g, EXPERTS, INNER, HIDDEN, scale=0.2),
            "offsets": planned(g)[0].offsets,
        },
        ("x", "weight"),
    ),
    OpCall(
        "rms_norm",
        lambda g: {
            "x": rough(g, TOKENS * K, HIDDEN),
            "gain": 1 + 0.2 * rough(g, EXPERTS, HIDDEN),
            "expert": planned(g)[0].experts,
            "eps": 1e-5,
        },
        ("x", "gain"),
    ),
    OpCall(
        "rms_norm",
        lambda g: {"x": rough(g, 1, TOKENS, HIDDEN), "gain": 1 + 0.2 * rough(g, EXPERTS, HIDDEN), "eps": 1e-5},
        ("x", "gain"),
        variant="shared",
    ),
    OpCall("rope", _rope, ("x",), wide=("cos", "sin")),
    OpCall("expert_attention", _attention, ("q", "k", "v")),
    OpCall("swiglu", lambda g: {"gate": rough(g, TOKENS, INNER), "up": rough(g, TOKENS, INNER)}, ("gate", "up")),
    OpCall("cross_entropy", _cross_entropy, ("hidden", "weight")),
    OpCall("sample", _sample),
    OpCall("gradient_norm", lambda g: {"gradients": [rough(g, HIDDEN, INNER), rough(g, 7)]}),
]
# In place, with masters where the parameters are narrow: called by tests of their own.
STEPS = {
    narrow: OpCall(
        "adamw_step",
        lambda g, narrow=narrow: _adamw(g, narrow),  # type: ignore[misc]
        wide=("first_moments", "second_moments", "masters"),
    )
    for narrow in (False, True)
}
LAYERS_OF_OPS = [
    OpCall("block_forward", lambda g: {**_layer(g), "whole_block": True}, wide=("cos", "sin")),
    OpCall("block_train", _layer, ("x", "parameters"), wide=("cos", "sin")),
]
__all__ = ["CALLS", "LAYERS_OF_OPS", "STEPS", "OpCall", "flat", "ops", "reference"]
