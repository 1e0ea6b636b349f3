"""The benchmarks run, on tiny shapes; no clock is looked at (performance.md 8.6)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import random_ids, small_model

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "benchmarks" / "python"

# What a user's copy of the official repository looks like from outside (model.md 5.4): classes in some file, a
# constructor that opens the run file and forces flash attention, the official names of parameters.
COPY = """
import yaml
from transformers import LlamaConfig, Olmo2Config
from models.base import Base

class MiCRoLlama(Base):
    config_class = LlamaConfig

class MiCRoOLMo(Base):
    config_class = Olmo2Config
"""
BASE = """
import yaml
from all_experts import AllExperts

ATTENTION = "flash_attention_2"

class Base(AllExperts):
    def __init__(self, config):
        with open(config.config_path) as stream:
            run = yaml.safe_load(stream)
        config._attn_implementation = ATTENTION
        super().__init__(config, run["top-k-experts"])
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmarks; their names are short, so they do not stay."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import goals
    import outputs
    import paired
    import report

    yield SimpleNamespace(goals=goals, outputs=outputs, paired=paired, report=report)
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def bench(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / "run.py"), "--quick", "--rounds", "2", "--output", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's copy of the official repository."""
    copy = tmp_path_factory.mktemp("copy")
    (copy / "models").mkdir()
    (copy / "models" / "some_file.py").write_text(COPY)
    (copy / "models" / "base.py").write_text(BASE)
    return copy


