"""Single operators: FFN-expert block (G6), grouped product (G7, G12), expert attention (G8)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from experiment import BF16, DTYPES, Experiment, Table
from goals import Line, Skipped
from lab import Lab
from machine import program
from outputs import compare
from paired import Rounds, looped
from shapes import EXPERTS, SMOLLM2_135M
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from micro import ops
from micro.modeling import MiCRoConfig
from micro.modeling.ffn_block import MiCRoFFNLayer
from micro.testing import reference

LAYERS = 16  # in turn, so that weights come from memory as in a model


# ---- FFN-expert block ------------------------------------------------------------------------------------------------


class FFNBlock:
    """One layer's FFN experts with their router, ours and those of transformers, equal weights."""

    def __init__(self, hidden: int, inner: int, index: int) -> None:
        sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 4}
        config = MiCRoConfig(block_type="ffn", num_hidden_layers=1, num_experts=EXPERTS, head_dim=16, **sizes)
        self.layer = MiCRoFFNLayer(config, 0).to(BF16).eval().requires_grad_(False)
        for name, parameter in self.layer.named_parameters():
            if "blocks" in name or "router" in name:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        readers = torch.eye(hidden)[[(e + index) % EXPERTS for e in range(EXPERTS)]].to(BF16)
        self.layer.router.in_proj.weight[:EXPERTS] = readers
        self.layer.router.out_proj.weight.copy_(torch.eye(EXPERTS, hidden))
        self.theirs = {name: self._mixtral(sizes, readers, name) for name in ("eager", "grouped_mm")}

    def _mixtral(self, sizes: dict[str, Any], readers: Tensor, implementation: str) -> Any:
        config = MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=1, **sizes)
        config._experts_implementation = implementation
        blocks = self.layer.blocks
        block = MixtralSparseMoeBlock(config).to(BF16).eval().requires_grad_(False)
        block.gate.weight.copy_(readers)
        block.experts.gate_up_proj.copy_(torch.cat([blocks.gate_proj.weight, blocks.up_proj.weight], 1))
        block.experts.down_proj.copy_(blocks.down_proj.weight)
        return block

    def ours(self, x: Tensor) -> Tensor:
        """The operators of MiCRoFFNLayer behind its norm."""
        routing = ops.route(self.layer.router(x), 1)
        weights = routing.weights.to(x.dtype)
        plan = ops.plan(routing.ids, EXPERTS, weights)
        rows = ops.permute(x, plan.tokens, plan.offsets, plan.inverse)
        out = self.layer.blocks.ffn(rows, plan.offsets)
        return ops.combine(out, weights, plan.experts, plan.offsets, plan.inverse)


@torch.no_grad()
def ffn_experts(lab: Lab) -> Iterator[Line]:
    """Against the faster of the two ways that transformers has on a CPU."""
    torch.manual_seed(0)
    shape = lab.shape(SMOLLM2_135M)
    lab.say("drawing weights")
    blocks = [FFNBlock(shape.hidden, shape.inner, index) for index in range(2 if lab.options.quick else LAYERS)]
    for tokens in (512, 32, 1):
        x = torch.randn(tokens, shape.hidden).to(BF16)
        x[:, :EXPERTS] = F.one_hot(torch.arange(tokens) % EXPERTS, EXPERTS).to(BF16)
        sides: dict[str, Callable[[], object]] = {"ours": lambda x=x: [block.ours(x) for block in blocks]}  # type: ignore[misc]
        for name in ("eager", "grouped_mm"):
            sides[name] = lambda x=x, name=name: [block.theirs[name](x[None]) for block in blocks]  # type: ignore[misc]
        want = {"output": blocks[0].theirs["eager"](x[None])[0].float()}
        compared = compare("FFN block", {"output": blocks[0].ours(x).float()}, want, BF16)
        table = Table(lab, lab.rounds({name: looped(side) for name, side in sides.items()}))
        faster = min(("eager", "grouped_mm"), key=table.rounds.median)
        line = table.line(f"G6/{tokens}", "ours", faster, f"transformers' experts, {faster}", compared)
        line.note = f"{len(blocks)} layers in turn; times are of all of them"
        yield line


# ---- grouped product -------------------------------------------------------------------------------------------------


def grouped_product(lab: Lab) -> Iterator[Line | Skipped]:
    """benchmarks/cpp/grouped_linear: our grouped product, the peak probe and freer variants, in turn."""
    for rows in (128, 16, 1):
        lab.say(f"{rows} rows per expert")
        quick = ["quick"] if lab.options.quick else []
        command = [str(program("grouped_linear")), str(rows), str(lab.options.rounds), *quick]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"grouped_linear: {done.stderr.strip()}")
        found = json.loads(done.stdout)
        table = Table(lab, Rounds(found["seconds"]))
        compared = {"output against float64": found["difference"]}
        speed = found["flops"] / table.rounds.median("ours") / 1e9
        note = f"{speed:.0f} GFLOP/s, {found['layers']} layers in turn"
        if rows > 1:
            line = table.line(f"G7/{rows}", "ours", "peak", "BF16 dot-product peak", compared, note=note)
            line.theirs = f"{found['flops'] / table.rounds.median('peak') / 1e9:.0f} GFLOP/s"
            yield line
        if found["free"]:
            fastest = min(found["free"], key=table.rounds.median)
            yield table.line(f"G12/{rows}", "ours", fastest, f"free variant: {fastest}", compared, note=note)
        else:
            yield Skipped(f"G12/{rows}", "this CPU has no instructions that the free variants are written in")


