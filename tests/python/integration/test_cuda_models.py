"""Whole models on a CUDA device: what the CPU gives, forward, backward, decoding and training, and nobody waits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pretend_cuda import no_waits
from small_models import ALL_FOUR, random_ids, small_model
from torch import Tensor

from micro.modeling import MiCRoCache, MiCRoForCausalLM
from micro.optim import AdamW

pytestmark = pytest.mark.gpu

COEFFICIENTS = {"load_balancing_loss": 0.1, "z_loss": 0.1, "label_loss": 0.1, "entropy": 0.1}
# Two layers in float64, sums in another order.
BOUND = 1e-10


def pair(backbone: str, kind: str, **fields: Any) -> tuple[MiCRoForCausalLM, MiCRoForCausalLM]:
    """The same model on the CPU and on the device."""
    model = small_model(backbone, kind, **fields)
    return model, copy.deepcopy(model).to("cuda")


def near(got: Tensor, want: Tensor) -> None:
    assert got.device.type == "cuda"
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=BOUND, atol=BOUND)


def padded(rows: int, slots: int) -> Tensor:
    mask = torch.ones(rows, slots, dtype=torch.int64)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("backbone, kind", ALL_FOUR)
def test_forward_is_the_cpus(backbone: str, kind: str) -> None:
    cpu, cuda = pair(backbone, kind)
    ids, mask = random_ids(2, 9), padded(2, 9)
    with torch.no_grad():
        want = cpu(ids, attention_mask=mask, output_routing=True)
        got = cuda(ids.cuda(), attention_mask=mask.cuda(), output_routing=True)
    near(got.logits, want.logits)
    assert torch.equal(got.routing.ids.cpu(), want.routing.ids)


@pytest.mark.parametrize("backbone, kind", ALL_FOUR)
@pytest.mark.parametrize("k", [1, 2])
def test_gradients_are_the_cpus(backbone: str, kind: str, k: int) -> None:
    cpu, cuda = pair(backbone, kind, loss_coefficients=COEFFICIENTS, num_experts_per_tok=k)
    ids, mask, labels = random_ids(2, 9), padded(2, 9), torch.arange(18).view(2, 9) % 4
    for model in (cpu, cuda):
        to = model.device
        out = model.train()(
            ids.to(to), attention_mask=mask.to(to), labels=ids.to(to), routing_labels=labels.to(to), route_by="router"
        )
        out.loss.backward()
    for (name, mine), theirs in zip(cuda.named_parameters(), cpu.parameters(), strict=True):
        assert mine.grad is not None, name
        near(mine.grad, theirs.grad)


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_nobody_waits_in_a_step(kind: str) -> None:
    """Forward with labels and padding, backward, and one decoded token."""
    _, model = pair("llama", kind, loss_coefficients=COEFFICIENTS)
    ids, mask = random_ids(2, 9).cuda(), padded(2, 9).cuda()
    labels = (torch.arange(18).view(2, 9) % 4).cuda()
    model.train()(ids, attention_mask=mask, labels=ids).loss.backward()  # tables are made once
    cache = MiCRoCache(model.config)
    with no_waits():
        out = model(ids, attention_mask=mask, labels=ids, routing_labels=labels, route_by="labels")
        out.loss.backward()
        model.eval()
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_decoding_is_the_prompts() -> None:
    _, model = pair("llama", "block")
    ids = random_ids(2, 9).cuda()
    cache = MiCRoCache(model.config)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :6], past_key_values=cache, use_cache=True)
        for slot in range(6, 9):
            step = model(ids[:, slot : slot + 1], past_key_values=cache, use_cache=True).logits[:, 0]
            near(step, whole[:, slot].cpu())


@pytest.mark.parametrize(
    "controls",
    [
        {"ablate": "logic"},
        {"force": "social"},
        {"bias": {"world": 2.0}},
        {"keep": ["logic", "language"]},
        {"routing_labels": torch.tensor([1, 2])},
        {"force": torch.full((1, 1, 1), 2)},
        {"ablate": torch.tensor([True, False, False, False]).view(1, 1, 1, 4)},
        {"experts_per_token": 3},
    ],
    ids=["ablate", "force", "bias", "keep", "labels", "force tensor", "ablate tensor", "k"],
)
@pytest.mark.parametrize("where", ["host", "device"])
def test_steering_is_the_cpus(controls: dict[str, Any], where: str) -> None:
    cpu, cuda = pair("llama", "block")
    ids = random_ids(2, 5)
    moved = {n: v.cuda() if isinstance(v, Tensor) and where == "device" else v for n, v in controls.items()}
    with torch.no_grad():
        want, got = cpu(ids, output_routing=True, **controls), cuda(ids.cuda(), output_routing=True, **moved)
    near(got.logits, want.logits)
    near(got.routing.probs, want.routing.probs)


def test_a_contradiction_on_the_host_is_a_clear_error() -> None:
    _, model = pair("llama", "block")
    with pytest.raises(ValueError, match="every expert is ablated at row 0, layer 0"):
        model(random_ids(2, 5).cuda(), ablate=["logic", "social", "world", "language"])


def test_generate_is_the_cpus() -> None:
    cpu, cuda = pair("llama", "block")
    ids = random_ids(2, 5)
    options = {"max_new_tokens": 3, "do_sample": False, "output_routing": True, "pad_token_id": 0}
    want, got = cpu.generate(ids, **options), cuda.generate(ids.cuda(), **options)
    assert torch.equal(got.sequences.cpu(), want.sequences)
    assert torch.equal(got.routing.ids.cpu(), want.routing.ids)


def test_three_steps_are_the_cpus() -> None:
    models = pair("llama", "block")
    ids = random_ids(2, 9)
    for model in models:
        optimizer = AdamW(model.train().parameters(), lr=1e-3, max_grad_norm=1.0)
        for _ in range(3):
            model(ids.to(model.device), labels=ids.to(model.device)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        near(mine, theirs)
