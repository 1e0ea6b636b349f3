"""What a model costs before it exists: parameters, memory, floating-point operations and time.

Pure arithmetic on the shape of a model (model.md 5.5, performance.md 2.1, 4.3 and 4.4); neither torch nor a weight file
is needed. Memory figures count tensors, not the allocator's slack, and activations are those of the sparse path with
nothing recomputed; they are estimates, and say so wherever they are printed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["block", "ffn", "dense"]
Trainable = Literal["all", "experts", "but_routers", "routers"]

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
FAMILIES = ("llama", "olmo2")
# Revision 1 trains the experts alone in stage 1, revision 2 everything but the routers (model.md 6.1).
STAGES: dict[str, dict[str, tuple[Trainable, int]]] = {
    "r1": {"stage 1": ("experts", 1), "stage 2": ("routers", 2), "stage 3": ("all", 1)},
    "r2": {"stage 1": ("but_routers", 1), "stage 2": ("routers", 2), "stage 3": ("all", 1)},
}


@dataclass(frozen=True)
class Shape:
    """The numbers that decide what a model costs; letters as in model.md 1.1. E and K are ignored for dense models."""

    family: str
    L: int
    H: int
    A: int
    G: int
    D: int
    F: int
    V: int
    tied: bool = False
    kind: Kind = "block"
    E: int = 4
    K: int = 1
    router: int = 0  # width of the router's first map, 0 = H

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"estimate: backbone {self.family!r} is not supported; known: {', '.join(FAMILIES)}")
        if self.kind not in ("block", "ffn", "dense"):
            raise ValueError(f"estimate: kind {self.kind!r} must be 'block', 'ffn' or 'dense'")
        for name in ("L", "H", "A", "G", "D", "F", "V", "E", "K"):
            if getattr(self, name) < 1:
                raise ValueError(f"estimate: {name} = {getattr(self, name)} must be at least 1")
        if self.K > self.E:
            raise ValueError(f"estimate: {self.K} experts per token, but there are only {self.E}")

    @property
    def kv(self) -> int:
        """Parameters of the key and value projections of one block."""
        return 2 * self.H * self.G * self.D

    @property
    def attention(self) -> int:
        """Parameters of all four attention projections of one block."""
        return 2 * self.H * self.A * self.D + self.kv

    @property
    def ffn(self) -> int:
        """Parameters of the three FFN matrices of one block."""
        return 3 * self.H * self.F

    @property
    def norms(self) -> int:
        """Norm gains of one block."""
        return 2 * self.H + (self.A * self.D + self.G * self.D if self.family == "olmo2" else 0)

    @property
    def router_parameters(self) -> int:
        """Parameters of the router of one layer."""
        width = self.router or self.H
        return 0 if self.kind == "dense" else width * (self.H + self.E)


# Published backbones (model.md 2.1), as dense shapes.
BACKBONES: dict[str, Shape] = {
    "SmolLM2-135M": Shape("llama", 30, 576, 9, 3, 64, 1536, 49152, True, "dense"),
    "SmolLM2-360M": Shape("llama", 32, 960, 15, 5, 64, 2560, 49152, True, "dense"),
    "SmolLM2-1.7B": Shape("llama", 24, 2048, 32, 32, 64, 8192, 49152, True, "dense"),
    "Llama-3.2-1B": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, "dense"),
    "Llama-3.2-3B": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, True, "dense"),
    "OLMo-2-1B": Shape("olmo2", 16, 2048, 16, 16, 128, 8192, 100352, False, "dense"),
}


def upcycled(shape: Shape, kind: Kind = "block", num_experts: int = 4, experts_per_token: int = 1) -> Shape:
    """The shape that upcycling a dense shape gives; the head becomes a tensor of its own (model.md 5.6)."""
    return replace(shape, kind=kind, E=num_experts, K=experts_per_token, tied=shape.tied if kind == "dense" else False)


def shape_from_config(config: Mapping[str, Any], where: str = "config") -> Shape:
    """Read a shape from the fields of a ``config.json``: ours, an official one, or that of a dense backbone."""
    try:
        model_type, architectures = str(config["model_type"]), " ".join(config.get("architectures") or [])
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        numbers = {
            "L": int(config.get("backbone_num_layers") or config["num_hidden_layers"]),
            "H": hidden,
            "A": heads,
            "G": int(config.get("num_key_value_heads") or heads),
            "D": int(config.get("head_dim") or hidden // heads),
            "F": int(config["intermediate_size"]),
            "V": int(config["vocab_size"]),
        }
    except KeyError as missing:
        raise ValueError(f"{where}: field {missing} is missing; expected the config.json of a model") from None
    experts = config.get("num_experts")
    if model_type == "micro":
        family, kind = str(config["backbone"]), config.get("block_type", "block")
    else:
        words = f"{model_type} {architectures}".lower()
        family = "olmo2" if "olmo" in words else "llama" if "llama" in words else model_type
        kind = "dense" if not experts else "ffn" if "moe" in words else "block"
    if kind == "dense":
        return Shape(family, tied=bool(config.get("tie_word_embeddings", False)), kind="dense", **numbers)
    tied = model_type == "micro" and bool(config.get("tie_word_embeddings", False))
    chosen = int(config.get("num_experts_per_tok") or 1)
    width = int(config.get("router_hidden_size") or 0)
    return Shape(family, tied=tied, kind=kind, E=int(experts or 4), K=chosen, router=width, **numbers)


def shape_of(source: object) -> Shape:
    """The shape of a published backbone's name, a model folder, a configuration object or a model."""
    if isinstance(source, Shape):
        return source
    if isinstance(source, (str, Path)):
        if str(source) in BACKBONES:
            return BACKBONES[str(source)]
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            known = ", ".join(BACKBONES)
            raise ValueError(f"estimate: {source} is neither a folder with a config.json nor one of: {known}")
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{path}: not valid JSON: {problem}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
        return shape_from_config(fields, str(path))
    config = getattr(source, "config", source)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"estimate: expected a name, folder, configuration or model, got {type(source).__name__}")
    return shape_from_config(config.to_dict(), type(config).__name__)


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters and of tensors on disk.

    active: what one token uses with K experts and everything shared. touched: active plus the key and value projections
    of the other experts, which a block model also reads for each token (model.md 2.6). expert: one expert, all layers.
    """

    total: int
    active: int
    touched: int
    experts: int
    expert: int
    routers: int
    shared: int
    tensors: int


def parameters(shape: Shape) -> Parameters:
    """Parameters of a model (model.md 5.5: one block, one router, embedding, head, final norm)."""
    s = shape
    dense = s.kind == "dense"
    E = 1 if dense else s.E
    expert = s.L * (s.ffn if s.kind == "ffn" else s.attention + s.ffn + s.norms)
    shared = s.V * s.H * (1 if s.tied else 2) + s.H + (s.L * (s.attention + s.norms) if s.kind == "ffn" else 0)
    routers = s.L * s.router_parameters
    total = shared + E * expert + routers
    K = 1 if dense else s.K
    active = total - (E - K) * expert
    input_norm = s.H if s.family == "llama" else s.G * s.D  # the gain that keys need: of the input, or of the keys
    touched = active + ((E - K) * s.L * (s.kv + input_norm) if s.kind == "block" else 0)
    per_block = 9 if s.family == "llama" else 11
    per_layer = {"dense": per_block, "block": 2 + per_block * E, "ffn": per_block - 1 + 3 * E}
    return Parameters(
        total=total,
        active=active,
        touched=touched,
        experts=E * expert,
        expert=expert,
        routers=routers,
        shared=shared,
        tensors=(2 if s.tied else 3) + s.L * per_layer[s.kind],
    )


def trainable_parameters(shape: Shape, trainable: Trainable) -> int:
    """How many parameters a choice of what to train covers (model.md 6.1)."""
    p = parameters(shape)
    counts = {"all": p.total, "experts": p.experts, "but_routers": p.total - p.routers, "routers": p.routers}
    if trainable not in counts:
        raise ValueError(f"estimate: trainable {trainable!r} must be one of {', '.join(counts)}")
    return counts[trainable]


def cache_bytes(shape: Shape, tokens: int, dtype: str = "float32") -> int:
    """Keys and values of ``tokens`` tokens; a block model keeps those of every expert (model.md 3.1)."""
    experts = shape.E if shape.kind == "block" else 1
    return tokens * shape.L * experts * 2 * shape.G * shape.D * _bytes(dtype)


def activation_bytes(shape: Shape, tokens: int, dtype: str = "float32", *, checkpointing: bool = False) -> int:
    """What the forward pass keeps for the backward pass, for K experts per token (performance.md 4.4).

    Per token and layer: the layer's input, both normalised inputs, the stream after attention, queries, attention
    output, keys and values of all experts, and three FFN vectors. With checkpointing only the layer's input is kept,
    and one layer at a time is computed again.
    """
    s = shape
    heads = s.A * s.D
    if s.kind == "block":
        layer = s.H + s.K * (3 * s.H + 2 * heads + 3 * s.F) + s.E * 2 * s.G * s.D
    else:
        layer = 4 * s.H + 2 * heads + 2 * s.G * s.D + (s.K if s.kind == "ffn" else 1) * 3 * s.F
    return tokens * (s.L * s.H + layer if checkpointing else s.L * layer) * _bytes(dtype)


def inference_bytes(shape: Shape, tokens: int, dtype: str = "float32") -> int:
    """Weights and cache for ``tokens`` cached tokens (all rows together)."""
    return parameters(shape).total * _bytes(dtype) + cache_bytes(shape, tokens, dtype)


def training_bytes(
    shape: Shape,
    trainable: Trainable,
    tokens: int,
    precision: str = "float32",
    *,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Memory of one training step, by part, for ``tokens`` tokens in one micro batch.

    float32: weights, gradients and two AdamW moments at 4 bytes each (16 per trained parameter). bfloat16: weights and
    gradients at 2 bytes, master weights and moments at 4. Frozen parameters cost their weights only.
    """
    width, trained = _bytes(precision), trainable_parameters(shape, trainable)
    parts = {
        "weights": parameters(shape).total * width,
        "gradients": trained * width,
        "optimizer": trained * (8 if width >= 4 else 12) * (2 if width == 8 else 1),
        "activations": activation_bytes(shape, tokens, precision, checkpointing=checkpointing),
    }
    return {**parts, "total": sum(parts.values())}


