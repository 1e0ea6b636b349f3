"""The FFN-expert block against the experts of transformers (G6): kernels as the engine runs them, and operators."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from experiment import BF16, Experiment, Table
from goals import Line
from lab import Lab
from machine import program
from outputs import compare
from paired import Timed, looped
from shapes import EXPERTS, SMOLLM2_135M
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from micro import ops
from micro.modeling import MiCRoConfig
from micro.modeling.ffn_block import MiCRoFFNLayer

LAYERS = 16  # in turn, so that weights come from memory as in a model
THEIRS = ("eager", "grouped_mm")  # what transformers has on a CPU


class Block:
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
        self.theirs = {name: self._mixtral(sizes, readers, name) for name in THEIRS}

    def _mixtral(self, sizes: dict[str, Any], readers: Tensor, implementation: str) -> Any:
        config = MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=1, **sizes)
        config._experts_implementation = implementation
        blocks = self.layer.blocks
        block = MixtralSparseMoeBlock(config).to(BF16).eval().requires_grad_(False)
        block.gate.weight.copy_(readers)
        block.experts.gate_up_proj.copy_(torch.cat([blocks.gate_proj.weight, blocks.up_proj.weight], 1))
        block.experts.down_proj.copy_(blocks.down_proj.weight)
        return block

    def operators(self, x: Tensor) -> Tensor:
        """The operators of MiCRoFFNLayer behind its norm, on plain parameters."""
        routing = ops.route(self.layer.router(x), 1)
        weights = routing.weights.to(x.dtype)
        plan = ops.plan(routing.ids, EXPERTS, weights)
        rows = ops.permute(x, plan.tokens, plan.offsets, plan.inverse)
        out = self.layer.blocks.ffn(rows, plan.offsets)
        return ops.combine(out, weights, plan.experts, plan.offsets, plan.inverse)

    def write(self, stream: Any) -> None:
        """In the order that ffn_experts reads."""
        router, blocks = self.layer.router, self.layer.blocks
        for module in (router.in_proj, router.out_proj, blocks.gate_proj, blocks.up_proj, blocks.down_proj):
            stream.write(module.weight.contiguous().view(torch.int16).numpy().tobytes())


class Kernels:
    """benchmarks/cpp/ffn_experts with the weights of these blocks: a process that waits for commands."""

    def __init__(self, blocks: list[Block], hidden: int, inner: int) -> None:
        self.hidden, self.folder = hidden, tempfile.TemporaryDirectory()
        with Path(self.folder.name, "weights.bin").open("wb") as stream:
            for block in blocks:
                block.write(stream)
        sizes = [str(n) for n in (hidden, inner, EXPERTS, len(blocks))]
        command = [str(program("ffn_experts")), self.folder.name, *sizes]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, command: str) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(command, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("ffn_experts ended; its message stands above")
        return float(answer)

    def output(self, x: Tensor) -> Tensor:
        """Of the first block."""
        Path(self.folder.name, "x.bin").write_bytes(x.contiguous().view(torch.int16).numpy().tobytes())
        self.tell(f"rows {x.shape[0]}")
        self.tell("write")
        found = np.fromfile(Path(self.folder.name, "y.bin"), dtype=np.int16)
        return torch.from_numpy(found).view(BF16).view(x.shape)

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()


def ffn_experts(lab: Lab) -> Iterator[Line]:
    """Against the faster of the two ways that transformers has."""
    torch.manual_seed(0)
    shape = lab.shape(SMOLLM2_135M)
    lab.say("drawing weights")
    with torch.no_grad():
        blocks = [Block(shape.hidden, shape.inner, index) for index in range(2 if lab.options.quick else LAYERS)]
        kernels = Kernels(blocks, shape.hidden, shape.inner)
        try:
            for tokens in (512, 32, 1):
                yield _at(lab, blocks, kernels, tokens)
        finally:
            kernels.close()


def _at(lab: Lab, blocks: list[Block], kernels: Kernels, tokens: int) -> Line:
    x = torch.randn(tokens, kernels.hidden).to(BF16)
    x[:, :EXPERTS] = F.one_hot(torch.arange(tokens) % EXPERTS, EXPERTS).to(BF16)
    want = {"output": blocks[0].theirs["eager"](x[None])[0].float()}
    compared = {
        "kernels": compare("kernels", {"output": kernels.output(x).float()}, want, BF16)["output"],
        "operators": compare("operators", {"output": blocks[0].operators(x).float()}, want, BF16)["output"],
    }

    def all_of(call: Callable[[Block], object]) -> Timed:
        return looped(lambda: [call(block) for block in blocks])

    sides: dict[str, Timed] = {
        "kernels": lambda: kernels.tell("time"),
        "operators": all_of(lambda block: block.operators(x)),
        **{name: all_of(lambda block, name=name: block.theirs[name](x[None])) for name in THEIRS},  # type: ignore[misc]
    }
    table = Table(lab, lab.rounds(sides))
    faster = min(THEIRS, key=table.rounds.median)
    operators = table.rounds.ratio(faster, "operators")
    note = f"{len(blocks)} layers in turn; operators from Python on plain weights: {operators}"
    against = f"transformers' experts, {faster}"
    return table.line(f"G6/{tokens}", "kernels", faster, against, compared, note=note)


EXPERIMENTS = [Experiment("ffn_experts", ("G6/512", "G6/32", "G6/1"), 1.5, ffn_experts)]
