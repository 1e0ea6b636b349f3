"""Interrupted at any moment, a run goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from micro.training import CheckpointError, run
from micro.training import recipe as recipes

SETTINGS = [
    "datasets.reasoning={generate: {n: 10}}",
    "max_length=160",
    "batch_size=4",
    "micro_batch_size=2",
    "save_every=2",
    "stages.induce.max_steps=5",  # into the second epoch of three steps
    "stages.calibrate.max_steps=4",
    "stages.finish.max_steps=2",
]


def small(*settings: str) -> recipes.Recipe:
    return recipes.load("smoke", [*SETTINGS, *settings])


class At(TrainerCallback):
    """Does something at the end of one step of one stage."""

    def __init__(self, stage: str, step: int, action: Any) -> None:
        self.stage, self.step, self.action = stage, step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.output_dir.endswith(self.stage) and state.global_step == self.step:
            self.action()


def send(number: int) -> Any:
    return lambda: os.kill(os.getpid(), number)


def in_child(action: Any) -> int:
    """Run in a forked process (which has torch loaded already); its wait status. A copy that returns ends with 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def steps_of(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(record["stage"], record["step"]) for record in map(json.loads, lines)]


def assert_equal_runs(a: Path, b: Path) -> None:
    left, right = load_file(a / "model" / "model.safetensors"), load_file(b / "model" / "model.safetensors")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert steps_of(a) == steps_of(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(small(), output_dir=folder, quiet=True).status == "done"
    return folder


def test_int_then_kill_then_int_and_resumed_each_time(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(small(), output_dir=folder, quiet=True, callbacks=[At("1-induce", 4, send(signal.SIGINT))])
    assert first.status == "interrupted"
    assert (folder / "1-induce" / "checkpoint-4").is_dir()
    kill = [At("2-calibrate", 3, send(signal.SIGKILL))]  # after the save at step 2
    assert in_child(lambda: run(small(), output_dir=folder, resume=True, quiet=True, callbacks=kill)) == signal.SIGKILL
    assert (folder / "2-calibrate" / "checkpoint-2").is_dir()
    last = run(small(), output_dir=folder, resume=True, quiet=True, callbacks=[At("3-finish", 1, send(signal.SIGTERM))])
    assert last.status == "interrupted"
    assert run(small(), output_dir=folder, resume=True, quiet=True).status == "done"
    assert_equal_runs(whole, folder)


def test_kill_at_a_stage_border_and_before_the_first_save(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for stage, step in (("1-induce", 1), ("1-induce", 5), ("2-calibrate", 1), ("3-finish", 2)):
        kill = [At(stage, step, send(signal.SIGKILL))]
        status = in_child(lambda k=kill: run(small(), output_dir=folder, resume=True, quiet=True, callbacks=k))
        assert status == signal.SIGKILL
    assert run(small(), output_dir=folder, resume=True, quiet=True).status == "done"
    assert_equal_runs(whole, folder)


def test_a_stage_whose_end_was_not_written_down_is_done_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(small(), output_dir=folder, quiet=True, callbacks=[At("2-calibrate", 1, send(signal.SIGINT))])
    stored = json.loads((folder / "run.json").read_text())
    stored["stages"][0] = {"name": "induce", "status": "waiting"}  # as a kill leaves it, right after the stage's model
    (folder / "run.json").write_text(json.dumps(stored))
    run(small(), output_dir=folder, resume=True, quiet=True)
    states = json.loads((folder / "run.json").read_text())["stages"]
    assert [(s["status"], s["model"]) for s in states] == [
        ("done", "1-induce/model"),
        ("done", "2-calibrate/model"),
        ("done", "model"),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ("precision=bfloat16", "stages.induce.random_labels=true", "gradient_checkpointing=true"),
        ("precision=autocast", "kind=ffn", "losses={load_balancing_loss: 0.01, z_loss: 0.001}", "save_every=epoch"),
        ("kind=dense", "stages=[{name: train, data: reasoning, epochs: 2}]", "save_every=50%"),
    ],
)
def test_other_precisions_kinds_and_controls_resume_exactly(tmp_path: Path, settings: tuple[str, ...]) -> None:
    recipe = small(*(setting for setting in settings))
    run(recipe, output_dir=tmp_path / "whole", quiet=True)
    name = recipe.stage(0).folder
    interrupt = [At(name, 3, send(signal.SIGINT))]
    assert run(recipe, output_dir=tmp_path / "run", quiet=True, callbacks=interrupt).status == "interrupted"
    assert run(recipe, output_dir=tmp_path / "run", resume=True, quiet=True).status == "done"
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_touching_the_trigger_saves_and_goes_on(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    touch = [At("1-induce", 3, (folder / "CHECKPOINT").touch)]
    recipe = small("save_every=never")
    result = run(recipe, output_dir=folder, quiet=True, callbacks=touch)
    assert result.status == "done"
    assert [path.name for path in (folder / "1-induce").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (folder / "CHECKPOINT").exists()
    one = folder / "1-induce" / "checkpoint-3"
    again = run(recipe, output_dir=folder, resume=one, quiet=True)
    assert again.status == "done"
    assert_equal_runs(whole, folder)


def test_incomplete_and_foreign_checkpoints_are_refused(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(small(), output_dir=folder, quiet=True, callbacks=[At("1-induce", 3, send(signal.SIGINT))])
    with pytest.raises(ValueError, match="no checkpoint of this run"):
        run(small(), output_dir=folder, resume=whole / "1-induce" / "checkpoint-2", quiet=True)
    state = folder / "1-induce" / "checkpoint-3" / "scheduler.pt"
    state.unlink()
    with pytest.raises(CheckpointError, match=r"scheduler\.pt is missing"):
        run(small(), output_dir=folder, resume=True, quiet=True)


def test_checkpoints_are_rotated_and_keep_last_may_change(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = small("save_every=1", "keep_last=2")
    run(recipe, output_dir=folder, quiet=True, callbacks=[At("1-induce", 4, send(signal.SIGINT))])
    assert sorted(path.name for path in (folder / "1-induce").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    recipe = small("save_every=never", "keep_last=1")
    assert run(recipe, output_dir=folder, resume=True, quiet=True).status == "done"
