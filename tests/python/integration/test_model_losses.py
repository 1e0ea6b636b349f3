"""Auxiliary losses in the model: values by hand, windows, gradients to the routers."""

from __future__ import annotations

import pytest
import torch
from small_models import random_ids, small_model

COEFFICIENTS = {"load_balancing_loss": 0.3, "z_loss": 0.2, "label_loss": 0.7, "entropy": -0.1}
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = torch.tensor([[0, 1, 2, 3, -1, 1], [2, 2, 0, 1, 3, 3]])


def run(**fields: object):  # type: ignore[no-untyped-def]
    model = small_model(loss_coefficients=COEFFICIENTS, num_experts_per_tok=2, **fields).train()
    ids = random_ids(2, 6)
    targets = ids.masked_fill(MASK == 0, -100)
    return model, {"input_ids": ids, "attention_mask": MASK, "labels": targets, "routing_labels": LABELS}


def test_values_by_hand() -> None:
    model, inputs = run()
    out = model(**inputs, route_by="router", output_routing=True)
    trace, real = out.routing, MASK.bool()
    probs, ids, raw = trace.probs[:, real], trace.ids[:, real].long(), trace.raw_logits[:, real]
    share = torch.nn.functional.one_hot(ids, 4).double().mean((0, 1))  # [K,E]
    balance = 4 * (share * probs.mean((0, 1))).sum()
    z = raw.logsumexp(-1).square().mean()
    labels = LABELS.masked_fill(LABELS < 0, 3)[real]
    label = -raw.log_softmax(-1).gather(-1, labels.expand(2, -1)[..., None]).mean()
    entropy = -(probs * probs.log()).sum(-1).mean()
    want = {"load_balancing_loss": balance, "z_loss": z, "label_loss": label, "entropy": entropy}
    assert out.aux_losses.keys() == want.keys()
    for name, value in want.items():
        assert float(out.aux_losses[name].detach()) == pytest.approx(float(value), rel=1e-10), name
    total = out.lm_loss + sum(COEFFICIENTS[n] * v for n, v in want.items())
    assert float(out.loss.detach()) == pytest.approx(float(total), rel=1e-10)
    assert not out.lm_loss.requires_grad


def test_pooling_by_layer() -> None:
    model, inputs = run(aux_pooling="per_layer")
    out = model(**inputs, route_by="router", output_routing=True)
    real = MASK.bool()
    each = []
    for layer in range(2):
        probs, ids = out.routing.probs[layer][real], out.routing.ids[layer][real].long()
        each.append(4 * (torch.nn.functional.one_hot(ids, 4).double().mean(0) * probs.mean(0)).sum())
    value = float(out.aux_losses["load_balancing_loss"].detach())
    assert value == pytest.approx(float(sum(each) / 2), rel=1e-10)


def test_label_loss_under_label_routing_trains_the_router() -> None:
    """Labels route and teach at once: the loss reads the raw logits, not the labels themselves."""
    model, inputs = run()
    out = model(**inputs)
    out.aux_losses["label_loss"].backward(retain_graph=True)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if "router" in n}
    assert all(float(g.abs().max()) > 0 for g in grads.values())
    model.zero_grad()
    (out.loss - 0.7 * out.aux_losses["label_loss"] - 0.2 * out.aux_losses["z_loss"]).backward()
    assert all(float(p.grad.abs().max()) < 1e-12 for n, p in model.named_parameters() if "router" in n)


def test_an_accumulation_window_adds_up_to_its_mean() -> None:
    model, inputs = run()
    items = int((inputs["labels"] != -100).sum())
    whole = model(**inputs, route_by="router", num_items_in_batch=items, num_routing_items_in_batch=10)
    alone = model(**inputs, route_by="router")
    assert float(whole.aux_losses["z_loss"]) == pytest.approx(float(alone.aux_losses["z_loss"]), rel=1e-12)
    assert float(whole.aux_losses["label_loss"]) == pytest.approx(float(alone.aux_losses["label_loss"]), rel=1e-12)
    halves = {"z_loss": 0.0, "label_loss": 0.0, "entropy": 0.0}
    for row in range(2):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        out = model(**part, route_by="router", num_items_in_batch=items, num_routing_items_in_batch=10)
        for name in halves:
            halves[name] += float(out.aux_losses[name])
    for name, value in halves.items():
        assert value == pytest.approx(float(alone.aux_losses[name]), rel=1e-10), name
    model.config.aux_window = "sum"
    summed = model(**inputs, route_by="router", num_items_in_batch=5 * items)
    assert float(summed.aux_losses["z_loss"]) == pytest.approx(float(alone.aux_losses["z_loss"]), rel=1e-12)


def test_no_coefficient_no_loss() -> None:
    model = small_model().train()
    ids = random_ids(1, 5)
    out = model(ids, labels=ids)
    assert out.aux_losses is None
    assert float(out.loss.detach()) == float(out.lm_loss)
    model, inputs = run()
    inputs.pop("routing_labels")
    assert "label_loss" not in model(**inputs).aux_losses


def test_losses_without_labels_in_eval() -> None:
    model, inputs = run()
    model.eval()
    out = model(input_ids=inputs["input_ids"])
    assert out.loss is None and out.logits.shape == (2, 6, 61)


def test_a_window_without_items_is_no_division_by_zero() -> None:
    model, inputs = run()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out = model(**inputs, num_items_in_batch=torch.tensor(0), num_routing_items_in_batch=0)
    assert float(out.lm_loss) == 0
    assert torch.isfinite(out.loss)
