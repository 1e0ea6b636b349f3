"""Training: forward and backward, whole steps, the optimizer and the loss (G9, G11)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from experiment import BF16, FP32, Experiment, Table, wants
from goals import Line
from jobs import ForwardBackward, Step
from lab import Lab, Side
from machine import StreamProbe, available_bytes
from outputs import MismatchError, compare
from paired import looped, seconds_of
from shapes import SMOLLM2_135M, prompt
from torch import Tensor

from micro import ops
from micro.optim import AdamW

CHUNKED = "F.linear_cross_entropy in chunks"
SLOW = 3  # times the fastest way: then one look is enough
MASTERS_BYTES = 20e9  # what both sides of G9b need together in full depth


def forward_backward(lab: Lab, tokens: int) -> Iterator[Line]:
    """BF16 weights on all sides, one sequence, loss on all tokens."""
    over, dense = f"G9a/{tokens}", f"G9d/{tokens}"
    models = lab.models(SMOLLM2_135M, BF16)
    ids = prompt(models.shape, lab.size(tokens))
    sides: dict[str, Side] = {"ours": ForwardBackward(models.ours, ids)}
    compared: dict[str, dict[str, float]] = {}
    if wants(lab, over):
        sides["theirs"] = lab.reference(models, "forward_backward", ids)
        compared["theirs"] = compare("training", sides["ours"].outputs(), sides["theirs"].outputs(), BF16)
    if wants(lab, dense):
        sides["dense"] = ForwardBackward(models.dense, ids)
        forced = ForwardBackward(models.ours, ids, {"force": models.ours.config.expert_names[0]}).outputs()
        compared["dense"] = compare("training, forced to expert 0", forced, sides["dense"].outputs(), BF16)
    table = Table(lab, lab.rounds({name: side.seconds for name, side in sides.items()}))
    for key, side, against in ((over, "theirs", lab.reference_name), (dense, "dense", "dense transformers, sdpa")):
        if side in sides:
            yield table.line(key, "ours", side, against, compared[side])
    models.ours.eval().zero_grad(set_to_none=True)


def our_optimizer(parameters: list[Tensor]) -> AdamW:
    return AdamW(parameters, lr=Step.rate, weight_decay=Step.decay, max_grad_norm=Step.clip)


def step_with_masters(lab: Lab) -> Iterator[Line]:
    """bfloat16 weights with float32 masters in our optimizer, against float32 weights under autocast."""
    shape, note = SMOLLM2_135M, ""
    if not lab.options.quick and available_bytes() < MASTERS_BYTES:
        shape, note = _half_depth(shape), "15 of 30 layers: there is no memory for both sides in full depth"
    lab.release()
    models = lab.models(shape, BF16)
    ids = prompt(models.shape, lab.size(512))
    theirs: Side
    if lab.official is not None:
        lab.official.load(models.ours, dtype=FP32)
        theirs = lab.official.job("step", ids, autocast=True)
    else:
        theirs = Step(models.all_experts(share=False, dtype=FP32), ids, autocast=True)
    yield _steps(lab, "G9b", Step(models.ours, ids, optimizer=our_optimizer), theirs, note)


def _half_depth(shape: Any) -> Any:
    from dataclasses import replace

    return replace(shape, layers=shape.layers // 2)


def stage_2_step(lab: Lab) -> Iterator[Line]:
    """Two experts per token, only the routers learn."""
    lab.release()
    models = lab.models(SMOLLM2_135M, BF16)
    ids = prompt(models.shape, lab.size(512))
    theirs: Side
    if lab.official is not None:
        lab.official.load(models.ours, experts_per_token=2)
        theirs = lab.official.job("step", ids, routers_only=True)
    else:
        theirs = Step(models.all_experts(2, share=False), ids, routers_only=True)
    ours = Step(models.ours, ids, {"experts_per_token": 2}, routers_only=True, optimizer=our_optimizer)
    yield _steps(lab, "G9c", ours, theirs, "")


def _steps(lab: Lab, key: str, ours: Side, theirs: Side, note: str) -> Line:
    """Compare three steps, then time; the models have learnt afterwards and are let go."""
    got, want = ours.outputs(), theirs.outputs()
    if not bool(got["losses"].diff().abs().min() > 0):
        raise MismatchError(f"{key}: the loss did not change from step to step, so nothing was learnt")
    compared = compare(key, got, want, BF16)
    table = Table(lab, lab.rounds({"ours": ours.seconds, "theirs": theirs.seconds}))
    line = table.line(key, "ours", "theirs", lab.reference_name, compared, note=note)
    lab.release()
    return line


# ---- optimizer and loss ----------------------------------------------------------------------------------------------


def optimizer(lab: Lab) -> Iterator[Line]:
    """One step over as many parameters as one expert has, float32."""
    shape = lab.shape(SMOLLM2_135M)
    lab.release()
    torch.manual_seed(0)
    sizes = [(shape.inner, shape.hidden)] * (3 * shape.layers) + [(shape.hidden, shape.hidden)] * (2 * shape.layers)
    start = [torch.randn(size) for size in sizes]
    gradients = [torch.randn(size) for size in sizes]
    makers: dict[str, Callable[[list[Tensor]], Any]] = {
        "ours": lambda p: AdamW(p, lr=1e-3),
        "default": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    }
    parameters, steps = {}, {}
    for name, make in makers.items():
        parameters[name] = [t.clone().requires_grad_() for t in start]
        for p, g in zip(parameters[name], gradients, strict=True):
            p.grad = g
        steps[name] = make(parameters[name]).step
        steps[name]()
    moved = {
        name: {"step": torch.cat([(p.detach() - s).flatten() for p, s in zip(parameters[name], start, strict=True)])}
        for name in makers
    }
    compared = {
        name: compare(f"AdamW against torch's {name}", moved["ours"], moved[name], FP32)["step"]
        for name in ("default", "fused")
    }
    with closing(StreamProbe(lab.options.threads, "copy")) as probe:
        steps["fused with norm"] = partial(_with_norm, steps["fused"], gradients)
        timed = {name: partial(seconds_of, step) for name, step in steps.items()}
        table = Table(lab, lab.rounds({**timed, "copy": probe.seconds}))
    count = sum(t.numel() for t in start)
    note = f"{count / 1e6:.0f} M parameters"
    line = table.line("G11/bandwidth", "ours", "copy", "memcpy", compared, factor=28 * count / 1e9, note=note)
    line.theirs = f"{1 / table.rounds.median('copy'):.1f} GB/s"
    yield line
    for name in ("default", "fused", "fused with norm"):
        yield table.line(f"G11/{name}", "ours", name, f"torch.optim.AdamW, {name}", compared, note=note)


def _with_norm(step: Callable[[], object], gradients: list[Tensor]) -> None:
    """What ours does in every step: the norm, without which a gradient that is not finite would be applied."""
    if torch.nn.utils.get_total_norm(gradients).isfinite():
        step()


def loss(lab: Lab) -> Iterator[Line]:
    """Head and cross-entropy, forward and backward; every second token is masked."""
    shape = lab.shape(SMOLLM2_135M)
    tokens = lab.size(2048)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, shape.hidden, dtype=BF16).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.hidden) * shape.hidden**-0.5).to(BF16).requires_grad_()
    targets = torch.randint(shape.vocabulary, (tokens,))
    targets[::2] = -100
    count = (targets != -100).sum()
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.cross_entropy(hidden, weight, targets) / count,
        "linear + cross_entropy": lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets),
    }
    if hasattr(F, "linear_cross_entropy"):  # without options it sums in bfloat16, which is another loss
        options = torch.nn.LinearCrossEntropyOptions()
        ways[CHUNKED] = lambda: F.linear_cross_entropy(hidden, weight, targets, options=options)

    def both(way: Callable[[], Tensor]) -> dict[str, Tensor]:
        value = way()
        hidden_grad, head_grad = torch.autograd.grad(value, (hidden, weight))
        return {"loss": value.detach().float(), "grad hidden": hidden_grad.flatten(), "grad head": head_grad.flatten()}

    ours = both(ways["ours"])
    compared, took = {}, {}
    for name in [name for name in ways if name != "ours"]:
        lab.say(f"comparing with {name}")
        begin = time.perf_counter()
        theirs = both(ways[name])
        took[name] = time.perf_counter() - begin
        compared[name] = max(compare(name, ours, theirs, BF16).values())
    slow = [name for name in took if took[name] > SLOW * min(took.values())]
    sides = {name: looped(partial(both, way)) for name, way in ways.items() if name not in slow}
    table = Table(lab, lab.rounds(sides))
    faster = min((name for name in sides if name != "ours"), key=table.rounds.median)
    note = ", ".join(f"{name} took {took[name]:.1f} s once and was left out" for name in slow)
    yield table.line("G11/loss", "ours", faster, faster, compared, note=note)


EXPERIMENTS = [
    Experiment("training_512", ("G9a/512", "G9d/512"), 6, partial(forward_backward, tokens=512)),
    Experiment("training_1024", ("G9a/1024", "G9d/1024"), 12, partial(forward_backward, tokens=1024)),
    Experiment("stage_2_step", ("G9c",), 5, stage_2_step),
    Experiment("step_with_masters", ("G9b",), 8, step_with_masters),
    Experiment("optimizer", ("G11/bandwidth", "G11/default", "G11/fused", "G11/fused with norm"), 0.7, optimizer),
    Experiment("loss", ("G11/loss",), 1, loss),
]
