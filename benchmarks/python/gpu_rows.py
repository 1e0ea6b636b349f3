"""What `make gpu-check` compares: the ratios of performance.md 7.1 and 7.6 that mean something on a GPU.

Every row takes a bench and yields results; it compares outputs before it times anything. Everything runs on any device:
with ``quick`` shapes on the CPU it only shows that it works.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jobs import JOBS, Decode, ForwardBackward, Prefill, Step, settle
from lab import Models, Side
from official import Official
from outputs import compare
from paired import Ratio, Rounds, Timed, rounds, seconds_of
from rows_kernels import Attention
from shapes import EXPERTS, LLAMA_1B, OLMO2_1B, REAL_VOCABULARY, SMOLLM2_135M, Shape, prompt, small
from torch import Tensor

from micro import ops
from micro.optim import AdamW

BF16, FP32 = torch.bfloat16, torch.float32
SHORTEST = 2e-3  # seconds of a timed region


@dataclass(frozen=True)
class Result:
    """One ratio. ``better``: "lower" is our time over theirs, "higher" theirs over ours."""

    name: str
    against: str
    better: str
    ratio: Ratio
    ours: float
    theirs: float
    differences: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        sign = "<=" if self.better == "lower" else "  "
        difference = max(self.differences.values(), default=0.0)
        times = f"{self.ours * 1e3:.3g} / {self.theirs * 1e3:.3g} ms"
        return f"{self.name:<34}{sign} {self.ratio!s:<24}{times:<22}{difference:<9.2g}{self.against}"


@dataclass
class Bench:
    """Where and how carefully."""

    device: torch.device
    quick: bool = False
    count: int = 7  # rounds
    official: Official | None = None
    _loaded: tuple[Any, ...] = (None, None, None)  # into the official classes: models, experts per token, dtype

    @property
    def others(self) -> str:
        """What the side that runs every expert is."""
        if self.official is None:
            return "all experts, eager"
        return f"official classes ({self.official.revision}, transformers {self.official.about['transformers']})"

    def shape(self, shape: Shape) -> Shape:
        if self.official is not None and shape.name in REAL_VOCABULARY:  # its padding index needs the real one
            shape = replace(shape, vocabulary=REAL_VOCABULARY[shape.name])
        return small(shape) if self.quick else shape

    def size(self, tokens: int) -> int:
        return max(8, tokens // 32) if self.quick else tokens

    def models(self, shape: Shape, dtype: torch.dtype = BF16) -> Models:
        """Drawn on the host, so that every device has the same weights."""
        models = Models(self.shape(shape), dtype)
        models.ours.to(self.device)
        models.dense.to(self.device)  # its frequencies; the weights are there
        return models

    def all_experts(
        self,
        models: Models,
        kind: str,
        ids: Tensor,
        *,
        k: int = 1,
        share: bool = True,
        dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> Side:
        """A job of the official classes, or of every expert in plain torch where there is no copy of them."""
        if self.official is None:
            return JOBS[kind](models.all_experts(k, share=share, dtype=dtype).to(self.device), ids, **arguments)
        loaded, experts, kept = self._loaded
        if loaded is not models or (experts, kept) != (k, dtype):
            self.official.load(models.ours, k, dtype, str(self.device))
            self._loaded = (models, k, dtype)
        return self.official.job(kind, ids, **arguments)

    def timed(self, call: Callable[[], object]) -> Timed:
        """A call that needs no preparation, as often as fills a region."""

        def region(repeats: int) -> float:
            settle(self.device)

            def run() -> None:
                for _ in range(repeats):
                    call()
                settle(self.device)

            return seconds_of(run) / repeats

        region(2)
        repeats = 1 if self.quick else max(1, int(SHORTEST / max(region(3), 1e-7)) + 1)
        return partial(region, repeats)

    def rounds(self, sides: dict[str, Timed]) -> Rounds:
        return rounds(sides, 1 if self.quick else self.count)

    def result(
        self, name: str, taken: Rounds, theirs: str, against: str, better: str, differences: dict[str, float]
    ) -> Result:
        pair = (theirs, "ours") if better == "higher" else ("ours", theirs)
        return Result(
            name, against, better, taken.ratio(*pair), taken.median("ours"), taken.median(theirs), differences
        )


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    against: str
    run: Callable[[Bench], Iterator[Result]]


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- grouped product -------------------------------------------------------------------------------------------------


def grouped(bench: Bench) -> Iterator[Result]:
    """expert_linear with as many rows per expert as prefill, short prompts and batched decode have."""
    shape = bench.shape(SMOLLM2_135M)
    for rows in (512, 128, 16):
        torch.manual_seed(0)
        count = max(8, rows // 8) if bench.quick else rows
        x = torch.randn(EXPERTS * count, shape.hidden, device=bench.device).to(BF16).requires_grad_()
        weight = torch.randn(EXPERTS, shape.inner, shape.hidden, device=bench.device).mul(shape.hidden**-0.5)
        weight = weight.to(BF16).requires_grad_()
        offsets = (torch.arange(EXPERTS + 1, device=bench.device) * count).int()
        grad = torch.randn(EXPERTS * count, shape.inner, device=bench.device).to(BF16)
        ways: dict[str, Callable[[], Tensor]] = {
            "ours": partial(ops.expert_linear, x, weight, offsets),
            "grouped_mm": partial(torch._grouped_mm, x, weight.transpose(1, 2), offsets[1:]),
        }

        def both(way: Callable[[], Tensor], x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad) -> Any:
            return torch.autograd.grad(way(), (x, weight), grad)

        outputs = {
            name: {"y": way().detach(), **dict(zip(("grad x", "grad weight"), both(way), strict=True))}
            for name, way in ways.items()
        }
        found = compare("grouped product", _flat(outputs["ours"]), _flat(outputs["grouped_mm"]), BF16)
        for direction, call in (("forward", torch.no_grad()), ("backward", None)):
            sides = {
                name: bench.timed(call(way) if call is not None else partial(both, way)) for name, way in ways.items()
            }
            name = f"G7 grouped product {direction} {rows}"
            yield bench.result(name, bench.rounds(sides), "grouped_mm", "torch._grouped_mm", "higher", found)


def _flat(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().flatten().cpu() for name, tensor in outputs.items()}


# ---- attention -------------------------------------------------------------------------------------------------------


class WholeKeys:
    """The same attention in torch's terms: the keys of all experts side by side, and a mask that hides the others'."""

    def __init__(self, problem: Attention) -> None:
        self.problem, tokens = problem, problem.tokens
        expert = torch.empty(tokens, dtype=torch.long, device=problem.q.device)
        expert[problem.plan.tokens.long()] = problem.plan.experts.long()
        self.expert, self.order = expert, problem.plan.inverse[:, 0].long()
        slot = torch.arange(EXPERTS * tokens, device=expert.device)
        seen = slot % tokens <= torch.arange(tokens, device=expert.device)[:, None]
        self.mask = seen & (slot // tokens == expert[:, None])

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        q = self.problem.q[self.order].transpose(0, 1)[None]
        k, v = (t[0].transpose(0, 1).flatten(1, 2)[None] for t in (self.problem.k, self.problem.v))
        return q, k, v

    def back(self, out: Tensor) -> Tensor:
        """[1,A,T,D] by token as [N,A,D] in plan order."""
        return out[0].transpose(0, 1)[self.problem.plan.tokens.long()]

    def sdpa(self) -> Tensor:
        q, k, v = self.inputs()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)

    def flex(self) -> Callable[[], Tensor]:
        """FlexAttention with a block mask; compiled on a GPU, where it is fast."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        tokens, expert = self.problem.tokens, self.expert

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv // tokens == expert[q]) & (kv % tokens <= q)

        blocks = create_block_mask(visible, None, None, tokens, EXPERTS * tokens, device=str(expert.device))
        attend: Any = torch.compile(flex_attention) if expert.device.type == "cuda" else flex_attention

        def run() -> Tensor:
            q, k, v = self.inputs()
            out: Tensor = attend(q.contiguous(), k.contiguous(), v.contiguous(), block_mask=blocks, enable_gqa=True)
            return out

        return run


