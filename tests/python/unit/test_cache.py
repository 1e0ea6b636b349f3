"""MiCRoCache: one function of the sequence, however it is split into calls; and every operation of stock caches."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import ALL_FOUR, assert_close, random_ids, small_config, small_model
from tolerances import MODEL_FLOAT64
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

from micro.modeling import MiCRoCache


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [7, 1, 1, 3]])
def test_any_split_into_calls_is_the_same_function(backbone: str, kind: str, chunks: list[int]) -> None:
    model = small_model(backbone, kind)
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask, output_routing=True, use_cache=False)
        cache, logits, choices, start = MiCRoCache(model.config), [], [], 0
        for size in chunks:
            stop = start + size
            out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, output_routing=True)
            assert out.past_key_values is cache
            assert (out.routing.start, out.routing.prompt_length) == (start, stop)
            logits.append(out.logits)
            choices.append(out.routing.ids)
            start = stop
    real = mask.bool()
    assert_close(torch.cat(logits, 1)[real], want.logits[real], MODEL_FLOAT64)
    assert torch.equal(torch.cat(choices, 2)[:, real], want.routing.ids[:, real])
    assert want.past_key_values is None
    assert cache.length == 12
    experts = 4 if kind == "block" else 1
    assert tuple(cache.layers[0].keys.shape) == (3, experts * 2, 12, 8)


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_stock_caches_hold_the_same(kind: str) -> None:
    model = small_model(kind=kind)
    ids = random_ids(2, 9)
    results = []
    with torch.no_grad():
        for make in (
            MiCRoCache,
            lambda config: DynamicCache(config=config),
            lambda config: StaticCache(config=config, max_cache_len=20),
        ):
            cache = make(model.config)
            first = model(ids[:, :6], past_key_values=cache).logits
            second = [model(ids[:, s : s + 1], past_key_values=cache).logits for s in range(6, 9)]
            assert int(cache.get_seq_length()) == 9
            results.append(
                (torch.cat([first, *second], 1), cache.layers[1].keys[:, :, :9], cache.layers[1].values[:, :, :9])
            )
    for other in results[1:]:
        for mine, stock in zip(results[0], other, strict=True):
            assert torch.equal(mine, stock)


def test_operations_between_calls() -> None:
    """Crop, reorder, repeat, select: the cache then is that of the changed sequences."""
    model = small_model()
    ids = random_ids(2, 8)
    with torch.no_grad():
        cache = MiCRoCache(model.config)
        model(ids[:, :7], past_key_values=cache)
        cache.truncate(4)
        assert cache.length == 4
        store = cache.layers[0]._stores[0].data_ptr()
        model(ids[:, 4:6], past_key_values=cache)
        assert cache.layers[0]._stores[0].data_ptr() == store, "a truncated cache goes on in its own store"
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        order = torch.tensor([1, 0])
        got = model(ids[order][:, 5:], past_key_values=cache).logits
        want = model(ids[order], use_cache=False).logits[:, 5:]
        assert_close(got, want, MODEL_FLOAT64)
        cache.reset()
        assert cache.length == 0
        assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits, MODEL_FLOAT64)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_pairs_in_the_order_of_official_caches(backbone: str, kind: str) -> None:
    model = small_model(backbone, kind)
    ids = random_ids(2, 8)
    with torch.no_grad():
        cache = MiCRoCache(model.config)
        model(ids[:, :5], past_key_values=cache)
        pairs = cache.export_pairs()
        experts = 4 if kind == "block" else 1
        assert [tuple(t.shape) for pair in pairs for t in pair] == [(2, 2, 5, 8)] * (2 * 2 * experts)
        last = cache.layers[1].keys.unflatten(1, (experts, 2))
        assert torch.equal(pairs[experts + experts - 1][0], last[:, -1])  # slot l * E + e
        taken = MiCRoCache.import_pairs(model.config, pairs)
        want = model(ids[:, 5:], past_key_values=cache).logits
        assert taken.length == 5
        assert torch.equal(model(ids[:, 5:], past_key_values=taken).logits, want)
        assert pairs[0][0].shape[2] == 5, "exported pairs are copies"
    with pytest.raises(ValueError, match=f"{2 * experts - 1} pairs, expected {2 * experts}"):
        MiCRoCache.import_pairs(model.config, pairs[1:])
    with pytest.raises(ValueError, match=r"pair 1 .* expected \[2, 2, 5, 8\]"):
        MiCRoCache.import_pairs(model.config, [pairs[0], (pairs[1][0], pairs[1][1][:, :, 1:]), *pairs[2:]])
    assert MiCRoCache(model.config).export_pairs() == []


def test_copies_are_independent_and_grow_past_a_chunk() -> None:
    model = small_model()
    ids = random_ids(1, 140)
    with torch.no_grad():
        cache = MiCRoCache(model.config)
        model(ids[:, :3], past_key_values=cache)
        fork = copy.deepcopy(cache)
        model(ids[:, 50:60], past_key_values=fork)
        for s in range(3, 140, 11):
            logits = model(ids[:, s : s + 11], past_key_values=cache).logits
        want = model(ids, use_cache=False).logits[:, -logits.shape[1] :]
    assert_close(logits, want, MODEL_FLOAT64)
    assert (cache.length, fork.length) == (140, 13)


def test_gradients_flow_through_cached_slots() -> None:
    """With gradient a cache is not filled in place: what autograd saved stays as it was."""
    model = small_model()
    ids = random_ids(1, 8)
    cache = MiCRoCache(model.config)
    first = model(ids[:, :5], past_key_values=cache).logits
    second = model(ids[:, 5:], past_key_values=cache).logits
    torch.cat([first, second], 1).square().sum().backward()
    split = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(ids, use_cache=False).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(split[name], parameter.grad, MODEL_FLOAT64)


def test_inference_mode_and_back() -> None:
    model = small_model()
    ids = random_ids(1, 6)
    cache = MiCRoCache(model.config)
    with torch.inference_mode():
        model(ids[:, :3], past_key_values=cache)
    with torch.no_grad():
        got = model(ids[:, 3:], past_key_values=cache).logits
        assert_close(got, model(ids, use_cache=False).logits[:, 3:], MODEL_FLOAT64)


def test_wrong_caches_are_refused_by_name() -> None:
    model = small_model()
    ids = random_ids(2, 4)
    with pytest.raises(ValueError, match=r"DynamicCache made without config.*MiCRoCache\(model.config\)"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="past_key_values is a tuple"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(TypeError, match="EncoderDecoderCache"):
        both = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        model(ids, past_key_values=both)
    with pytest.raises(ValueError, match="has 3 layers, the model 2"):
        model(ids, past_key_values=MiCRoCache(small_config(num_hidden_layers=3)))
    cache = MiCRoCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"holds 2 rows of 8 key heads .*needs 1 rows"):
            model(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="length is 9, the cache holds 4 slots"):
        cache.truncate(9)
    with pytest.raises(TypeError, match="expected a MiCRoConfig"):
        MiCRoCache(None)


def test_a_generation_fills_one_store_of_the_size_that_it_needs() -> None:
    model = small_model()
    stores: list[tuple[int, int]] = []

    class Look:
        def put(self, value: torch.Tensor) -> None:
            if cache := caches[-1:]:
                store = cache[0].layers[0]._stores
                if store is not None:
                    stores.append((store[0].data_ptr(), store[0].shape[3]))

        def end(self) -> None:
            pass

    caches: list[MiCRoCache] = []
    made = MiCRoCache.__init__

    def keep(self: MiCRoCache, config: object) -> None:
        made(self, config)
        caches.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiCRoCache, "__init__", keep)
        plain = model.generate(random_ids(1, 60), max_new_tokens=150, min_new_tokens=150, streamer=Look())
        chunked = model.generate(random_ids(1, 60), max_new_tokens=150, min_new_tokens=150, prefill_chunk_size=16)
    assert len(set(stores)) == 1 and stores[0][1] == 256  # 60 + 150 - 1 slots, in chunks of 64
    assert torch.equal(plain, chunked)
    with torch.no_grad():
        without = model(random_ids(1, 60)).past_key_values
    assert without.layers[0]._stores[0].shape[3] == 64
