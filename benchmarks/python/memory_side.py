"""One side of the memory measurements, in a process of its own: prints one line of JSON.

python memory_side.py SIDE PROMPT NEW TRAINED THREADS quick|full
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import open_engine
from experiment import BF16, MissingError
from jobs import JOBS, ForwardBackward, Job
from lab import Lab, Models, Options
from resident import peak_above
from shapes import SMOLLM2_135M, prompt
from torch import Tensor

PREFILL_CHUNK = 512


def peak_of(job: Callable[[int], Job], tokens: int) -> dict[str, Any]:
    """A small run first, so that libraries and gradients have what they keep; then the peak of the real one."""
    small, real = job(8), job(tokens)
    small.prepare()
    small.run()
    tidy()
    results: list[Any] = []
    found = peak_above(lambda: results.append(real.run()))
    # Tokens are what the measured run gave; loss and gradients take a run from fresh gradients.
    outputs = real.outputs() if isinstance(real, ForwardBackward) else {"tokens": torch.as_tensor(results[0])}
    return {"bytes": found, "outputs": {name: tensor.tolist() for name, tensor in outputs.items()}}


def tidy() -> None:
    """Free memory goes back to the system, so that it is not counted as resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class EngineGenerate(Job):
    def __init__(self, engine: Any, ids: Tensor, new: int) -> None:
        super().__init__(engine, ids)
        self.new = new

    def run(self) -> Any:
        return self.model.generate(self.ids.tolist(), max_new_tokens=self.new + 1, stop_ids=[]).tokens

    def outputs(self) -> dict[str, Tensor]:
        return {"tokens": torch.tensor(self.run())}


def generation(models: Models, side: str, tokens: int, new: int) -> dict[str, Any]:
    if side == "engine":
        engine = open_engine(models.ours)
        models.ours = None
        tidy()
        return peak_of(lambda n: EngineGenerate(engine, prompt(models.shape, n), new), tokens)
    model = models.all_experts() if side.startswith("all_experts") else models.ours
    kind: Any = JOBS["whole_decode" if side.endswith("loop") else "whole_generate"]
    controls = {"prefill_chunk_size": PREFILL_CHUNK} if side.endswith("chunked") else {}
    return peak_of(lambda n: kind(model, prompt(models.shape, n), new, controls), tokens)


def training(models: Models, side: str, tokens: int) -> dict[str, Any]:
    model = models.all_experts() if side.startswith("all_experts") else models.ours
    return peak_of(lambda n: JOBS["accumulate"](model, prompt(models.shape, n)), tokens)


def load(models: Models) -> dict[str, Any]:
    from micro.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        models.ours.save_pretrained(folder)
        models.ours = None
        tidy()
        kept: list[Any] = []
        peak = peak_above(lambda: kept.append(Engine.open(Path(folder))))
        return {"bytes": peak, "packed": kept[0].weight_bytes}


def main() -> None:
    side, tokens, new, trained, threads, quick = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6] == "quick"
    lab = Lab(Options(rounds=1, threads=threads, quick=quick))
    lab.start(side)
    models = lab.models(SMOLLM2_135M, BF16)
    lab.release()
    try:
        if side == "load":
            found = load(models)
        elif side.endswith("training"):
            found = training(models, side, trained)
        else:
            found = generation(models, side, tokens, new)
    except MissingError as missing:
        found = {"missing": str(missing)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