def attention(bench: Bench, kind: str) -> Iterator[Result]:
    """Every expert's queries over its own keys: against a dense layer's, and against torch's ways of doing the same."""
    shape = bench.shape(SMOLLM2_135M)
    heads = (shape.heads, shape.groups, shape.head_dim)
    with bench.device:
        Attention(min(150, bench.size(2048)), kind, BF16, *heads).check()
        problem = Attention(bench.size(2048), kind, BF16, *heads)
    whole = WholeKeys(problem)
    leaves = [problem.q, problem.k, problem.v]
    ways = {"sdpa with mask": whole.sdpa, "FlexAttention": whole.flex()}
    with torch.no_grad():
        ours = {"output": problem.ours().flatten().cpu()}
        found = {
            name: compare(name, ours, {"output": whole.back(way()).flatten().cpu()}, BF16) for name, way in ways.items()
        }
    grad = {"ours": problem.grad, **dict.fromkeys(ways, problem.dense_grad)}
    for backward in (False, True):
        dense = problem.sides(backward=backward)
        calls: dict[str, Callable[[], object]] = {"ours": dense["ours"], "causal sdpa": dense["sdpa"]}
        for name, way in ways.items():
            if not backward:
                calls[name] = torch.no_grad()(way)
            elif bench.device.type == "cuda" or name != "FlexAttention":  # it has no backward on the CPU
                calls[name] = lambda way=way, name=name: torch.autograd.grad(way(), leaves, grad[name])  # type: ignore[misc]
        taken = bench.rounds({name: bench.timed(call) for name, call in calls.items()})
        name = f"G8 attention {'backward' if backward else 'forward'} {kind}"
        yield bench.result(name, taken, "causal sdpa", "causal SDPA of a dense layer", "lower", {})
        for theirs in ways:
            if theirs in calls:
                yield bench.result(name, taken, theirs, f"{theirs}, keys of all experts", "higher", found[theirs])


