"""The goals: what is measured, and which floor and target it has (performance.md 7.1 and 7.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from paired import Ratio


@dataclass(frozen=True)
class Goal:
    """One line of the table. ``better``: whether a large or a small figure is good. Without floor: only reported."""

    key: str
    what: str
    better: Literal["higher", "lower"]
    floor: float | None = None
    target: float | None = None

    @property
    def name(self) -> str:
        return self.key.split("/")[0]

    def reached(self, value: float) -> Literal["target", "floor", "missed", ""]:
        if self.floor is None or self.target is None:
            return ""
        sign = 1 if self.better == "higher" else -1
        if sign * value >= sign * self.target:
            return "target"
        return "floor" if sign * value >= sign * self.floor else "missed"


def _goals(better: Literal["higher", "lower"], *rows: tuple[str, str, float | None, float | None]) -> list[Goal]:
    return [Goal(key, what, better, floor, target) for key, what, floor, target in rows]


GOALS = [
    *_goals(
        "higher",
        ("G1/512/bf16", "prefill over official, T = 512, BF16", 4.0, 5.5),
        ("G1/2048/bf16", "prefill over official, T = 2048, BF16", 4.0, 5.5),
        ("G1/512/fp32", "prefill over official, T = 512, fp32", 3.5, 4.0),
        ("G1/2048/fp32", "prefill over official, T = 2048, fp32", 3.5, 4.0),
        ("G1b/llama", "prefill over official, Llama-1B shape, 4 layers, T = 512", 3.3, 4.0),
        ("G1b/olmo2", "prefill over official, OLMo-2-1B shape, 4 layers, T = 512", 2.6, 3.3),
    ),
    *_goals(
        "lower",
        ("G2/512", "prefill time over dense transformers, T = 512", 0.95, 0.75),
        ("G2/512/engine", "the same, engine", 0.95, 0.75),
        ("G2/2048", "prefill time over dense transformers, T = 2048", 1.2, 1.2),
        ("G2/2048/engine", "the same, engine", 1.2, 1.2),
        ("G2/64", "prefill time over dense transformers, T = 64", None, None),
        ("G2/64/engine", "the same, engine", None, None),
        ("G2b/llama", "prefill time over dense, Llama-1B shape, 4 layers, T = 512", 1.0, 0.9),
        ("G2b/llama/engine", "the same, engine", 1.0, 0.9),
        ("G2b/olmo2", "prefill time over dense, OLMo-2-1B shape, 4 layers, T = 512", 1.25, 1.1),
        ("G2b/olmo2/engine", "the same, engine", 1.25, 1.1),
    ),
    *_goals(
        "higher",
        ("G3/512/forward", "decode over official, 512 keys, loop over forward", 5, 8),
        ("G3/512/generate", "decode over official, 512 keys, generate() on both sides", 5, 8),
        ("G3/512/engine", "decode over official, 512 keys, engine", 5, 8),
        ("G3/4096/forward", "decode over official, 4096 keys, loop over forward", 8, 15),
        ("G3/4096/generate", "decode over official, 4096 keys, generate() on both sides", 8, 15),
        ("G3/4096/engine", "decode over official, 4096 keys, engine", 8, 15),
        ("G3b/forward", "decode over dense transformers, 512 keys, loop over forward", 3, 5),
        ("G3b/generate", "decode over dense transformers, 512 keys, generate() on both sides", 3, 5),
        ("G3b/engine", "decode over dense transformers, 512 keys, engine", 3, 5),
        ("G3c/forward", "batched decode over official, 8 rows, 128 keys, loop over forward", 5, 8),
        ("G3c/engine", "batched decode over official, 8 rows, 128 keys, engine", 5, 8),
        ("G4/forward", "decode: bytes needed x tokens/s over read bandwidth, loop over forward", 0.60, 0.80),
        ("G4/engine", "decode: bytes needed x tokens/s over read bandwidth, engine", 0.60, 0.80),
        ("G5/prefill", "engine over llama.cpp on the dense model, prefill of 512", 1.3, 2.0),
        ("G5/decode", "engine over llama.cpp on the dense model, decode", 0.9, 1.2),
        ("G6/512", "FFN-expert block over transformers' experts, T = 512", 1.2, 1.6),
        ("G6/32", "FFN-expert block over transformers' experts, T = 32", 1.5, 2.2),
        ("G6/1", "FFN-expert block over transformers' experts, T = 1", 1.5, 2.5),
        ("G7/128", "grouped gathered GEMM over BF16 peak, 128 rows per expert, cold weights", 0.80, 0.90),
        ("G7/16", "grouped gathered GEMM over BF16 peak, 16 rows per expert, cold weights", 0.55, 0.70),
    ),
    *_goals(
        "lower",
        ("G8/forward/bf16", "expert attention over causal SDPA, T = 2048, BF16, forward", 1.2, 0.6),
        ("G8/backward/bf16", "expert attention over causal SDPA, T = 2048, BF16, forward + backward", 1.4, 0.7),
        ("G8/forward/fp32", "expert attention over causal SDPA, T = 2048, fp32, forward", 1.2, 0.6),
        ("G8/backward/fp32", "expert attention over causal SDPA, T = 2048, fp32, forward + backward", 1.4, 0.7),
        ("G8/forward/runs", "expert attention over causal SDPA, T = 2048, BF16, runs of 8 tokens, forward", 1.2, 0.6),
        (
            "G8/backward/runs",
            "expert attention over causal SDPA, T = 2048, BF16, runs of 8 tokens, forward + backward",
            1.4,
            0.7,
        ),
    ),
    *_goals(
        "higher",
        ("G9a/512", "forward + backward over official, T = 512", 3.0, 4.5),
        ("G9a/1024", "forward + backward over official, T = 1024", 3.0, 4.5),
        ("G9b", "whole step with fp32 masters over official under autocast, T = 512", 2.5, 3.5),
        ("G9c", "stage-2 step over official without expert dW, top-2, T = 512", 2.0, 3.0),
    ),
    *_goals(
        "lower",
        ("G9d/512", "forward + backward time over dense transformers, T = 512", 1.3, 0.9),
        ("G9d/1024", "forward + backward time over dense transformers, T = 1024", 1.3, 0.9),
        ("G10/engine", "peak memory above the weights, 4 k prompt + 64 tokens, engine over official", 0.6, 0.5),
        ("G10/generate", "peak memory above the weights, 4 k prompt + 64 tokens, generate() over official", 0.6, 0.5),
        ("G10/generate/chunked", "the same, generate(prefill_chunk_size=512)", 0.6, 0.5),
        (
            "G10/all_logits",
            "peak memory, 4 k prompt + 64 tokens, engine over official generation (all logits)",
            0.6,
            0.5,
        ),
        (
            "G10/training",
            "peak memory of forward + backward above weights and gradients, T = 2048, over official",
            0.4,
            0.3,
        ),
        ("G10/load", "resident peak while the engine loads, over packed bytes", 1.3, 1.1),
    ),
    *_goals(
        "higher",
        ("G11/bandwidth", "fused AdamW: bytes/s (28 B a parameter) over memcpy", 0.7, 0.9),
        ("G11/default", "fused AdamW over torch's default AdamW", 1.5, 2.5),
        ("G11/fused", "fused AdamW and gradient norm over torch's fused AdamW without a norm", 1.0, 1.0),
        ("G11/fused with norm", "fused AdamW and gradient norm over torch's fused AdamW and norm", 1.0, 1.0),
    ),
    *_goals(
        "lower",
        ("G11/loss", "head and loss in chunks over the faster of two torch ways, half the tokens masked", 0.7, 0.55),
        (
            "G12/128",
            "price of invariance: grouped GEMM, 128 rows per expert, over the fastest free variant",
            1.15,
            1.05,
        ),
        ("G12/16", "price of invariance: grouped GEMM, 16 rows per expert, over the fastest free variant", 1.15, 1.05),
        ("G12/1", "price of invariance: grouped GEMM, 1 row per expert, over the fastest free variant", 1.15, 1.05),
        ("growth", "our time per token at T = 4096 over 512, divided by the FLOP ratio", 1.3, 1.2),
    ),
    *_goals("higher", ("threads", "two threads over one, prefill T = 512", 1.6, 1.8)),
]
BY_KEY = {goal.key: goal for goal in GOALS}
NAMES = list(dict.fromkeys(goal.name for goal in GOALS))


@dataclass
class Line:
    """A measured goal. ``ours`` and ``theirs``: what each side took, in words; ``fast``: in fast numerics."""

    key: str
    value: Ratio
    ours: str
    theirs: str
    against: str
    compared: dict[str, float]
    fast: Ratio | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.key not in BY_KEY:
            raise KeyError(f"{self.key} is no goal")


@dataclass
class Skipped:
    """A goal that this run cannot measure, and what is missing for it."""

    key: str
    why: str