def flops(shape: Shape, length: int, *, head: bool = True) -> dict[str, float]:
    """Floating-point operations of the forward pass per token, for sequences of ``length`` tokens (performance.md 2.1).

    Returns the parts: "gemm" (projections and FFN of what is computed), "router", "attention" (scores and values at the
    mean context length), "head".
    """
    if length < 1:
        raise ValueError(f"estimate: length {length} must be at least 1")
    s = shape
    scores = 4.0 * s.A * s.D * (length + 1) / 2
    if s.kind == "block":
        gemm = s.K * 2.0 * (s.attention - s.kv + s.ffn) + s.E * 2.0 * s.kv
        scores *= s.K
    else:
        gemm = 2.0 * s.attention + 2.0 * s.ffn * (s.K if s.kind == "ffn" else 1)
    parts = {
        "gemm": s.L * gemm,
        "router": s.L * 2.0 * s.router_parameters,
        "attention": s.L * scores,
        "head": 2.0 * s.H * s.V if head else 0.0,
    }
    return {**parts, "total": sum(parts.values())}


def training_flops(shape: Shape, trainable: Trainable, length: int) -> float:
    """Forward and backward passes per token (performance.md 2.1).

    The backward pass of a matrix costs two forward passes where it trains and one where gradients only pass through it;
    that of attention 2.5, because its scores are computed again.
    """
    parts = flops(shape, length)
    router_only = trainable == "routers"
    matrices = (parts["gemm"] + parts["head"]) * (2 if router_only else 3)
    frozen_router = trainable in ("experts", "but_routers")
    return matrices + parts["router"] * (1 if frozen_router else 3) + parts["attention"] * 3.5


