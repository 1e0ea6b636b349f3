"""Prefill: over the official way, against the dense model, with length and with threads (G1, G1b, G2, G2b, growth)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch
from engine import EnginePrefill, open_engine
from experiment import BF16, DTYPES, Experiment, Table, wants
from goals import Line, Skipped
from jobs import Prefill
from lab import Lab, Models, Side
from outputs import compare
from shapes import LLAMA_1B, OLMO2_1B, SMOLLM2_135M, Shape, prompt

DENSE = "dense transformers, sdpa"


def prefill(lab: Lab, shape: Shape, dtype: str, tokens: int, over: str | None, dense: str | None) -> Iterator[Line]:
    """One forward over a prompt; ``over`` and ``dense`` are the goals against the official way and the dense model."""
    models = lab.models(shape, DTYPES[dtype])
    ids = prompt(models.shape, lab.size(tokens))
    sides: dict[str, Side] = {"ours": Prefill(models.ours, ids), "fast": Prefill(models.fast, ids)}
    traced = Prefill(models.ours, ids, {"output_routing": True}).outputs()
    fast = compare("fast numerics against the reference mode", sides["fast"].outputs(), traced, models.dtype)
    compared: dict[str, dict[str, float]] = {}
    if over is not None and wants(lab, over):
        sides["theirs"] = lab.reference(models, "prefill", ids)
        compared["theirs"] = compare("ours against the official way", traced, sides["theirs"].outputs(), models.dtype)
    if dense is not None and wants(lab, dense):
        sides["dense"] = Prefill(models.dense, ids)
        compared["dense"] = against_dense(models, ids)
        sides["engine"] = EnginePrefill(open_engine(models.ours), ids)
        last = {"logits": traced["logits"][:, -1:]}
        compared["engine"] = compare("engine against the model", sides["engine"].outputs(), last, models.dtype)
    table = Table(lab, lab.rounds({name: side.seconds for name, side in sides.items()}))
    note = f"fast numerics differ by {fast['logits']:.2g}"
    if "theirs" in sides and over is not None:
        yield table.line(over, "ours", "theirs", lab.reference_name, compared["theirs"], fast="fast", note=note)
    if "dense" in sides and dense is not None:
        yield table.line(dense, "ours", "dense", DENSE, compared["dense"], fast="fast", note=note)
        yield table.line(f"{dense}/engine", "engine", "dense", DENSE, compared["engine"], note="packed weights")


def against_dense(models: Models, ids: torch.Tensor) -> dict[str, float]:
    """With every token forced to expert 0 a mixture is the dense model of that expert's blocks."""
    forced = Prefill(models.ours, ids, {"force": models.ours.config.expert_names[0]}).outputs()
    return compare(
        "ours, forced to expert 0, against dense", forced, Prefill(models.dense, ids).outputs(), models.dtype
    )


def growth(lab: Lab) -> Iterator[Line]:
    """Time per token at two lengths, against the growth of the arithmetic."""
    models = lab.models(SMOLLM2_135M, BF16)
    lengths = {name: lab.size(tokens) for name, tokens in (("long", 4096), ("short", 512))}
    sides = {name: Prefill(models.ours, prompt(models.shape, tokens)) for name, tokens in lengths.items()}
    longest = sides["long"].outputs()
    again = compare("the same call twice", sides["long"].outputs(), longest, models.dtype)
    table = Table(lab, lab.rounds({name: side.seconds for name, side in sides.items()}))
    flops = models.shape.forward_flops(lengths["long"]) / models.shape.forward_flops(lengths["short"])
    factor = lengths["short"] / lengths["long"] / flops
    note = f"FLOP ratio per token {flops:.2f}"
    yield table.line("growth", "long", "short", "T = 512", again, factor=factor, note=note)


def threads(lab: Lab) -> Iterator[Line | Skipped]:
    """One thread and two, in turn."""
    if (os.cpu_count() or 1) < 2:
        yield Skipped("threads", "this machine has one CPU")
        return
    models = lab.models(SMOLLM2_135M, BF16)
    job = Prefill(models.ours, prompt(models.shape, lab.size(512)))

    def seconds(count: int) -> float:
        torch.set_num_threads(count)
        try:
            return job.seconds()
        finally:
            torch.set_num_threads(lab.options.threads)

    one = job.outputs()
    torch.set_num_threads(2)
    compared = compare("two threads against one", job.outputs(), one, models.dtype)
    table = Table(lab, lab.rounds({"two": partial(seconds, 2), "one": partial(seconds, 1)}))
    note = f"load {os.getloadavg()[0]:.2f} at the end"
    yield table.line("threads", "two", "one", "one thread", compared, note=note)


EXPERIMENTS = [
    Experiment(
        "prefill_512",
        ("G1/512/bf16", "G2/512", "G2/512/engine"),
        2,
        partial(prefill, shape=SMOLLM2_135M, dtype="bf16", tokens=512, over="G1/512/bf16", dense="G2/512"),
    ),
    Experiment(
        "prefill_64",
        ("G2/64", "G2/64/engine"),
        0.3,
        partial(prefill, shape=SMOLLM2_135M, dtype="bf16", tokens=64, over=None, dense="G2/64"),
    ),
    Experiment(
        "prefill_2048",
        ("G1/2048/bf16", "G2/2048", "G2/2048/engine"),
        7,
        partial(prefill, shape=SMOLLM2_135M, dtype="bf16", tokens=2048, over="G1/2048/bf16", dense="G2/2048"),
    ),
    Experiment("growth", ("growth",), 2, growth),
    Experiment("two_threads", ("threads",), 0.5, threads),
    *(
        Experiment(
            f"prefill_1b_{shape.backbone}",
            (f"G1b/{shape.backbone}", f"G2b/{shape.backbone}", f"G2b/{shape.backbone}/engine"),
            2.5,
            partial(
                prefill,
                shape=shape,
                dtype="bf16",
                tokens=512,
                over=f"G1b/{shape.backbone}",
                dense=f"G2b/{shape.backbone}",
            ),
        )
        for shape in (LLAMA_1B, OLMO2_1B)
    ),
    *(
        Experiment(
            f"prefill_{tokens}_fp32",
            (f"G1/{tokens}/fp32",),
            minutes,
            partial(prefill, shape=SMOLLM2_135M, dtype="fp32", tokens=tokens, over=f"G1/{tokens}/fp32", dense=None),
        )
        for tokens, minutes in ((512, 2.5), (2048, 11))
    ),
]
