"""Single operators: grouped product (G7, G12), expert attention (G8)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from experiment import DTYPES, Experiment, Table
from goals import Line, Skipped
from lab import Lab
from machine import program
from outputs import compare
from paired import Rounds, looped
from shapes import EXPERTS, SMOLLM2_135M
from torch import Tensor

from micro import ops
from micro.testing import reference

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