@dataclass(frozen=True)
class StageCost:
    """One training stage: what trains, memory by part, operations per token and, with a speed, tokens per second."""

    name: str
    trainable: Trainable
    experts_per_token: int
    trained_parameters: int
    memory: dict[str, int]
    flops_per_token: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Estimate:
    """All figures for one model; ``to_dict()`` is what ``micro estimate --json`` prints."""

    shape: Shape
    parameters: Parameters
    precision: str
    length: int
    batch: int
    weight_bytes: int
    cache_bytes: int
    prefill_flops_per_token: float
    prefill_tokens_per_second: float | None
    stages: list[StageCost] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate(
    source: object,
    *,
    kind: Kind | None = None,
    num_experts: int = 4,
    experts_per_token: int | None = None,
    precision: str = "float32",
    length: int = 2048,
    batch: int = 1,
    checkpointing: bool = False,
    freeze: str = "r2",
    flops_per_second: float | None = None,
) -> Estimate:
    """Estimate a model, or what upcycling a dense backbone would give.

    source: the name of a published backbone (``BACKBONES``), a folder, a configuration or a model. kind: None leaves a
    model with experts as it is and takes dense backbones as a "block" model would come out of them; "dense" gives the
    backbone itself. batch rows of length tokens are assumed in memory at once. flops_per_second: the speed that time is
    computed from (None = no times).
    """
    if freeze not in STAGES:
        raise ValueError(f"estimate: freeze {freeze!r} must be one of {', '.join(STAGES)}")
    if batch < 1:
        raise ValueError(f"estimate: batch {batch} must be at least 1")
    shape = shape_of(source)
    if shape.kind != "dense" and kind is not None and kind != shape.kind:
        raise ValueError(f"estimate: the model is of kind {shape.kind!r} already and cannot be taken as {kind!r}")
    if shape.kind == "dense" and kind != "dense":
        shape = upcycled(shape, kind or "block", num_experts, experts_per_token or 1)
    elif experts_per_token is not None:
        shape = replace(shape, K=experts_per_token)
    forward = flops(shape, length)["total"]
    return Estimate(
        shape=shape,
        parameters=parameters(shape),
        precision=precision,
        length=length,
        batch=batch,
        weight_bytes=parameters(shape).total * _bytes(precision),
        cache_bytes=cache_bytes(shape, batch * length, precision),
        prefill_flops_per_token=forward,
        prefill_tokens_per_second=flops_per_second / forward if flops_per_second else None,
        stages=_stages(shape, freeze, batch * length, length, precision, checkpointing, flops_per_second),
    )