# ---- FFN experts -----------------------------------------------------------------------------------------------------


def ffn(bench: Bench) -> Iterator[Result]:
    """Router, plan, SwiGLU experts, weighted sum, against the experts of transformers."""
    from rows_ffn import THEIRS, Block

    shape = bench.shape(SMOLLM2_135M)
    torch.manual_seed(0)
    with torch.no_grad():
        block = Block(shape.hidden, shape.inner, 0)
        block.layer.to(bench.device)
        for theirs in block.theirs.values():
            theirs.to(bench.device)
        for tokens in (2048, 512, 32, 1):
            x = torch.randn(bench.size(tokens) if tokens > 1 else 1, shape.hidden)
            x[:, :EXPERTS] = F.one_hot(torch.arange(x.shape[0]) % EXPERTS, EXPERTS).float()
            x = x.to(bench.device, BF16)
            want = {"output": block.theirs["eager"](x[None])[0].float().cpu()}
            found = compare("FFN experts", {"output": block.operators(x).float().cpu()}, want, BF16)
            sides = {"ours": bench.timed(torch.no_grad()(partial(block.operators, x)))}
            for name in THEIRS:
                sides[name] = bench.timed(torch.no_grad()(partial(block.theirs[name], x[None])))
            taken = bench.rounds(sides)
            faster = min(THEIRS, key=taken.median)
            yield bench.result(
                f"G6 FFN experts {tokens}", taken, faster, f"transformers' experts, {faster}", "higher", found
            )


# ---- whole models ----------------------------------------------------------------------------------------------------


def prefill(bench: Bench, shape: Shape, lengths: tuple[int, ...]) -> Iterator[Result]:
    """One forward over a prompt, last logits, against the official way and the dense model."""
    models = bench.models(shape)
    for tokens in lengths:
        ids = prompt(models.shape, bench.size(tokens))
        traced = _on_host(Prefill(models.ours, ids, {"output_routing": True}).outputs())
        forced = Prefill(models.ours, ids, {"force": models.ours.config.expert_names[0]})
        sides = {
            "ours": Prefill(models.ours, ids),
            "theirs": bench.all_experts(models, "prefill", ids),
            "dense": Prefill(models.dense, ids),
        }
        over = compare("prefill", traced, _on_host(sides["theirs"].outputs()), BF16)
        dense = compare("prefill, one expert", _on_host(forced.outputs()), _on_host(sides["dense"].outputs()), BF16)
        taken = bench.rounds({name: side.seconds for name, side in sides.items()})
        where = f"{shape.name} {tokens}"
        yield bench.result(f"G1 prefill {where}", taken, "theirs", bench.others, "higher", over)
        yield bench.result(f"G2 prefill {where}", taken, "dense", "dense transformers, sdpa", "lower", dense)
    _clear(bench.device)


