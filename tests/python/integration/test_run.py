"""Whole runs of small recipes: what they write, what they refuse, the baselines, the command."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import micro
from micro.cli import main as cli
from micro.training import RecipeError, run
from micro.training import recipe as recipes
from micro.training.plan import check_disk, make_plan
from micro.training.runner import RunResult

SMALL = ["datasets.reasoning={generate: {n: 12}}", "max_length=256", "batch_size=4", "micro_batch_size=2"]


def small(name: str = "smoke", *settings: str) -> recipes.Recipe:
    return recipes.load(name, [*SMALL, *settings])


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return run(small("smoke", "report_to=[csv, tensorboard]", "save_every=never"), output_dir=folder, quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_leaves_a_model_that_loads_with_its_tokenizer(done: RunResult) -> None:
    from transformers import AutoTokenizer

    assert done.status == "done"
    model = micro.load(done.model_dir)
    for (name, a), (_, b) in zip(model.named_parameters(), done.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (model.config.loss_coefficients, model.config.num_experts_per_tok, model.config.use_cache) == ({}, 1, True)
    assert AutoTokenizer.from_pretrained(done.model_dir).chat_template == done.tokenizer.chat_template


def test_each_stage_trains_what_it_should_and_nothing_else(done: RunResult, tmp_path: Path) -> None:
    from micro.training import backbone

    backbone.start(small())[0].save_pretrained(tmp_path)
    start = weights(tmp_path)
    after = [weights(done.output_dir / folder / "model") for folder in ("1-induce", "2-calibrate", "")]
    routers = {name for name in start if ".gate." in name}
    assert routers and routers < start.keys()
    for name in start:
        moved = [not torch.equal(start[name], after[0][name])]
        moved += [not torch.equal(after[i][name], after[i + 1][name]) for i in range(2)]
        if name in routers:
            assert moved[:2] == [False, True], name  # stage 3: only weight decay moves a router (model.md 2.10.5)
        else:
            assert moved == [True, False, True], name


def test_metrics_hold_every_step_and_every_quantity(done: RunResult) -> None:
    lines = records(done.output_dir)
    assert [(r["stage"], r["step"]) for r in lines] == [
        *(("induce", step) for step in range(1, 5)),
        *(("calibrate", step) for step in range(1, 5)),
        *(("finish", step) for step in (1, 2)),
    ]
    for r in lines:
        assert r["loss"] == pytest.approx(r["lm_loss"], rel=1e-6)  # no auxiliary loss in this recipe
        assert {"learning_rate", "gradient_norm", "tokens_per_second", "usage_entropy", "memory_bytes"} <= r.keys()
        assert sum(r["load"].values()) == pytest.approx(1, abs=1e-5)
        assert len(r["load_by_layer"]) == 2
        assert (r["label_accuracy"] is None) == (r["stage"] == "induce")
    assert [r["learning_rate"] for r in lines[:2]] == [0.0, 1e-3]  # warm-up of one step starts at 0
    folder = done.output_dir
    assert "load_by_layer.1.social" not in (folder / "metrics.csv").read_text()
    assert "load_by_layer.1.1," in (folder / "metrics.csv").read_text()
    assert list((folder / "tensorboard").glob("events*"))


def test_run_json_tells_what_was_run(done: RunResult) -> None:
    stored = json.loads((done.output_dir / "run.json").read_text())
    assert stored["recipe"]["stages"][0]["name"] == "induce"
    assert [stage["status"] for stage in stored["stages"]] == ["done"] * 3
    assert [stage["model"] for stage in stored["stages"]] == ["1-induce/model", "2-calibrate/model", "model"]
    assert stored["versions"]["torch"] == torch.__version__
    assert [len(data["tokens_sha256"]) for data in stored["data"]] == [64] * 3


def test_no_two_optimizers_live_at_a_time(tmp_path: Path) -> None:
    alive: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                assert [ref() for ref in alive] == [None] * len(alive)
                alive.append(weakref.ref(kwargs["optimizer"].optimizer))

    run(small("smoke", "save_every=never"), output_dir=tmp_path / "run", quiet=True, callbacks=[Watch()])
    assert len(alive) == 3


def test_a_finished_run_is_not_trained_again(done: RunResult) -> None:
    before = (done.model_dir / "model.safetensors").stat().st_mtime_ns
    again = run(small("smoke", "save_every=never"), output_dir=done.output_dir, resume=True, quiet=True)
    assert (again.status, again.seconds) == ("done", {})
    assert (done.model_dir / "model.safetensors").stat().st_mtime_ns == before


def test_a_used_folder_and_a_changed_recipe_are_refused(done: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not empty"):
        run(small(), output_dir=done.output_dir, quiet=True)
    with pytest.raises(ValueError, match="changed in seed, learning_rate"):
        run(small("smoke", "learning_rate=1e-4", "seed=5"), output_dir=done.output_dir, resume=True, quiet=True)
    with pytest.raises(ValueError, match=r"no run\.json"):
        run(small(), output_dir=tmp_path, resume=tmp_path / "checkpoint-1", quiet=True)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"no run\.json"):
        run(small(), output_dir=tmp_path, resume=True, quiet=True)


def test_changed_data_are_refused(tmp_path: Path) -> None:
    from micro.data import generate, save_records

    path = tmp_path / "train.jsonl"
    save_records(generate(8, seed=0), path)
    recipe = small("smoke", f"datasets.reasoning={path}")
    run(recipe, output_dir=tmp_path / "run", quiet=True)
    save_records(generate(8, seed=1), path)
    with pytest.raises(ValueError, match="rows of stage 'induce' differ"):
        run(recipe, output_dir=tmp_path / "run", resume=True, quiet=True)


def test_dry_run_prints_the_cost_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(small(), output_dir=tmp_path / "run", dry_run=True)
    assert result.status == "dry run"
    assert not (tmp_path / "run").exists()
    stage = result.plan.stages[1]
    assert stage.trainable == {"routers": result.plan.parameters["routers"]}
    assert (stage.steps, stage.batch_size, stage.memory["optimizer"]) == (4, 4, 8 * stage.trainable_total)
    out = capsys.readouterr().out
    assert "routers" in out and "disk needed" in out


@pytest.mark.parametrize(("batch", "steps", "visits"), [(32, 2, 2.0), (8, 3, 1 + 8 / 12), (4, 7, 2 + 4 / 12)])
def test_the_plan_counts_the_last_window_of_an_epoch_as_it_is(
    tmp_path: Path, batch: int, steps: int, visits: float
) -> None:
    settings = [f"stages=[{{name: a, data: reasoning, max_steps: {steps}}}]", f"batch_size={batch}"]
    plan = run(small("smoke", *settings), output_dir=tmp_path, dry_run=True, quiet=True).plan.stages[0]
    once = run(small("smoke", *settings, "stages.a.epochs=1"), output_dir=tmp_path, dry_run=True, quiet=True)
    assert (plan.rows, plan.tokens) == (12, round(once.plan.stages[0].tokens * visits))


def test_a_stage_that_trains_nothing_is_an_error() -> None:
    from micro.training import backbone
    from micro.training.sources import load_stage_data

    recipe = small()
    model, tokenizer = backbone.start(recipe)
    stage = recipe.stage(0)
    data = load_stage_data(stage, tokenizer, experts=4, seed=0)
    with pytest.raises(ValueError, match="stage 'induce' trains nothing"):
        make_plan(recipe, model, [stage], [data], [lambda name: False], 1)
    with pytest.raises(ValueError, match="no multiple of micro_batch_size 2 times 3 processes"):
        make_plan(recipe, model, [stage], [data], [lambda name: True], 3)


def test_a_full_disk_is_noticed_before_the_run(tmp_path: Path) -> None:
    plan = run(small(), output_dir=tmp_path / "run", dry_run=True, quiet=True).plan
    object.__setattr__(plan, "disk", 10**18)
    with pytest.raises(ValueError, match="on disk and"):
        check_disk(plan, tmp_path / "a" / "b")


CHAT = "datasets.chat={path: %s, format: chat}"
THREE = [
    f"stages.{name}.{setting}"
    for name in ("induce", "calibrate", "finish")
    for setting in ("epochs=null", "max_steps=2")
]
TWO = [setting for setting in THREE if "calibrate" not in setting]
ONE = ["stages.train.epochs=null", "stages.train.max_steps=2"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dense", ONE),
        ("mob", ONE),
        ("moe", ONE),
        ("random-labels", THREE),
        ("top-2", THREE),
        ("micro-moe", THREE),
        ("version-3", TWO),
        ("micro-3b", [*THREE, "preset=official"]),
    ],
)
def test_published_recipes_run_on_a_tiny_backbone(tmp_path: Path, name: str, settings: list[str]) -> None:
    from micro.data import generate_chat, save_chat

    save_chat(generate_chat(8, seed=0), tmp_path / "chat.jsonl")
    recipe = small(name, *settings, "backbone=tiny", CHAT % (tmp_path / "chat.jsonl"), "keep_stage_models=false")
    result = run(recipe, output_dir=tmp_path / "run", quiet=True)
    assert result.status == "done"
    lines = records(result.output_dir)
    assert len(lines) == 2 * len(recipe.stages)
    assert not list(result.output_dir.glob("*-*/model"))  # the earlier stages' models are gone
    if name == "dense":
        assert "load" not in lines[0]
        return
    model = micro.load(result.model_dir)
    assert model.dtype == torch.bfloat16
    assert model.config.num_experts_per_tok == recipe.stages[-1].experts_per_token
    if name == "moe":
        assert lines[0]["loss"] == pytest.approx(
            lines[0]["lm_loss"] + 0.001 * lines[0]["load_balancing_loss"], rel=1e-5
        )
        assert 0.9 < lines[0]["load_balancing_loss"] < 4
    if name == "random-labels":
        assert max(lines[0]["load"].values()) < 0.4  # every token at random, the prompts too
    if name == "mob":
        assert torch.equal(model.model.layers[0].router.in_proj.weight, start_router(recipe))


def start_router(recipe: recipes.Recipe) -> torch.Tensor:
    from micro.training import backbone

    return backbone.start(recipe)[0].model.layers[0].router.in_proj.weight


def test_the_command_lists_shows_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--list"]) == 0
    assert "smoke " in capsys.readouterr().out
    assert cli.run(["train", "smoke", "--show"]) == 0
    assert "backbone: tiny" in capsys.readouterr().out
    output = str(tmp_path / "run")
    assert cli.run(["train", "smoke", *SMALL, "--dry-run", "--json", "--output", output]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["stages"][0]["steps"] == 4
    assert cli.run(["train", "smok"]) == 2
    assert "did you mean 'smoke'" in capsys.readouterr().err
    assert cli.run(["train"]) == 2
    assert cli.run(["train", "smoke", "learning_rat=1"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


def test_ctrl_c_saves_and_ends_with_130(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"

    def press() -> None:
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    settings = ["stages.induce.max_steps=5000", "save_every=never"]
    assert cli.run(["train", "smoke", *SMALL, *settings, "--quiet", "--output", str(folder)]) == 130
    thread.join()
    assert "--resume" in capsys.readouterr().err
    assert len(list((folder / "1-induce").glob("checkpoint-*"))) == 1


def test_conversations_have_no_labels_to_route_by(tmp_path: Path) -> None:
    from micro.data import generate_chat, save_chat

    save_chat(generate_chat(8, seed=0), tmp_path / "chat.jsonl")
    by_router = ["stages=[{name: a, data: chat, max_steps: 1}]", CHAT % (tmp_path / "chat.jsonl")]
    run(small("smoke", *by_router), output_dir=tmp_path / "run", quiet=True)
    assert records(tmp_path / "run")[0]["label_accuracy"] is None
    for setting in ("stages.a.route_by=labels", "losses={label_loss: 1}"):
        with pytest.raises(ValueError, match="some of its rows"):
            run(small("smoke", *by_router, setting), output_dir=tmp_path / "other", quiet=True)


def test_the_padding_row_of_the_official_preset_never_learns(tmp_path: Path) -> None:
    from micro.training import backbone

    settings = ["stages=[{name: a, data: reasoning, max_steps: 2}]", "weight_decay=0", "save_every=never"]
    pad = backbone.start(small())[0].config.pad_token_id
    before = backbone.start(small())[0].model.embed_tokens.weight[pad]
    moved = {}
    for preset in ("official", "null"):
        result = run(small("smoke", *settings, f"preset={preset}"), output_dir=tmp_path / preset, quiet=True)
        moved[preset] = not torch.equal(before, result.model.model.embed_tokens.weight[pad])
    assert moved == {"official": False, "null": True}  # <|im_end|> is a real token here and stands in every prompt


def test_cut_and_dropped_rows_are_named(tmp_path: Path) -> None:
    from micro.data import DataWarning, generate, save_records
    from micro.training import backbone
    from micro.training.sources import load_stage_data

    found = list(generate(4, seed=1))
    found[2].assistant += " more" * 200
    save_records(found, tmp_path / "a.jsonl")
    recipe = small("smoke", f"datasets.reasoning={tmp_path / 'a.jsonl'}", "max_length=600")
    tokenizer = backbone.start(recipe)[1]
    with pytest.warns(DataWarning, match=r"stage 'induce': .*answer_cut 1 \(first: .*a.jsonl, record 2, field"):
        load_stage_data(recipe.stage(0), tokenizer, experts=4, seed=0)


def test_data_without_answers_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage 'induce'"):
        run(small("smoke", "max_length=8"), output_dir=tmp_path / "run", quiet=True)
    with pytest.raises(RecipeError, match=r"datasets\.reasoning=PATH"):
        run(recipes.load("dense", ["backbone=tiny"]), output_dir=tmp_path / "run", quiet=True)