@pytest.fixture(scope="module")
def results(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with a user's copy as the official side: every kind of row but the slow ones."""
    folder = tmp_path_factory.mktemp("results")
    out = bench(folder, "--rows", "G1b,G3c,G6,G7", "--official", str(copy))
    assert "official side: official classes (r2, transformers" in out
    assert list(copy.glob("**/*.pyc")) == []  # nothing is written into a user's folder
    return folder


def lines_of(folder: Path) -> dict[str, dict[str, Any]]:
    contents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {line["key"]: line for content in contents for line in content["lines"]}


def test_rows_run_and_are_reported(results: Path) -> None:
    lines = lines_of(results)
    assert {"G1b/llama", "G1b/olmo2", "G3c/forward", "G3c/engine", "G6/512", "G6/32", "G6/1", "G7/128"} <= set(lines)
    for key, line in lines.items():
        value = line["value"]
        assert 0 < value["low"] <= value["median"] <= value["high"] < math.inf, key
        assert line["compared"], f"{key}: nothing was compared"
        assert line["environment"]["probes"]["stream_read_gb_per_s"] > 0
        assert {"load_average", "cpu", "instruction_set", "torch", "commit"} <= set(line["environment"])
    table = (results / "table.md").read_text()
    assert all(line["goal"]["what"] in table for line in lines.values())
    assert (results / "goals.png").read_bytes().startswith(b"\x89PNG")


def test_a_copy_of_the_official_classes_is_the_other_side(results: Path) -> None:
    lines = lines_of(results)
    for key in ("G1b/llama", "G1b/olmo2", "G3c/forward"):
        assert lines[key]["against"].startswith("official classes"), key
    assert set(lines["G1b/llama"]["compared"]) == set(lines["G1b/olmo2"]["compared"]) == {"logits", "routes"}
    assert "theirs tokens" in lines["G3c/forward"]["compared"]


def test_what_is_measured_already_is_left_alone(scripts: Any, tmp_path: Path) -> None:
    import run

    path, now = tmp_path / "e.json", {"sources": "abc"}
    assert not run.is_current(path, {"G2/512"}, now)
    lines = [{"key": "G2/512", "settings": now}, {"key": "G1/512/bf16", "settings": {"sources": "other"}}]
    scripts.report.write_json(path, {"lines": lines, "skipped": [{"key": "G5/decode", "why": "not installed"}]})
    assert run.is_current(path, {"G2/512"}, now)
    assert not run.is_current(path, {"G2/512", "G1/512/bf16"}, now)  # from other sources
    assert not run.is_current(path, {"G5/decode"}, now)  # skipped


def test_a_difference_ends_the_measurement(scripts: Any) -> None:
    compare, error = scripts.outputs.compare, scripts.outputs.MismatchError
    good = {"logits": torch.ones(3, 4), "routes": torch.zeros(2, 3, dtype=torch.long)}
    assert compare("same", good, good, torch.float32) == {"logits": 0.0, "routes": 0.0}
    with pytest.raises(error, match=r"logits differs by 0\.01"):
        compare("off", {"logits": good["logits"] * 1.01}, good, torch.float32)
    with pytest.raises(error, match="routes differs"):
        compare("off", {"routes": good["routes"] + 1}, good, torch.bfloat16)
    with pytest.raises(error, match="shape"):
        compare("off", {"logits": torch.ones(3, 5)}, good, torch.float32)
    with pytest.raises(error, match="no output in common"):
        compare("off", {"tokens": good["routes"]}, good, torch.float32)


def test_rounds_alternate_and_ratios_are_per_round(scripts: Any) -> None:
    calls: list[str] = []
    times = {"a": iter([9.0, 1.0, 2.0, 6.0]), "b": iter([9.0, 2.0, 1.0, 2.0])}

    def side(name: str) -> float:
        calls.append(name)
        return next(times[name])

    taken = scripts.paired.rounds({"a": lambda: side("a"), "b": lambda: side("b")}, 3)
    assert calls == ["a", "b"] * 4  # once to warm up
    ratio = taken.ratio("a", "b")
    assert (ratio.median, ratio.low, ratio.high, ratio.of_minima) == (2.0, 0.5, 3.0, 1.0)


def test_every_goal_is_measured_by_one_experiment(scripts: Any) -> None:
    import run

    keys = [key for experiment in run.EXPERIMENTS for key in experiment.goals]
    assert sorted(keys) == sorted(goal.key for goal in scripts.goals.GOALS)


@pytest.mark.parametrize(
    "key, value, reached",
    [
        ("G3b/forward", 5.0, "target"),
        ("G3b/forward", 4.9, "floor"),
        ("G3b/forward", 2.9, "missed"),
        ("G2/512", 0.75, "target"),
        ("G2/512", 0.9, "floor"),
        ("G2/512", 1.0, "missed"),
        ("G2/64", 1.0, ""),
    ],
)
def test_floor_and_target_know_their_direction(scripts: Any, key: str, value: float, reached: str) -> None:
    assert scripts.goals.BY_KEY[key].reached(value) == reached


def test_what_actions_cost_is_measured(scripts: Any) -> None:
    import interventions
    from shapes import SMOLLM2_135M, small

    ratios = interventions.measured(small(SMOLLM2_135M), tokens=4, count=1)
    assert set(ratios) == {f"{side}, {name}" for side in ("model", "engine") for name in interventions.BLOCKS}


def test_the_check_of_a_device_takes_the_copy_as_well(copy: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--device", "cpu", "--quick", "--official", str(copy)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rows", "decode,training,step"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("G3 ", "G9a", "G9b", "G9c"))]
    assert len(lines) == 3 + 2 + 1 + 1
    assert all("official classes (r2, transformers" in line for line in lines)


def test_acceptance_counts_what_engine_and_model_have_in_common(scripts: Any) -> None:
    import acceptance

    model = small_model()
    rows = random_ids(2, 6).tolist()
    found = {"float32": acceptance.same_answers(model, rows, 5)}
    sequences = found["float32"].pop("sequences")
    for numerics in acceptance.NUMERICS:
        found[f"bfloat16 {numerics}"] = acceptance.same_logits(model.bfloat16(), sequences, numerics)
    assert found["float32"]["tokens"] == 10 and acceptance.holds(found)
    spoilt = {**found, "float32": {**found["float32"], "equal_tokens": 9}}
    assert not acceptance.holds(spoilt)
    parts = found["bfloat16 reference"]
    assert not acceptance.holds({**found, "bfloat16 reference": {**parts, "equal_bits": parts["logits"] - 1}})