# ---- expert attention ------------------------------------------------------------------------------------------------


def routing(kind: str, tokens: int) -> Tensor:
    """Expert of each token [T,1]: uniform, or in runs of 8 (performance.md 8.4)."""
    if kind == "runs":
        return torch.randint(0, EXPERTS, ((tokens + 7) // 8, 1)).repeat_interleave(8, 0)[:tokens].int()
    return torch.randint(0, EXPERTS, (tokens, 1)).int()


class Attention:
    """T new tokens of one row: each expert's queries over that expert's keys; and one dense layer over as many."""

    def __init__(self, tokens: int, kind: str, dtype: torch.dtype, heads: int, groups: int, size: int) -> None:
        torch.manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype)

        self.tokens, self.plan = tokens, ops.plan(routing(kind, tokens), EXPERTS)
        self.q = draw(tokens, heads, size).requires_grad_()
        # As the projections lay them out: experts, slots, heads.
        kv = (draw(EXPERTS, 1, tokens, groups, size).permute(1, 0, 3, 2, 4) for _ in range(2))
        self.k, self.v = (t.requires_grad_() for t in kv)
        self.dense = [draw(1, n, tokens, size).requires_grad_() for n in (heads, groups, groups)]
        self.grad, self.dense_grad = draw(tokens, heads, size), draw(1, heads, tokens, size)

    def ours(self) -> Tensor:
        plan = self.plan
        return ops.expert_attention(self.q, self.k, self.v, plan.tokens, plan.offsets, slots=self.tokens, start=0)

    def theirs(self) -> Tensor:
        q, k, v = self.dense
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sides(self, *, backward: bool) -> dict[str, Callable[[], object]]:
        if not backward:
            return {"ours": torch.no_grad()(self.ours), "sdpa": torch.no_grad()(self.theirs)}
        return {
            "ours": lambda: torch.autograd.grad(self.ours(), [self.q, self.k, self.v], self.grad),
            "sdpa": lambda: torch.autograd.grad(self.theirs(), self.dense, self.dense_grad),
        }

    def check(self) -> dict[str, float]:
        """Output and gradients against the specification in float64, every expert's causal mask written out."""
        wide = [t.detach().double().requires_grad_() for t in (self.q, self.k, self.v)]
        q, k, v = wide
        want = reference.expert_attention(q, k, v, self.plan.tokens, self.plan.offsets, slots=self.tokens)
        got = self.ours()
        names = ("grad q", "grad k", "grad v")
        ours = torch.autograd.grad(got, (self.q, self.k, self.v), self.grad)
        theirs = torch.autograd.grad(want, wide, self.grad.double())
        pairs = {"output": (got, want), **{n: (a, b) for n, a, b in zip(names, ours, theirs, strict=True)}}
        flat = {name: (a.detach().double().flatten(), b.detach().flatten()) for name, (a, b) in pairs.items()}
        mine, wanted = ({name: pair[i] for name, pair in flat.items()} for i in (0, 1))
        return compare("expert attention", mine, wanted, self.q.dtype)


def attention(lab: Lab, dtype: str, kind: str, suffix: str) -> Iterator[Line]:
    """Forward, and forward with backward; the outputs are compared at a length that the specification can do."""
    shape = lab.shape(SMOLLM2_135M)
    heads = (shape.heads, shape.groups, shape.head_dim)
    compared = Attention(min(150, lab.size(2048)), kind, DTYPES[dtype], *heads).check()
    problem = Attention(lab.size(2048), kind, DTYPES[dtype], *heads)
    for direction in ("forward", "backward"):
        sides = problem.sides(backward=direction == "backward")
        table = Table(lab, lab.rounds({name: looped(side) for name, side in sides.items()}))
        yield table.line(f"G8/{direction}/{suffix}", "ours", "sdpa", "causal SDPA of a dense layer", compared)


EXPERIMENTS = [
    Experiment("ffn_experts", ("G6/512", "G6/32", "G6/1"), 1.5, ffn_experts),
    Experiment("grouped_product", ("G7/128", "G7/16", "G12/128", "G12/16", "G12/1"), 1, grouped_product),
    *(
        Experiment(
            f"attention_{suffix}",
            (f"G8/forward/{suffix}", f"G8/backward/{suffix}"),
            0.5,
            partial(attention, dtype=dtype, kind=kind, suffix=suffix),
        )
        for dtype, kind, suffix in (
            ("bf16", "uniform", "bf16"),
            ("fp32", "uniform", "fp32"),
            ("bf16", "runs", "runs"),
        )
    ),
]