def decode(bench: Bench) -> Iterator[Result]:
    """Greedy tokens behind a prompt, which is not timed."""
    models = bench.models(SMOLLM2_135M)
    for keys, rows in ((512, 1), (4096, 1), (512, 8)):
        ids = prompt(models.shape, bench.size(keys), rows)
        new = 4 if bench.quick else 32
        sides = {
            "ours": Decode(models.ours, ids, new),
            "theirs": bench.all_experts(models, "decode", ids, new=new),
            "dense": Decode(models.dense, ids, new),
        }
        # Greedy tokens part at the first tie that rounding decides: the prompt's last logits are compared instead.
        prompts = {"ours": Prefill(models.ours, ids), "theirs": bench.all_experts(models, "prefill", ids)}
        logits = {name: {"logits": side.outputs()["logits"].cpu()} for name, side in prompts.items()}
        found = compare("decode", logits["ours"], logits["theirs"], BF16)
        taken = bench.rounds({name: side.seconds for name, side in sides.items()})
        where = f"{keys} keys, {rows} rows"
        yield bench.result(f"G3 decode {where}", taken, "theirs", bench.others, "higher", found)
        yield bench.result(f"G3b decode {where}", taken, "dense", "dense transformers, sdpa", "higher", {})
        del sides, prompts
        _clear(bench.device)


def training(bench: Bench) -> Iterator[Result]:
    """Forward and backward, loss on all tokens; then a stage-2 step, where only routers learn."""
    models = bench.models(SMOLLM2_135M)
    for tokens in (512, 2048):
        ids = prompt(models.shape, bench.size(tokens))
        sides = {
            "ours": ForwardBackward(models.ours, ids),
            "theirs": bench.all_experts(models, "forward_backward", ids, share=False),
            "dense": ForwardBackward(models.dense, ids),
        }
        found = compare("training", _on_host(sides["ours"].outputs()), _on_host(sides["theirs"].outputs()), BF16)
        taken = bench.rounds({name: side.seconds for name, side in sides.items()})
        yield bench.result(f"G9a training {tokens}", taken, "theirs", bench.others, "higher", found)
        yield bench.result(f"G9d training {tokens}", taken, "dense", "dense transformers, sdpa", "lower", {})
        del sides
        _clear(bench.device)
    ids = prompt(models.shape, bench.size(512))
    steps = {
        "theirs": bench.all_experts(models, "step", ids, k=2, share=False, routers_only=True),
        "ours": Step(models.ours, ids, {"experts_per_token": 2}, routers_only=True, optimizer=_our_optimizer),
    }
    outputs = {name: _on_host(side.outputs()) for name, side in steps.items()}
    found = compare("stage-2 step", outputs["ours"], outputs["theirs"], BF16)
    taken = bench.rounds({name: side.seconds for name, side in steps.items()})
    yield bench.result("G9c stage-2 step 512", taken, "theirs", f"{bench.others}, routers only", "higher", found)


def step_with_masters(bench: Bench) -> Iterator[Result]:
    """bfloat16 weights with float32 masters in our optimizer, against float32 ones under autocast and fused AdamW."""
    models = bench.models(SMOLLM2_135M)
    ids = prompt(models.shape, bench.size(512))
    theirs = bench.all_experts(models, "step", ids, share=False, dtype=FP32, autocast=True)
    ours = Step(models.ours, ids, optimizer=_our_optimizer)
    found = compare("step with masters", _on_host(ours.outputs()), _on_host(theirs.outputs()), BF16)
    taken = bench.rounds({"ours": ours.seconds, "theirs": theirs.seconds})
    yield bench.result("G9b step 512", taken, "theirs", f"{bench.others}, autocast, fused AdamW", "higher", found)


def _our_optimizer(parameters: list[Tensor]) -> AdamW:
    return AdamW(parameters, lr=Step.rate, weight_decay=Step.decay, max_grad_norm=Step.clip)


def _on_host(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in outputs.items()}


# ---- optimizer and loss ----------------------------------------------------------------------------------------------


