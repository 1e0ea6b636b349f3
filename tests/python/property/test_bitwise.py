"""Prefill, chunked prefill and decoding are one function, bit for bit, in any batch and with any number of threads
(model.md 3.3). Routing is a step function: one flipped near-tie sends a token to another block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model
from torch import Tensor

from micro.modeling import MiCRoCache, MiCRoForCausalLM

SLOTS = 17
WIDE = {"hidden_size": 72, "intermediate_size": 136, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
SPLITS = {
    "halves": (0, 8, SLOTS),
    "chunks": (0, 5, 6, 7, 13, SLOTS),
    "one by one": tuple(range(SLOTS + 1)),
    "prompt and answer": (0, 13, *range(14, SLOTS + 1)),
}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def everything(model: MiCRoForCausalLM, ids: Tensor, cuts: tuple[int, ...], k: int) -> list[Tensor]:
    """Logits, hidden states of all layers and routes of all slots, from as many calls as the cuts say."""
    cache, parts = MiCRoCache(model.config), []
    for first, last in pairwise(cuts):
        out = model(
            ids[:, first:last], past_key_values=cache, experts_per_token=k, output_routing=True,
            output_hidden_states=True,
        )  # fmt: skip
        routing = out.routing
        routes = [t.movedim(0, 2) for t in (routing.ids, routing.weights, routing.probs, routing.raw_logits)]
        parts.append([out.logits, *out.hidden_states, *routes])
    return [torch.cat(slots, 1) for slots in zip(*parts, strict=True)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2])
def test_every_split_into_calls(backbone: str, kind: str, dtype: torch.dtype, k: int, threads: int) -> None:
    model, ids = small_model(backbone, kind, dtype=dtype, **WIDE), random_ids(3, SLOTS)
    with torch.no_grad():
        want = everything(model, ids, (0, SLOTS), k)
        assert want[-4].unique().numel() > 1, "the test needs mixed routing"
        for name, cuts in SPLITS.items():
            assert same(everything(model, ids, cuts, k), want), name


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch(backbone: str, kind: str, dtype: torch.dtype, threads: int) -> None:
    model, ids = small_model(backbone, kind, dtype=dtype, **WIDE), random_ids(8, SLOTS)
    with torch.no_grad():
        alone = [everything(model, row[None], (0, SLOTS), 1) for row in ids]
        for rows in range(2, 9):
            batch = everything(model, ids[:rows], SPLITS["halves" if rows % 2 else "prompt and answer"], 1)
            assert same(batch, [torch.cat(parts) for parts in zip(*alone[:rows], strict=True)]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        with torch.no_grad():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                model = small_model(dtype=dtype, **WIDE)
                found.append(everything(model, random_ids(4, SLOTS), SPLITS["halves"], 2))
    finally:
        torch.set_num_threads(before)
    assert same(found[1], found[0])
    assert same(found[2], found[0])


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_without_cache_and_with_gradient(backbone: str, kind: str) -> None:
    model, ids = small_model(backbone, kind, dtype=torch.float32, **WIDE), random_ids(2, SLOTS)
    with torch.no_grad():
        want = everything(model, ids, (0, SLOTS), 2)[0]
        assert torch.equal(model(ids, use_cache=False, experts_per_token=2).logits, want)
    assert torch.equal(model(ids, use_cache=False, experts_per_token=2).logits, want), "while training"
