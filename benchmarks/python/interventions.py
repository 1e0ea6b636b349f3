"""What actions on activations cost: ratios of prefill times, in one run.

    python benchmarks/python/interventions.py --shape SmolLM2-135M --tokens 256

An empty block is free (ratio 1). Reading takes a layer's operators one by one; in the engine it stays one call, whose
rows are copied.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from paired import ROUNDS, Ratio, looped, rounds
from shapes import LLAMA_1B, OLMO2_1B, SMOLLM2_135M, Shape, fill, prompt, small

from micro import interventions as iv
from micro.modeling import MiCRoConfig, MiCRoForCausalLM

SHAPES = {shape.name: shape for shape in (SMOLLM2_135M, LLAMA_1B, OLMO2_1B)}

BLOCKS: dict[str, list[iv.Action]] = {
    "empty block": [],
    "read block_output": [iv.read("block_output")],
    "moments of units": [iv.moments("units")],
    "zero 1 head": [iv.zero("heads", heads=[0])],
}


def sides(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Prefill under each block, by the model and by the engine."""
    engine = model.engine()

    @torch.no_grad()
    def by_model(actions: list[iv.Action] | None) -> None:
        with nullcontext() if actions is None else model.intervene(*actions):
            model(ids, use_cache=False, logits_to_keep=1)

    def by_engine(actions: list[iv.Action]) -> None:
        engine.reset()
        engine.prefill(ids, interventions=actions)

    found: dict[str, Callable[[], Any]] = {"model": lambda: by_model(None), "engine": lambda: by_engine([])}
    for name, actions in BLOCKS.items():
        found[f"model, {name}"] = lambda actions=actions: by_model(actions)  # type: ignore[misc]
        found[f"engine, {name}"] = lambda actions=actions: by_engine(actions)  # type: ignore[misc]
    return found


def measured(shape: Shape, tokens: int, count: int) -> dict[str, Ratio]:
    """Time under each block over the time without one."""
    config = MiCRoConfig(backbone=shape.backbone, **shape.fields())
    model = MiCRoForCausalLM(config).to(torch.bfloat16).eval()
    fill(model, shape)
    taken = rounds({name: looped(run) for name, run in sides(model, prompt(shape, tokens)).items()}, count)
    return {name: taken.ratio(name, name.split(",")[0]) for name in taken.seconds if "," in name}


def main() -> None:
    """Prints one line per block, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default=SMOLLM2_135M.name)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--small", action="store_true", help="a tiny model: shows that it runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    shape = small(SHAPES[options.shape]) if options.small else SHAPES[options.shape]
    ratios = measured(shape, options.tokens, options.rounds)
    if options.json:
        print(json.dumps({name: vars(ratio) for name, ratio in ratios.items()}, indent=2))
        return
    for name, ratio in ratios.items():
        print(f"{name:<30} {ratio}")


if __name__ == "__main__":
    main()
