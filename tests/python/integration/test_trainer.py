"""MiCRoTrainer by itself: windows, schedule, optimizer, freezing, plain use without a curriculum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from micro.data import Collator
from micro.training import CheckpointError, Curriculum, MiCRoTrainer, backbone
from micro.training import recipe as recipes
from micro.training.curriculum import Stage, build_curriculum
from micro.training.sources import load_stage_data

RECIPE = recipes.load("smoke", ["datasets.reasoning={generate: {n: 10}}", "max_length=160", "batch_size=4"])


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """Tokenizer and rows; every test upcycles its own model."""
    _, tokenizer = backbone.start(RECIPE)
    return tokenizer, load_stage_data(RECIPE.stage(0), tokenizer, experts=4, seed=0).rows


def trainer(
    parts: tuple[Any, Any], folder: Path, curriculum: Any = None, model: Any = None, **arguments: Any
) -> MiCRoTrainer:
    tokenizer, rows = parts
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 3,
        **arguments,
    }
    return MiCRoTrainer(
        model=backbone.start(RECIPE)[0] if model is None else model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        curriculum=curriculum,
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=Collator(tokenizer),
    )


def curriculum(steps: int, **stage: Any) -> Any:
    return Curriculum([Stage(name="only", **stage)], [steps])


def after(one: MiCRoTrainer) -> dict[str, torch.Tensor]:
    one.train()
    return {name: parameter.detach().clone() for name, parameter in one.model.named_parameters()}


@pytest.mark.parametrize("losses", [{}, {"label_loss": 0.5}])
def test_a_window_of_micro_batches_is_one_batch(parts: Any, tmp_path: Path, losses: dict[str, float]) -> None:
    """Accumulation over 1, 2 or 4 micro batches makes one batch's step: language and label loss are means over the
    window (model.md 7.1, 7.4). SGD keeps the comparison linear: Adam would divide rounding by itself."""

    def change(size: int) -> dict[str, torch.Tensor]:
        model = backbone.start(RECIPE)[0]
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        one = trainer(
            parts,
            tmp_path,
            curriculum(1, loss_coefficients=losses, warmup_ratio=0.0, learning_rate=1.0, experts_per_token=2),
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            max_grad_norm=0.0,
        )
        one.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        return {name: value - before[name] for name, value in after(one).items()}

    whole = change(4)
    for size in (2, 1):
        parted = change(size)
        for name, value in whole.items():
            # Differences of float32 weights carry the weights' rounding, 2^-24 of about 1.
            assert float((value - parted[name]).abs().max()) < 1e-6 + 1e-4 * float(value.abs().max()), name


def test_aux_window_sum_adds_the_micro_batches(parts: Any, tmp_path: Path) -> None:
    """The official way: every micro batch adds its mean, so four of them count about four times (model.md 7.2)."""
    values = {}
    for window in ("mean", "sum"):
        one = trainer(
            parts,
            tmp_path,
            curriculum(1, loss_coefficients={"z_loss": 1.0}),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=1,
        )
        one.model.config.aux_window = window
        one.train()
        values[window] = one.step_summary()[0]
    assert values["sum"]["lm_loss"] == pytest.approx(values["mean"]["lm_loss"], rel=1e-6)
    assert values["sum"]["z_loss"] == pytest.approx(4 * values["mean"]["z_loss"], rel=0.02)


def test_the_rate_follows_the_curriculum_and_clipping_is_the_norm(parts: Any, tmp_path: Path) -> None:
    one = trainer(parts, tmp_path, curriculum(6, learning_rate=1e-3, warmup_ratio=0.3), max_steps=6)
    one.train()
    logged = [entry["learning_rate"] for entry in one.state.log_history if "learning_rate" in entry]
    warm = math.ceil(0.3 * 6)
    factors = [n / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / (6 - warm))) for n in range(6)]
    assert logged == pytest.approx([1e-3 * factor for factor in factors], abs=1e-12)
    assert all(entry["grad_norm"] > 0 for entry in one.state.log_history if "loss" in entry)


def test_decay_spares_norm_gains_and_frozen_parts_have_no_state(parts: Any, tmp_path: Path) -> None:
    one = trainer(parts, tmp_path, curriculum(3, trainable=["experts"], freeze="r1", route_by="labels"))
    one.train()
    names = {id(parameter): name for name, parameter in one.model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in one._adamw.param_groups for p in group["params"]}
    assert decay and all(".blocks." in name for name in decay)
    assert {value for name, value in decay.items() if "norm" in name} == {0.0}
    assert {names[id(p)] for p in one._adamw.state} == decay.keys()
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_evaluation_routes_as_the_stage_does(parts: Any, tmp_path: Path) -> None:
    """Also once the curriculum has moved on, and whatever labels the rows carry."""
    model = backbone.start(RECIPE)[0]
    for name, parameter in model.named_parameters():
        if ".blocks." in name and parameter.dim() == 3:  # experts that differ
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    tokenizer, rows = parts
    batch = Collator(tokenizer)([rows[i] for i in range(len(rows))])
    seen = {}
    for route_by, k in (("router", 3), ("labels", 1)):
        stages = [Stage(route_by=route_by, experts_per_token=k, learning_rate=0.0), Stage(route_by="labels")]
        one = trainer(parts, tmp_path / route_by, Curriculum(stages, [3, 1]), model, per_device_eval_batch_size=10)
        one.train()
        with torch.no_grad():
            seen[route_by] = float(model.eval()(**batch, route_by=route_by, experts_per_token=k).loss)
        assert one.evaluate()["eval_loss"] == pytest.approx(seen[route_by], rel=1e-6)
    assert seen["router"] != pytest.approx(seen["labels"], rel=1e-5)


def test_without_a_curriculum_it_is_a_trainer(parts: Any, tmp_path: Path) -> None:
    """Frozen parameters and schedule are the caller's; the log tells what the experts did; evaluation gives a loss."""
    model = backbone.start(RECIPE)[0]
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    one = trainer(parts, tmp_path, model=model, lr_scheduler_type="constant", learning_rate=1e-3)
    one.train()
    entry = one.state.log_history[0]
    assert {"loss", "lm_loss", "grad_norm", "usage_entropy", "load/logic", "load/language"} <= entry.keys()
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert math.isfinite(one.evaluate()["eval_loss"])


