"""Whole models in float64 against "all experts on all tokens, then select", and against the dense classes."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    ALL_FOUR,
    assert_close,
    gradients_in_official_names,
    random_ids,
    reference_of,
    small_config,
    small_model,
)
from tolerances import MODEL_FLOAT64
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from micro.modeling import MiCRoForCausalLM
from micro.testing.reference_model import next_token_loss

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def real_slots(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.ones(like.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_forward_is_the_definition(backbone: str, kind: str, k: int, mask: torch.Tensor | None) -> None:
    model = small_model(backbone, kind)
    ids = random_ids(3, 9)
    with torch.no_grad():
        want = reference_of(model)(ids, attention_mask=mask, k=k)
        got = model(ids, attention_mask=mask, experts_per_token=k, output_routing=True, output_hidden_states=True)
    real = real_slots(mask, ids)
    assert_close(got.logits[real], want.logits[real], MODEL_FLOAT64)
    for mine, theirs in zip(got.hidden_states, want.hidden, strict=True):
        assert_close(mine[real], theirs[real], MODEL_FLOAT64)
    for layer in range(2):
        assert torch.equal(got.routing.ids[layer][real].long(), want.ids[layer][real])
        assert_close(got.routing.weights[layer][real], want.weights[layer][real], MODEL_FLOAT64)
        assert_close(got.routing.probs[layer][real], want.probs[layer][real], MODEL_FLOAT64)
        assert_close(got.router_logits[layer].view(3, 9, 4)[real], want.effective[layer][real], MODEL_FLOAT64)
        assert_close(got.routing.raw_logits[layer][real], want.raw[layer][real], MODEL_FLOAT64)
    assert torch.isfinite(got.logits).all()
    assert torch.equal(got.routing.mask, real)
    usage = got.routing.usage()
    assert float(usage.sum()) == pytest.approx(1)
    assert float((usage > 0).sum()) > 1, "the test needs several experts in use"


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize(
    "k,rule", [(1, "renormalized"), (2, "renormalized"), (1, "straight_through"), (2, "probability")]
)
@pytest.mark.parametrize("mask", [None, RIGHT], ids=["full", "right"])
def test_gradients_are_those_of_the_definition(
    backbone: str, kind: str, k: int, rule: str, mask: torch.Tensor | None
) -> None:
    model = small_model(backbone, kind, weight_rule=rule).train()
    reference = reference_of(model)
    ids = random_ids(3, 9)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, experts_per_token=k).loss
    want = next_token_loss(reference(ids, attention_mask=mask, k=k).logits, labels)
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-11)
    loss.backward()
    want.backward()
    for key, grad in gradients_in_official_names(model).items():
        exact = reference.state[key].grad
        exact = torch.zeros_like(grad) if exact is None else exact
        if "gate." in key and k == 1 and rule == "renormalized":
            assert float(grad.abs().max()) <= 1e-6 * float(want.detach()), "closed form gives zero"
        else:
            assert_close(grad, exact, MODEL_FLOAT64)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_labels_route_and_leave_the_router_a_zero_gradient(backbone: str, kind: str) -> None:
    model = small_model(backbone, kind).train()
    ids, labels = random_ids(3, 9), torch.randint(0, 4, (3, 9))
    labels[:, 0] = -1
    resolved = labels.clone()
    resolved[:, 0] = 3
    rows = torch.nn.functional.one_hot(resolved, 4).double()
    reference = reference_of(model)
    out = model(ids, labels=ids, routing_labels=labels, experts_per_token=2, output_routing=True, skip_logits=False)
    want = reference(ids, rows=rows, k=2)
    assert_close(out.logits, want.logits, MODEL_FLOAT64)
    assert torch.equal(out.routing.ids[..., 0].long(), resolved.expand(2, 3, 9))
    assert torch.equal(out.router_logits[0].view(3, 9, 4).double(), rows)
    out.loss.backward()
    next_token_loss(want.logits, ids).backward()
    for key, grad in gradients_in_official_names(model).items():
        exact = reference.state[key].grad
        if exact is None:
            assert "gate." in key
            assert float(grad.abs().max()) == 0
        else:
            assert_close(grad, exact, MODEL_FLOAT64)


def test_rows_of_weights_and_sequence_labels() -> None:
    model = small_model()
    ids = random_ids(2, 6)
    rows = torch.rand(2, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        got = model(ids, routing_weights=rows, experts_per_token=3).logits
        assert_close(got, reference_of(model)(ids, rows=rows, k=3).logits, MODEL_FLOAT64)
        per_row = model(ids, routing_labels=torch.tensor([2, -1])).logits
        per_slot = model(ids, routing_labels=torch.tensor([[2] * 6, [3] * 6])).logits
        by_weight = model(ids, routing_weights=torch.eye(4)[[2, 3]]).logits
    assert torch.equal(per_row, per_slot)
    assert torch.equal(per_row, by_weight)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_steering_is_the_definition(backbone: str, kind: str) -> None:
    model = small_model(backbone, kind)
    ids = random_ids(2, 7)
    generator = torch.Generator().manual_seed(5)
    ablate = torch.rand(2, 2, 7, 4, generator=generator) < 0.4
    ablate[..., 1] = False
    bias = torch.randn(1, 2, 1, 4, generator=generator)
    force = torch.full((2, 1, 7), -1)
    force[0, 0, 3] = force[1, 0, 5] = 1
    with torch.no_grad():
        for k in (1, 2):
            got = model(ids, ablate=ablate, bias=bias, force=force, experts_per_token=k, output_routing=True)
            want = reference_of(model)(ids, ablate=ablate, bias=bias, force=force, k=k)
            assert_close(got.logits, want.logits, MODEL_FLOAT64)
            allowed = ~ablate.transpose(0, 1).gather(-1, got.routing.ids.long())
            assert bool((allowed | (got.routing.weights == 0)).all())
            assert bool((got.routing.ids[:, 0, 3, 0] == 1).all())


def dense_twin(backbone: str, kind: str, dtype: torch.dtype) -> tuple[torch.nn.Module, MiCRoForCausalLM]:
    """A dense model and a MiCRo model of four clones of its blocks, router at random."""
    config = small_config(backbone, kind)
    common = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "tie_word_embeddings",
        )
    }  # fmt: skip
    torch.manual_seed(3)
    if backbone == "olmo2":
        dense = Olmo2ForCausalLM(Olmo2Config(**common, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    else:
        dense = LlamaForCausalLM(LlamaConfig(**common, head_dim=config.head_dim))
    dense = dense.to(dtype).eval()
    model = MiCRoForCausalLM(config).to(dtype).eval()
    state = dense.state_dict()
    official = {}
    for key in __import__("micro.modeling.keys", fromlist=["x"]).official_map(config):
        name = key.replace("final_norm", "norm").replace("block_sparse_moe.experts", "experts")
        if "gate.0" in name or "gate.1" in name:
            continue
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts")
            rest = parts[at + 2 :] if kind == "block" else ["mlp", *parts[at + 2 :]]
            name = ".".join([*parts[:at], *rest])
        official[key] = state[name if name.startswith("lm_head") else f"model.{name}"]
    report = model.load_state_dict(official, strict=False)
    assert all("router" in name for name in report.missing_keys)
    assert not report.unexpected_keys
    return dense, model


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("k", [1, 3])
def test_four_clones_are_the_dense_model(backbone: str, kind: str, k: int) -> None:
    dense, model = dense_twin(backbone, kind, torch.float32)
    ids = random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = dense(ids, attention_mask=mask, position_ids=positions).logits
        got = model(ids, attention_mask=mask, position_ids=positions, experts_per_token=k).logits
    assert_close(got[mask.bool()], want[mask.bool()], 2e-5)


@pytest.mark.parametrize("backbone", ["llama", "olmo2"])
def test_llama3_scaling_and_tied_head(backbone: str) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = small_model(backbone, rope_parameters=rope, tie_word_embeddings=True, head_dim=16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = random_ids(1, 40)
    with torch.no_grad():
        want = reference_of(model)(ids).logits
        assert_close(model(ids).logits, want, MODEL_FLOAT64)
        plain = small_model(backbone, tie_word_embeddings=True, head_dim=16)(ids).logits
    assert float((plain - want).abs().max()) > 1e-3


def test_four_dimensional_masks_replace_the_causal_rule() -> None:
    model = small_model()
    ids = random_ids(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    added = torch.where(causal, 0.0, -1e9).double().expand(2, 1, 6, 6)
    with torch.no_grad():
        want = model(ids).logits
        assert_close(model(ids, attention_mask=causal).logits, want, MODEL_FLOAT64)
        assert_close(model(ids, attention_mask=added).logits, want, MODEL_FLOAT64)
        diagonal = model(ids, attention_mask=torch.eye(6, dtype=torch.bool)[None, None]).logits
        alone = model(ids[:, 3:4], position_ids=torch.tensor([[3]])).logits
    assert_close(diagonal[:, 3:4], alone, MODEL_FLOAT64)
    with pytest.raises(ValueError, match="4-D attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 4, 6, 6))
    with pytest.raises(ValueError, match="one column for each"):
        model(ids, attention_mask=torch.ones(2, 5))


def test_logits_to_keep_and_skip() -> None:
    model = small_model()
    ids = random_ids(2, 6)
    with torch.no_grad():
        whole = model(ids).logits
        assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], MODEL_FLOAT64)
        assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]], MODEL_FLOAT64)
        assert model(ids, labels=ids, skip_logits=True).logits is None
        assert model(ids, labels=ids).logits.shape == (2, 6, 61)
        sliced = model(ids, labels=ids, logits_to_keep=1)
    assert float(sliced.loss) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-12)
    model.train()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    backwards = torch.arange(5, -1, -1)  # as many slots as there are, in another order
    turned = model(ids, labels=ids, logits_to_keep=backwards, skip_logits=False)
    assert float(turned.loss) == pytest.approx(float(sliced.loss), rel=1e-12)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, logits_to_keep=-1)


def test_num_items_and_no_target() -> None:
    model = small_model().train()
    ids = random_ids(2, 6)
    total = float(model(ids, labels=ids).loss) * 10
    assert float(model(ids, labels=ids, num_items_in_batch=40).loss) == pytest.approx(total / 40, rel=1e-12)
    tensor = model(ids, labels=ids, num_items_in_batch=torch.tensor(40)).loss
    assert float(tensor) == pytest.approx(total / 40, rel=1e-12)
    one = model(ids, labels=ids, num_items_in_batch=torch.tensor([40])).loss
    assert one.shape == ()
    assert float(one) == pytest.approx(total / 40, rel=1e-12)


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["none", "number", "tensor"])
def test_no_target_is_loss_zero_with_zero_gradients(items: torch.Tensor | int | None) -> None:
    model, ids = small_model().train(), random_ids(2, 6)
    nothing = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())


def test_hidden_states_by_config() -> None:
    model = small_model(output_hidden_states=True)
    ids = random_ids(1, 4)
    assert len(model(ids).hidden_states) == 3
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_checkpointing_refuses_a_filled_cache() -> None:
    model = small_model()
    ids = random_ids(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("head_dim", [2, 20])
def test_head_sizes_between_the_steps_of_the_kernels(backbone: str, kind: str, head_dim: int) -> None:
    model = small_model(backbone, kind, head_dim=head_dim).train()
    reference, ids = reference_of(model), random_ids(2, 7)
    want = next_token_loss(reference(ids).logits, ids)
    want.backward()
    model(ids, labels=ids).loss.backward()
    for name, grad in gradients_in_official_names(model).items():
        theirs = reference.state[name].grad
        assert_close(grad, torch.zeros_like(grad) if theirs is None else theirs, MODEL_FLOAT64)
    with torch.no_grad():
        whole = model.eval()(ids).logits
        cached = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=cached.past_key_values)
    assert_close(torch.cat([cached.logits, rest.logits], 1), whole, MODEL_FLOAT64)


def test_refused_arguments() -> None:
    model = small_model()
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="attention matrices"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(ValueError, match=r"shape \[1, 0\], expected \[rows, slots\]"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        model(ids[0])
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(ids, ablated="logic")


def test_bfloat16_error_is_of_the_order_of_the_eager_reference() -> None:
    exact = small_model()
    rounded = small_model(dtype=torch.bfloat16)
    rounded.load_state_dict({k: v.bfloat16() for k, v in exact.state_dict().items()})
    exact.load_state_dict({k: v.double() for k, v in rounded.state_dict().items()})
    ids = random_ids(2, 9)
    labels = torch.randint(0, 4, (2, 9))
    rows = torch.nn.functional.one_hot(labels, 4).double()
    with torch.no_grad():
        want = exact(ids, routing_labels=labels).logits
        mine = rounded(ids, routing_labels=labels).logits.double()
        eager = reference_of(rounded)(ids, rows=rows).logits.double()
    assert float((mine - want).abs().mean()) <= 2 * float((eager - want).abs().mean())


def test_fast_numerics_fold_the_router_without_gradient_only() -> None:
    exact, fast = small_model(), small_model(numerics="fast")
    ids = random_ids(2, 9)
    with torch.no_grad():
        a, b = exact(ids, output_routing=True), fast(ids, output_routing=True)
        assert torch.equal(a.routing.ids, b.routing.ids)
        assert_close(b.logits, a.logits, MODEL_FLOAT64)
        router = fast.model.layers[0].router
        assert router._folded[1].shape == (4, 32)
        prompt = fast(ids)
        folded = router._folded[1]
        fast(ids[:, :1], past_key_values=prompt.past_key_values)
        assert router._folded[1] is folded, "folded once for a prompt and what is decoded behind it"
        router.out_proj.weight.mul_(2)  # as an optimiser step does
        exact.model.layers[0].router.out_proj.weight.mul_(2)
        assert_close(fast(ids).logits, exact(ids).logits, MODEL_FLOAT64)
        for model in (fast, exact):
            model.model.layers[0].router.in_proj.weight.data.neg_()  # which no version counter counts
        assert_close(fast(ids).logits, exact(ids).logits, MODEL_FLOAT64)
    for register in (router.in_proj.register_forward_hook, router.in_proj.register_forward_pre_hook):
        seen: list[int] = []
        handle = register(lambda *_, seen=seen: seen.append(1))
        with torch.no_grad():
            fast(ids)
        handle.remove()
        assert seen, "a hook on a map runs"
    fast.train()(ids, labels=ids, experts_per_token=2).loss.backward()
    exact.train()(ids, labels=ids, experts_per_token=2).loss.backward()
    assert_close(router.in_proj.weight.grad, exact.model.layers[0].router.in_proj.weight.grad, MODEL_FLOAT64)


def test_autocast() -> None:
    for backbone, kind in ALL_FOUR:
        model = small_model(backbone, kind, dtype=torch.float32).train()
        ids = random_ids(2, 9)
        want = float(model(ids, labels=ids, routing_labels=ids % 4).loss.detach())
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, routing_labels=ids % 4).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert float(loss.detach()) == pytest.approx(want, rel=0.02)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
