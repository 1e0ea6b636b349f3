"""The whole model against the dense Hugging Face backbone, in the 135M shape.

    python benchmarks/python/bench_model.py [--dtype bfloat16] [--threads 1] [--layers 30]

Four different experts with random weights, uniform routing (replayed choices, so the router still runs), batch 1:
prefill of T = 512 with the last logits only, greedy decode at 512 keys, forward + backward of T = 512.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from paired import Ratio, compare, print_header, write
from transformers import LlamaConfig, LlamaForCausalLM

import micro
from micro.modeling import RoutingTrace

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
    "initializer_range": 1 / 24,
}
LENGTH, NEW = 512, 16


def models(layers: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """A dense model and its upcycled copy; the two agree before the experts are made different."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).to(dtype).eval()
    ours = micro.upcycle(dense, dtype=dtype, verify=False).eval()
    ids = torch.randint(SHAPE["vocab_size"], (1, 64))
    with torch.no_grad():
        expected, got = dense(ids).logits.float(), ours(ids).logits.float()
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype] * max(1.0, expected.abs().max().item())
    difference = (expected - got).abs().max().item()
    if difference > bound:
        raise SystemExit(f"outputs differ by {difference} > {bound}: nothing is timed")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".blocks." in name and parameter.dim() == 3:
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape[0], 1, 1).to(dtype))
    return dense, ours


def uniform(ours: Any, slots: int) -> RoutingTrace:
    """A trace whose choices are uniform over experts, for replay."""
    with torch.no_grad():
        trace = ours(torch.zeros(1, slots, dtype=torch.long), output_routing=True, use_cache=False).routing
    trace.ids = torch.randint(ours.config.num_experts, trace.ids.shape, dtype=trace.ids.dtype)
    return trace


@contextmanager
def training(*modules: torch.nn.Module) -> Iterator[None]:
    for m in modules:
        m.train()
    yield
    for m in modules:
        m.eval()
        m.zero_grad(set_to_none=True)


def prefill(dense: Any, ours: Any, ids: torch.Tensor, trace: RoutingTrace) -> Ratio:
    with torch.no_grad():
        return compare(
            f"prefill T={LENGTH}",
            lambda: ours(ids, replay=trace, logits_to_keep=1, use_cache=True),
            lambda: dense(ids, logits_to_keep=1, use_cache=True),
        )


def decode(dense: Any, ours: Any, ids: torch.Tensor, trace: RoutingTrace) -> Ratio:
    """Per new token: a greedy loop over forward with a cache of 512 keys, the prompt excluded."""
    with torch.no_grad():
        caches = [
            ours(ids, replay=trace, logits_to_keep=1, use_cache=True).past_key_values,
            dense(ids, logits_to_keep=1, use_cache=True).past_key_values,
        ]

        def loop(model: Any, cache: Any, **controls: Any) -> None:
            token = ids[:, -1:]
            for _ in range(NEW):
                out = model(token, past_key_values=cache, use_cache=True, **controls)
                token = out.logits[:, -1:].argmax(-1)
            cache.crop(-NEW)

        return compare(
            f"decode, {LENGTH} keys, {NEW} tokens",
            lambda: loop(ours, caches[0], replay=trace),
            lambda: loop(dense, caches[1]),
        )


def forward_backward(dense: Any, ours: Any, ids: torch.Tensor, trace: RoutingTrace) -> Ratio:
    def run(model: Any, **controls: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False, **controls).loss.backward()

    with training(dense, ours):
        return compare(f"forward + backward T={LENGTH}", lambda: run(ours, replay=trace), lambda: run(dense))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="both", choices=["float32", "bfloat16", "both"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_header()
    ratios = []
    for name in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        dense, ours = models(options.layers, getattr(torch, name))
        ids = torch.randint(SHAPE["vocab_size"], (1, LENGTH))
        trace = uniform(ours, LENGTH + NEW)
        for ratio in (
            prefill(dense, ours, ids, trace),
            decode(dense, ours, ids, trace),
            forward_backward(dense, ours, ids, trace),
        ):
            ratio.name = f"{name}, {options.threads} thread(s): {ratio.name}"
            print(ratio, flush=True)
            ratios.append(ratio)
        del dense, ours
    write(f"model_{options.layers}_layers_{options.threads}_threads", ratios, options.output)


if __name__ == "__main__":
    main()