def optimizer(bench: Bench) -> Iterator[Result]:
    """One step over as many float32 parameters as one expert has."""
    shape = bench.shape(SMOLLM2_135M)
    torch.manual_seed(0)
    sizes = [(shape.inner, shape.hidden)] * (3 * shape.layers) + [(shape.hidden, shape.hidden)] * (2 * shape.layers)
    start = [torch.randn(size, device=bench.device) for size in sizes]
    gradients = [torch.randn(size, device=bench.device) for size in sizes]
    makers: dict[str, Callable[[list[Tensor]], Any]] = {
        "ours": lambda p: AdamW(p, lr=1e-3),
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    }
    moved, sides = {}, {}
    for name, make in makers.items():
        parameters = [t.clone().requires_grad_() for t in start]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        step = make(parameters).step
        step()
        difference = [(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)]
        moved[name] = {"step": torch.cat(difference).cpu()}
        sides[name] = bench.timed(step)
    taken = bench.rounds(sides)
    for name in ("foreach", "fused"):
        found = compare(f"AdamW against torch's {name}", moved["ours"], moved[name], FP32)
        yield bench.result(f"G11 AdamW over {name}", taken, name, f"torch.optim.AdamW, {name}", "higher", found)


def loss(bench: Bench) -> Iterator[Result]:
    """Head and cross-entropy, forward and backward; every second token is masked."""
    shape, device = bench.shape(SMOLLM2_135M), bench.device
    tokens = bench.size(2048)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, shape.hidden).to(device, BF16).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.hidden) * shape.hidden**-0.5).to(device, BF16).requires_grad_()
    targets = torch.randint(shape.vocabulary, (tokens,))
    targets[::2] = -100
    targets = targets.to(device)
    count = (targets != -100).sum()
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: ops.cross_entropy(hidden, weight, targets) / count,
        "theirs": lambda: F.cross_entropy(F.linear(hidden, weight).float(), targets),
    }

    def both(way: Callable[[], Tensor]) -> dict[str, Tensor]:
        value = way()
        hidden_grad, head_grad = torch.autograd.grad(value, (hidden, weight))
        return {"loss": value.detach().float(), "grad hidden": hidden_grad, "grad head": head_grad}

    outputs = {name: _flat(both(way)) for name, way in ways.items()}
    found = compare("head and loss", outputs["ours"], outputs["theirs"], BF16)
    taken = bench.rounds({name: bench.timed(partial(both, way)) for name, way in ways.items()})
    yield bench.result("G11 head and loss", taken, "theirs", "linear + cross_entropy", "lower", found)


ROWS = [
    Row("grouped", "expert_linear, 512, 128 and 16 rows per expert", "torch._grouped_mm", grouped),
    Row(
        "attention",
        "expert attention, T = 2048, uniform routing",
        "causal SDPA, SDPA with mask, FlexAttention",
        partial(attention, kind="uniform"),
    ),
    Row(
        "attention_runs",
        "the same, routing in runs of 8",
        "causal SDPA, SDPA with mask, FlexAttention",
        partial(attention, kind="runs"),
    ),
    Row("ffn", "FFN experts, T = 2048, 512, 32, 1", "transformers' experts: eager, grouped_mm", ffn),
    Row(
        "prefill",
        "forward over 512 and 2048 tokens, 135M shape",
        "all experts, dense transformers",
        partial(prefill, shape=SMOLLM2_135M, lengths=(512, 2048)),
    ),
    *(
        Row(
            f"prefill_{shape.backbone}_1b",
            f"forward over 512 tokens, 4 layers of {shape.name}",
            "all experts, dense transformers",
            partial(prefill, shape=shape, lengths=(512,)),
        )
        for shape in (LLAMA_1B, OLMO2_1B)
    ),
    Row("decode", "greedy loop behind 512 and 4096 keys, and 8 rows", "all experts, dense transformers", decode),
    Row("training", "forward and backward, stage-2 step", "all experts, dense transformers", training),
    Row("step", "whole step with float32 masters", "autocast and torch's fused AdamW", step_with_masters),
    Row("optimizer", "AdamW over 100 M parameters", "torch's foreach and fused AdamW", optimizer),
    Row("loss", "head and cross-entropy, T = 2048, half masked", "linear + cross_entropy", loss),
]
