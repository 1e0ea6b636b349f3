"""What the launches of one layer would cost on a GPU if nothing but bytes, products and launches counted (C10).

A model, not a measurement: max(bytes / bandwidth, FLOP / peak) + 3 microseconds for every launch. No caches, no waves,
no latency of memory, no overlap between launches. It tells which launches are bound by what, and what a change of the
plan is worth; it tells no time.

    python benchmarks/python/gpu_model.py [--tokens 512,2048] [--layer]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from shapes import EXPERTS, LLAMA_1B, SMOLLM2_135M, Shape

SHAPES = (SMOLLM2_135M, LLAMA_1B)

LAUNCH_SECONDS = 3e-6
ELEMENT = 2  # bytes of bfloat16
MANY_ROWS, FEW_ROWS = 128, 32  # rows of a tile of the grouped product; few where an expert has at most two such tiles
SPLIT_KEYS, SPLIT_QUERIES = 256, 4  # so few queries split the keys behind them, and merge in a launch more
ATTENTION_WASTE = 1.25  # score tiles that are worked off over those that are needed, at most (C6)


@dataclass(frozen=True)
class Device:
    """Published peaks. mma.sync, which these kernels use, reaches about 0.6 of what an H100 has with wgmma."""

    name: str
    flops: float
    bandwidth: float  # bytes a second


DEVICES = (
    Device("A100 80 GB", 312e12, 2.0e12),
    Device("H100, mma.sync", 0.6 * 989e12, 3.0e12),
    Device("RTX 4090", 165e12, 1.0e12),
)


@dataclass(frozen=True)
class Launch:
    name: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        return max(self.bytes / device.bandwidth, self.flops / device.flops) + LAUNCH_SECONDS

    def bound(self, device: Device) -> str:
        memory, products = self.bytes / device.bandwidth, self.flops / device.flops
        if max(memory, products) < LAUNCH_SECONDS:
            return "launch"
        return "bytes" if memory > products else "products"


def product(name: str, rows: int, width: int, outputs: int, *, matrices: int, stacked: bool = False) -> Launch:
    """A grouped product: every matrix once, inputs and outputs once, and whole row tiles of products.

    stacked: all rows go through all matrices; else each row through one of them, spread evenly.
    """
    share = rows if stacked else math.ceil(rows / matrices)
    used = matrices if stacked else min(matrices, rows)
    tile = FEW_ROWS if rows <= 2 * FEW_ROWS * (1 if stacked else matrices) else MANY_ROWS
    tiles = used * math.ceil(share / tile) * tile
    moved = rows * width + used * outputs * width + (matrices if stacked else 1) * rows * outputs
    return Launch(name, 2.0 * tiles * width * outputs, ELEMENT * float(moved))


def layer(shape: Shape, tokens: int, keys: int) -> list[Launch]:
    """The launches of one whole-block layer, top-1, in their order; `keys` slots are filled when it is through."""
    hidden, heads, groups = shape.hidden, shape.heads * shape.head_dim, shape.groups * shape.head_dim
    rows = float(tokens * hidden * ELEMENT)
    made = product("", tokens, hidden, 2 * groups, matrices=EXPERTS, stacked=True)
    asked = product("", tokens, hidden, heads, matrices=EXPERTS)
    past = (keys - tokens) + (tokens + 1) / 2
    read = 2.0 * min(EXPERTS, tokens) * groups * keys  # once: tiles find them in the second cache
    attention = Launch(
        "attention",
        ATTENTION_WASTE * 4.0 * tokens * heads * past,
        ELEMENT * (2.0 * tokens * heads + read),
    )
    gated = product("gate, up, SwiGLU", tokens, hidden, 2 * shape.inner, matrices=EXPERTS)
    splits = math.ceil(keys / SPLIT_KEYS) if tokens <= SPLIT_QUERIES else 1
    merge = Launch("attention, merge", 0.0, (4.0 * splits + ELEMENT) * tokens * heads)
    return [
        product("router, first map", tokens, hidden, hidden, matrices=1),
        Launch("token: statistic, router, decision", 2.0 * tokens * hidden * EXPERTS, 2 * rows),
        Launch("plan", 0.0, 20.0 * tokens),
        Launch("keys, values, queries", made.flops + asked.flops, made.bytes + asked.bytes),
        attention,
        *([merge] if splits > 1 else []),
        product("output, residual", tokens, heads, hidden, matrices=EXPERTS),
        Launch("statistics", 0.0, rows),
        Launch(gated.name, gated.flops, gated.bytes - ELEMENT * tokens * shape.inner),
        product("down, residual", tokens, shape.inner, hidden, matrices=EXPERTS),
    ]


def layer_table(shape: Shape, tokens: int, keys: int, device: Device) -> str:
    lines = [f"{shape.name}, {tokens} tokens, {keys} keys, {device.name} (model, not measured)"]
    for launch in layer(shape, tokens, keys):
        lines.append(
            f"  {launch.name:<36}{launch.flops / 1e9:>10.3f} GFLOP{launch.bytes / 1e6:>10.2f} MB"
            f"{launch.seconds(device) * 1e6:>9.1f} us  {launch.bound(device)}"
        )
    return "\n".join(lines)


def summary(prompts: list[int]) -> str:
    """One line per shape and length: the layers' time per device, head and embedding left out."""
    lines = [
        "Model, not measured: milliseconds of all layers, bfloat16, top-1, uniform routing.",
        "",
        "| shape | tokens | " + " | ".join(d.name for d in DEVICES) + " |",
        "|---|---|" + "---|" * len(DEVICES),
    ]
    for shape in SHAPES:
        for tokens, keys in [*((n, n) for n in prompts), (1, 512)]:
            name = f"{tokens}" if tokens > 1 else "1 behind 511"
            times = [shape.layers * sum(x.seconds(d) for x in layer(shape, tokens, keys)) for d in DEVICES]
            lines.append(f"| {shape.name} | {name} | " + " | ".join(f"{t * 1e3:.2f}" for t in times) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", default="512,2048", help="lengths of prompts, comma-separated")
    parser.add_argument("--layer", action="store_true", help="also every launch of one layer")
    arguments = parser.parse_args()
    prompts = [int(part) for part in arguments.tokens.split(",")]
    print(summary(prompts))
    if arguments.layer:
        for shape in SHAPES:
            for tokens in prompts:
                print("\n" + layer_table(shape, tokens, tokens, DEVICES[0]))


if __name__ == "__main__":
    main()