def test_saving_keeps_use_cache_and_the_tokenizer(parts: Any, tmp_path: Path) -> None:
    import micro

    one = trainer(parts, tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    one.train()
    folders = [path.name for path in tmp_path.iterdir()]
    assert folders == ["checkpoint-2"]
    loaded = micro.load(tmp_path / "checkpoint-2")
    assert loaded.config.use_cache
    assert (tmp_path / "checkpoint-2" / "tokenizer.json").is_file()
    for (name, a), (_, b) in zip(loaded.named_parameters(), one.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_resuming_without_a_curriculum_is_exact_and_strict(parts: Any, tmp_path: Path) -> None:
    whole = after(trainer(parts, tmp_path / "a", max_steps=5))
    first = trainer(parts, tmp_path / "b", max_steps=5, save_strategy="steps", save_steps=3)
    first.train()
    second = trainer(parts, tmp_path / "b", max_steps=5)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, whole[name]), name
    (tmp_path / "b" / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        trainer(parts, tmp_path / "c").train(resume_from_checkpoint=True)


def test_weights_that_find_no_place_are_an_error(parts: Any, tmp_path: Path) -> None:
    class Result:
        missing_keys = ("lm_head.weight",)
        unexpected_keys = ()

    with pytest.raises(CheckpointError, match=r"missing \['lm_head\.weight'\]"):
        trainer(parts, tmp_path)._issue_warnings_after_load(Result())


def test_a_recipe_becomes_the_curriculum_that_it_says() -> None:
    """Words of recipes against names of parameters, by freeze rule (model.md 6.1)."""
    names = {
        "experts": "model.layers.0.blocks.q_proj.weight",
        "routers": "model.layers.0.router.in_proj.weight",
        "rest": "lm_head.weight",
    }
    expected = {
        ("r1", "experts"): {"experts"},
        ("r2", "experts"): {"experts", "rest"},
        ("r1", "routers"): {"routers"},
        ("r2", "routers"): {"routers"},
        ("r1", "but_routers"): {"experts", "rest"},
        ("r2", "but_routers"): {"experts", "rest"},
        ("r1", "everything"): set(names),
        ("r2", "everything"): set(names),
    }
    for kind in ("block", "ffn"):
        for (freeze, word), trained in expected.items():
            settings = [f"freeze={freeze}", f"kind={kind}", f"stages.calibrate.trainable={word}"]
            recipe = recipes.load("smoke", settings)
            stages = [recipe.stage(index) for index in range(3)]
            one = build_curriculum(recipe, stages, [2, 3, 4], start=1)
            assert (one.stage, one.step, one.experts_per_token(), one.route_by()) == (1, 0, 2, "router")
            assert {group for group, name in names.items() if one.trainable(name)} == trained, (kind, freeze, word)
