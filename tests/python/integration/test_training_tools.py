"""The model under the tools people train with: checkpointing, the plain Trainer, PEFT, autocast."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_models import ALL_FOUR, assert_close, random_ids, small_model
from tolerances import MODEL_FLOAT64
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from micro.modeling import MiCRoForCausalLM


def gradients(model: MiCRoForCausalLM, **inputs: object) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_bit_equal(backbone: str, kind: str, reentrant: bool) -> None:
    losses = {"load_balancing_loss": 0.1, "z_loss": 0.1, "label_loss": 0.1, "entropy": -0.1}
    model = small_model(backbone, kind, dtype=torch.float32, loss_coefficients=losses, jitter_noise=0.1).train()
    ids = random_ids(2, 9)
    labels = torch.randint(0, 4, (2, 9))
    for controls in (
        {"routing_labels": labels, "route_by": "router", "experts_per_token": 2},
        {"routing_labels": labels},
        {"ablate": "social", "experts_per_token": 2},
        {"force": "world"},
    ):
        inputs = {"input_ids": ids, "labels": ids, **controls}
        results = []
        for enabled in (False, True):
            if enabled:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            else:
                model.gradient_checkpointing_disable()
            torch.manual_seed(4)
            results.append(gradients(model, **inputs))
        for name, grad in results[0].items():
            assert torch.equal(grad, results[1][name]), (name, controls)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_replays_the_choice(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that answers differently the second time must not change who computes (model.md 2.10.11)."""
    from micro.modeling import router

    model = small_model(dtype=torch.float32).train()
    ids = random_ids(2, 9)
    want = gradients(model, input_ids=ids, labels=ids)
    honest, calls = router.MiCRoRouter.forward, []

    def fickle(self: router.MiCRoRouter, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        z = honest(self, x)
        return z if calls.count(self) == 1 else 0.01 * z.flip(-1)

    monkeypatch.setattr(router.MiCRoRouter, "forward", fickle)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, input_ids=ids, labels=ids)
    assert len(calls) == 4, "each layer is computed twice"
    for name, grad in want.items():
        if "router" not in name:
            assert torch.equal(grad, got[name]), name


def test_bias_that_learns_gets_its_gradient_under_checkpointing() -> None:
    model = small_model().train()
    ids = random_ids(1, 6)
    results = []
    for mode in (None, True, False):
        if mode is not None:
            model.gradient_checkpointing_enable({"use_reentrant": mode})
        bias = torch.zeros(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
        model(ids, labels=ids, bias=bias, experts_per_token=2).loss.backward()
        results.append(bias.grad)
    assert float(results[0].abs().max()) > 0
    assert torch.allclose(results[0], results[1], atol=1e-14) and torch.allclose(results[0], results[2], atol=1e-14)


def test_every_parameter_has_a_defined_gradient() -> None:
    """Experts without tokens and routers that nobody asks get exact zeros (model.md 2.10.3)."""
    for backbone, kind in ALL_FOUR:
        model = small_model(backbone, kind).train()
        ids = random_ids(1, 5)
        for controls in ({"force": "world"}, {"routing_labels": torch.full((1, 5), 2)}, {"ablate": [0, 1, 3]}):
            grads = gradients(model, input_ids=ids, labels=ids, **controls)
            for name, grad in grads.items():
                if ".blocks." in name:
                    assert float(grad[[0, 1, 3]].abs().max()) == 0, name
                    assert float(grad[2].abs().max()) > 0, name
                if "router" in name:
                    assert float(grad.abs().max()) == 0, name


def test_frozen_parts_pass_gradient() -> None:
    """Stage 2 trains routers only; dX flows through frozen blocks (model.md 2.10.7)."""
    model = small_model().train()
    ids = random_ids(2, 6)
    whole = gradients(model, input_ids=ids, labels=ids, experts_per_token=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" in name)
    only = gradients(model, input_ids=ids, labels=ids, experts_per_token=2)
    assert set(only) == {n for n in whole if "router" in n}
    for name, grad in only.items():
        assert_close(grad, whole[name], MODEL_FLOAT64)


def test_jitter_is_drawn_from_the_named_generator() -> None:
    model = small_model(jitter_noise=0.2).train()
    ids = random_ids(1, 6)
    with torch.no_grad():
        runs = []
        for seed in (1, 1, 2):
            model.model.jitter_generator = torch.Generator().manual_seed(seed)
            runs.append(model(ids, labels=ids, skip_logits=False).logits)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)


class Rows(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = random_ids(1, 7, seed=i)[0]
        return {"input_ids": ids, "labels": ids, "routing_labels": ids % 4}


def arguments(folder: Path, **options: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        label_names=["labels"],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=100,
        seed=1,
        **options,
    )


def test_plain_trainer_resumes_bit_equal(tmp_path: Path) -> None:
    start = small_model(dtype=torch.float32, loss_coefficients={"label_loss": 0.5})
    state = copy.deepcopy(start.state_dict())
    trainer = Trainer(start, arguments(tmp_path / "a", max_steps=6), train_dataset=Rows())
    trainer.train()
    assert any(not torch.equal(state[k], v) for k, v in start.state_dict().items())
    again = small_model(dtype=torch.float32, seed=5, loss_coefficients={"label_loss": 0.5})
    resumed = Trainer(again, arguments(tmp_path / "b", max_steps=6), train_dataset=Rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_plain_trainer_evaluates(tmp_path: Path) -> None:
    model = small_model(dtype=torch.float32)
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Rows())
    metrics = trainer.evaluate()
    with torch.no_grad():
        row = Rows()[0]
        assert model(**{k: v[None] for k, v in row.items()}).logits.shape == (1, 7, 61)
    assert 0 < metrics["eval_loss"] < 20


def test_peft_adapts_stacked_parameters() -> None:
    peft = pytest.importorskip("peft")
    model = small_model(dtype=torch.float32)
    ids = random_ids(2, 7)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    config = peft.LoraConfig(
        r=8, lora_dropout=0.0, target_modules=[], target_parameters=["blocks.q_proj.weight", "blocks.down_proj.weight"]
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        assert torch.equal(wrapped(ids, use_cache=False).logits, before), "LoRA starts at zero"
    wrapped.train()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert grads and all(float(g.abs().max()) > 0 for g in grads)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        wrapped.eval()
        adapted = wrapped(ids, use_cache=False).logits
        assert float((adapted - before).abs().max()) > 1e-3, "the delta is applied"
        merged = wrapped.merge_and_unload()
        assert_close(merged(ids, use_cache=False).logits, adapted, 1e-5)


def test_adapter_on_the_head_is_not_skipped() -> None:
    peft = pytest.importorskip("peft")
    model = small_model(dtype=torch.float32).train()
    ids = random_ids(1, 6)
    plain = float(model(ids, labels=ids).loss.detach())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    skipped = float(wrapped(input_ids=ids, labels=ids).loss.detach())
    whole = float(wrapped(input_ids=ids, labels=ids, skip_logits=False).loss.detach())
    assert skipped == pytest.approx(whole, rel=1e-5) and abs(skipped - plain) > 1e-3


def test_freeze_pad_row() -> None:
    ids = random_ids(1, 6)
    ids[0, 2] = 5
    for frozen in (False, True):
        model = small_model(pad_token_id=5, freeze_pad_row=frozen).train()
        grads = gradients(model, input_ids=ids, labels=ids)
        assert (float(grads["model.embed_tokens.weight"][5].abs().max()) == 0) is frozen
        assert float(grads["lm_head.weight"][5].abs().max()) > 0
