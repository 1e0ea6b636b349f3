"""Invariants I1-I11 of model.md 2.15, on models, masks and routings drawn at random."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_close, gradients_in_official_names, random_ids, reference_of, small_model
from tolerances import CLONES, MODEL_FLOAT64

from micro.modeling import MiCRoCache, MiCRoForCausalLM
from micro.testing.reference_model import next_token_loss

SHAPES = {"backbone": st.sampled_from(["llama", "olmo2"]), "kind": st.sampled_from(["block", "ffn"])}
SEEDS = st.integers(0, 2**16)
quick = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def clone_experts(model: MiCRoForCausalLM, source: int = 0) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.blocks.parameters():
                parameter.copy_(parameter[source].clone().expand_as(parameter))


def logits(model: MiCRoForCausalLM, ids: torch.Tensor, **controls: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **controls).logits


@quick
@given(**SHAPES, seed=SEEDS, slots=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_i1_identical_experts_give_one_block_for_any_routing(
    backbone: str, kind: str, seed: int, slots: int, dtype: torch.dtype
) -> None:
    model = small_model(backbone, kind, dtype=dtype, seed=seed)
    clone_experts(model)
    ids = random_ids(2, slots, seed=seed)
    one = logits(model, ids, force="logic")
    assert torch.equal(logits(model, ids, force="world"), one), "bit for bit where the same rows meet the same GEMM"
    labels = torch.randint(0, 4, (2, slots), generator=torch.Generator().manual_seed(seed))
    bound = CLONES[dtype]
    assert_close(logits(model, ids), one, bound)
    assert_close(logits(model, ids, routing_labels=labels), one, bound)
    assert_close(logits(model, ids, experts_per_token=3), one, bound)


@quick
@given(backbone=SHAPES["backbone"], seed=SEEDS)
def test_i2_all_experts_with_equal_logits_average(backbone: str, seed: int) -> None:
    model = small_model(backbone, seed=seed, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].router.out_proj.weight.zero_()
    ids = random_ids(2, 7, seed=seed)
    with torch.no_grad():
        layer_out = {}
        hook = model.model.layers[0].register_forward_hook(lambda m, a, out: layer_out.update(y=out[0]))
        model(ids, use_cache=False, experts_per_token=4)
        mean = layer_out["y"].clone()
        each = []
        for e in range(4):
            model(ids, use_cache=False, force=e)
            each.append(layer_out["y"].clone())
        hook.remove()
    assert_close(mean, torch.stack(each).mean(0), 1e-8)  # weights are 1 / (4 + 4e-9)


@quick
@given(**SHAPES, seed=SEEDS, order=st.permutations(range(4)), k=st.integers(1, 4))
def test_i3_relabelling_experts_changes_names_only(
    backbone: str, kind: str, seed: int, order: list[int], k: int
) -> None:
    model, other = small_model(backbone, kind, seed=seed), small_model(backbone, kind, seed=seed)
    index = torch.tensor(order)  # expert i of `other` is expert order[i] of `model`
    with torch.no_grad():
        for mine, theirs in zip(other.model.layers, model.model.layers, strict=True):
            for p, q in zip(mine.blocks.parameters(), theirs.blocks.parameters(), strict=True):
                p.copy_(q[index])
            mine.router.out_proj.weight.copy_(theirs.router.out_proj.weight[index])
    ids = random_ids(2, 9, seed=seed)
    place = torch.empty(4, dtype=torch.long)
    place[index] = torch.arange(4)
    with torch.no_grad():
        a = model(ids, experts_per_token=k, ablate=[order[0]] if k < 4 else None, output_routing=True)
        b = other(ids, experts_per_token=k, ablate=[0] if k < 4 else None, output_routing=True)
        labels = torch.randint(0, 4, (2, 9))
        assert_close(logits(other, ids, routing_labels=place[labels]), logits(model, ids, routing_labels=labels), 1e-9)
    assert_close(b.logits, a.logits, MODEL_FLOAT64)
    assert torch.equal(b.routing.ids.long(), place[a.routing.ids.long()])


@quick
@given(**SHAPES, seed=SEEDS, expert=st.integers(0, 3))
def test_i4_forcing_is_the_model_of_that_expert(backbone: str, kind: str, seed: int, expert: int) -> None:
    model, only = small_model(backbone, kind, seed=seed), small_model(backbone, kind, seed=seed)
    clone_experts(only, expert)
    ids = random_ids(2, 8, seed=seed)
    assert torch.equal(logits(model, ids, force=expert), logits(only, ids, force=0))
    assert torch.equal(logits(model, ids, keep=expert), logits(model, ids, force=expert))
    ablated = logits(model, ids, ablate=expert)
    assert torch.equal(ablated, logits(model, ids, bias={expert: -float("inf")}))


@quick
@given(**SHAPES, seed=SEEDS, at=st.integers(1, 8), k=st.integers(1, 4))
def test_i5_nothing_flows_backwards_or_sideways(backbone: str, kind: str, seed: int, at: int, k: int) -> None:
    model = small_model(backbone, kind, seed=seed)
    ids = random_ids(3, 9, seed=seed)
    changed = ids.clone()
    changed[1, at] = (changed[1, at] + 1) % 61
    a, b = logits(model, ids, experts_per_token=k), logits(model, changed, experts_per_token=k)
    same = torch.ones(3, 9, dtype=torch.bool)
    same[1, at:] = False
    assert_close(b[same], a[same], 1e-12)
    assert float((a[1, at] - b[1, at]).abs().max()) > 1e-6


@quick
@given(**SHAPES, seed=SEEDS, slots=st.integers(1, 20), k=st.integers(1, 4), data=st.data())
def test_i6_sparse_is_all_then_select(
    backbone: str, kind: str, seed: int, slots: int, k: int, data: st.DataObject
) -> None:
    model = small_model(backbone, kind, seed=seed).train()
    reference = reference_of(model)
    ids = random_ids(2, slots, seed=seed)
    pads = data.draw(st.integers(0, slots - 1))
    mask = torch.ones(2, slots, dtype=torch.long)
    mask[0, slots - pads :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, experts_per_token=k, skip_logits=False)
    want = reference(ids, attention_mask=mask, k=k)
    assert_close(out.logits[mask.bool()], want.logits[mask.bool()], MODEL_FLOAT64)
    if slots == 1:
        return
    out.loss.backward()
    next_token_loss(want.logits, labels).backward()
    for key, grad in gradients_in_official_names(model).items():
        exact = reference.state[key].grad
        assert_close(
            grad, torch.zeros_like(grad) if exact is None else exact, 1e-6 if "gate." in key else MODEL_FLOAT64
        )


@quick
@given(**SHAPES, seed=SEEDS)
def test_i7_own_decisions_as_labels_give_the_same(backbone: str, kind: str, seed: int) -> None:
    model = small_model(backbone, kind, seed=seed, dtype=torch.float32, num_hidden_layers=1)
    ids = random_ids(2, 8, seed=seed)
    with torch.no_grad():
        out = model(ids, output_routing=True)
        chosen = out.routing.ids[0, ..., 0].long()
    assert_close(logits(model, ids, routing_labels=chosen), out.logits, 1e-6)
    assert_close(logits(model, ids, force=chosen[:, None]), out.logits, 1e-6)


@quick
@given(**SHAPES, seed=SEEDS, cuts=st.lists(st.integers(1, 11), max_size=4), k=st.integers(1, 4))
def test_i8_any_split_into_calls(backbone: str, kind: str, seed: int, cuts: list[int], k: int) -> None:
    model = small_model(backbone, kind, seed=seed)
    ids = random_ids(2, 12, seed=seed)
    cache, parts = MiCRoCache(model.config), []
    edges = [0, *sorted(set(cuts)), 12]
    with torch.no_grad():
        for a, b in pairwise(edges):
            parts.append(model(ids[:, a:b], past_key_values=cache, experts_per_token=k).logits)
    assert_close(torch.cat(parts, 1), logits(model, ids, experts_per_token=k), MODEL_FLOAT64)


@quick
@given(**SHAPES, seed=SEEDS, k=st.integers(1, 4))
def test_i9_empty_steering_is_bit_identical(backbone: str, kind: str, seed: int, k: int) -> None:
    model = small_model(backbone, kind, seed=seed, dtype=torch.float32)
    ids = random_ids(2, 8, seed=seed)
    plain = logits(model, ids, experts_per_token=k)
    for nothing in (
        {"ablate": []},
        {"bias": torch.zeros(1, 1, 1, 4)},
        {"ablate": torch.zeros(2, 2, 8, 4, dtype=torch.bool), "bias": {"logic": 0.0}},
        {"force": torch.full((1, 1, 8), -1)},
        {"keep": [0, 1, 2, 3]},
    ):
        assert torch.equal(logits(model, ids, experts_per_token=k, **nothing), plain)


@pytest.mark.parametrize("rule,zero", [("renormalized", True), ("probability", False), ("straight_through", False)])
@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_i10_router_gradient_by_rule(rule: str, zero: bool, kind: str) -> None:
    model = small_model(kind=kind, dtype=torch.float32, weight_rule=rule).train()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.out_proj.weight.mul_(0.05)  # q stays above 1/32, where the weight is exactly 1
    ids = random_ids(2, 8)
    model(ids, labels=ids).loss.backward()
    grads = [p.grad.abs().max() for n, p in model.named_parameters() if "router" in n]
    assert all(float(g) == 0 for g in grads) if zero else all(float(g) > 0 for g in grads)
    model.zero_grad()
    model(ids, labels=ids, experts_per_token=2).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for n, p in model.named_parameters() if "router" in n)


@quick
@given(**SHAPES, seed=SEEDS, k=st.integers(1, 4), side=st.sampled_from(["left", "right"]), data=st.data())
def test_i11_a_padded_batch_is_its_rows(
    backbone: str, kind: str, seed: int, k: int, side: str, data: st.DataObject
) -> None:
    model = small_model(backbone, kind, seed=seed)
    lengths = data.draw(st.lists(st.integers(1, 10), min_size=2, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 2))
    rows = [random_ids(1, n, seed=seed + i) for i, n in enumerate(lengths)]

    def padded(t: torch.Tensor) -> torch.Tensor:
        short = width - t.shape[1]
        return torch.nn.functional.pad(t, (short, 0) if side == "left" else (0, short))

    ids = torch.cat([padded(r) for r in rows])
    mask = torch.cat([padded(torch.ones_like(r)) for r in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, ids, attention_mask=mask, position_ids=positions, experts_per_token=k)
    shifted = logits(model, ids, attention_mask=mask, experts_per_token=k)
    assert torch.isfinite(got).all()
    for i, row in enumerate(rows):
        want = logits(model, row, experts_per_token=k)[0]
        assert_close(got[i][mask[i].bool()], want, MODEL_FLOAT64)
        assert_close(shifted[i][mask[i].bool()], want, 1e-4)  # float32 angles of shifted positions (model.md 3.3)
