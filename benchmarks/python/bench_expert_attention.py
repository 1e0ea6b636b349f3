"""Routed attention against causal scaled-dot-product attention of torch over the same tokens.

One process, interleaved pairs. Outputs are compared with the reference before anything is timed.

    python benchmarks/python/bench_expert_attention.py --tokens 512 2048 --dtype bfloat16 float32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from paired import compare, print_header, write
from torch import Tensor

from micro import ops
from micro.testing import reference

EXPERTS = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest value; tests/python/tolerances.py


def routing(kind: str, tokens: int) -> Tensor:
    """Expert of each token [T,1]: uniform, in runs of 8, or 70/10/10/10 (performance.md 8.4)."""
    if kind == "runs":
        return torch.randint(0, EXPERTS, ((tokens + 7) // 8, 1)).repeat_interleave(8, 0)[:tokens].int()
    if kind == "skewed":
        return torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), tokens, replacement=True)[:, None].int()
    return torch.randint(0, EXPERTS, (tokens, 1)).int()


class Problem:
    """Inputs of both sides: T new tokens after `cached` ones."""

    def __init__(self, tokens: int, cached: int, kind: str, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
        heads, groups, head_dim = arguments.heads, arguments.groups, arguments.head_dim
        self.tokens, self.cached, keys = tokens, cached, tokens + cached
        self.plan = ops.plan(routing(kind, tokens), EXPERTS)
        self.q = torch.randn(tokens, heads, head_dim, dtype=dtype, requires_grad=True)
        # As the projections lay them out: experts, slots, heads.
        self.k, self.v = (
            torch.randn(EXPERTS, 1, keys, groups, head_dim, dtype=dtype).permute(1, 0, 3, 2, 4).requires_grad_()
            for _ in range(2)
        )
        self.dense_q = torch.randn(1, heads, tokens, head_dim, dtype=dtype, requires_grad=True)
        self.dense_k, self.dense_v = (
            torch.randn(1, groups, keys, head_dim, dtype=dtype, requires_grad=True) for _ in range(2)
        )
        self.grad = torch.randn(tokens, heads, head_dim, dtype=dtype)
        self.dense_grad = torch.randn(1, heads, tokens, head_dim, dtype=dtype)

    def ours(self) -> Tensor:
        return ops.expert_attention(
            self.q, self.k, self.v, self.plan.tokens, self.plan.offsets, slots=self.tokens, start=self.cached
        )

    def dense(self) -> Tensor:
        causal = self.cached == 0
        return F.scaled_dot_product_attention(
            self.dense_q, self.dense_k, self.dense_v, is_causal=causal, enable_gqa=True
        )

    def both_ways(self, call: Callable[[], Tensor], grad: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), inputs, grad)


def check_outputs(dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    """The kernel that is timed, against the specification, at a size that the specification can do."""
    p = Problem(150, 0, "uniform", dtype, arguments)
    wide = [t.detach().double().requires_grad_() for t in (p.q, p.k, p.v)]
    want = reference.expert_attention(*wide, p.plan.tokens, p.plan.offsets, slots=150)
    got = p.ours()
    pairs = [(got, want)]
    pairs += zip(
        torch.autograd.grad(got, (p.q, p.k, p.v), p.grad), torch.autograd.grad(want, wide, p.grad.double()), strict=True
    )
    for g, w in pairs:
        error = ((g.double() - w).abs().max() / w.abs().max()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"wrong result: relative error {error:.2e} in {dtype}; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--decode-keys", type=int, nargs="*", default=[512, 4096])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--routing", nargs="+", default=["uniform", "runs"], choices=["uniform", "runs", "skewed"])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    print_header()
    ratios = []

    def take(name: str, ours: Callable[[], object], dense: Callable[[], object]) -> None:
        ratios.append(compare(name, ours, dense, pairs=arguments.pairs))
        print(ratios[-1], flush=True)

    for dtype in (getattr(torch, name) for name in arguments.dtype):
        check_outputs(dtype, arguments)
        for tokens in arguments.tokens:
            for kind in arguments.routing:
                p = Problem(tokens, 0, kind, dtype, arguments)
                name = f"{str(dtype)[6:]} T={tokens} {kind}"
                with torch.no_grad():
                    take(f"{name} forward", p.ours, p.dense)
                take(
                    f"{name} forward+backward",
                    p.both_ways(p.ours, p.grad, [p.q, p.k, p.v]),
                    p.both_ways(p.dense, p.dense_grad, [p.dense_q, p.dense_k, p.dense_v]),
                )
        for keys in arguments.decode_keys:
            p = Problem(1, keys - 1, "uniform", dtype, arguments)
            with torch.no_grad():
                take(f"{str(dtype)[6:]} one query, {keys} keys", p.ours, p.dense)
    write("expert_attention", ratios, arguments.output)


if __name__ == "__main__":
    main()