def _stages(
    shape: Shape,
    freeze: str,
    tokens: int,
    length: int,
    precision: str,
    checkpointing: bool,
    flops_per_second: float | None,
) -> list[StageCost]:
    plan: dict[str, tuple[Trainable, int]] = {"training": ("all", 1)} if shape.kind == "dense" else STAGES[freeze]
    costs = []
    for name, (trainable, chosen) in plan.items():
        stage = replace(shape, K=min(chosen, shape.E))
        work = training_flops(stage, trainable, length)
        costs.append(
            StageCost(
                name=name,
                trainable=trainable,
                experts_per_token=stage.K,
                trained_parameters=trainable_parameters(stage, trainable),
                memory=training_bytes(stage, trainable, tokens, precision, checkpointing=checkpointing),
                flops_per_token=work,
                tokens_per_second=flops_per_second / work if flops_per_second else None,
            )
        )
    return costs


def measure_flops_per_second(dtype: str = "float32", seconds: float = 0.3) -> float:
    """Speed of a matrix product on this machine, with the threads torch uses: a bound for everything else."""
    import torch

    _bytes(dtype)
    left, right = (torch.full((1024, 1024), 0.5, dtype=getattr(torch, dtype)) for _ in range(2))
    left @ right  # the first product allocates and chooses a kernel
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        left @ right
        done += 1
    return done * 2 * 1024**3 / elapsed


def _bytes(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"estimate: dtype {dtype!r} must be one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
