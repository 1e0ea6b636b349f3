"""The replication from backbone to verdicts, on the smallest models; what stands is not done again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replication import __main__ as command
from benchmarks.replication import estimates, measure, run, verdict
from benchmarks.replication.arms import Places
from benchmarks.replication.plan import NANO, PLANS, Plan, Pretraining, Size, jobs
from micro.errors import RunError
from micro.experts import NAMES


@pytest.fixture
def plan() -> Plan:
    setup = NANO.setups[0]
    assert isinstance(setup.backbone, Pretraining)
    kept = [arm for arm in setup.arms if arm.name in ("micro", "straight_through", "dense")]
    return replace(
        NANO,
        name="test",
        threads=1,
        draws=50,
        setups=(
            replace(
                setup,
                backbone=replace(setup.backbone, tokens=512),
                arms=tuple(replace(arm, seeds=1) for arm in kept),
                train_records=6,
                chat_records=4,
                matching_records=4,
                induce=Size(3e-3, steps=2),
                calibrate=Size(1e-2, steps=2),
                finish=Size(1e-3, steps=4),
            ),
        ),
    )


def test_from_backbone_to_verdicts(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(tmp_path / "work", tmp_path / "results")
    lines: list[str] = []
    real = measure.measure

    def interrupted(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.replicate(plan, places, probe=False, say=lines.append)
    assert run.done(plan, places) == set()
    trained = (places.run("own-micro-s0") / "metrics.jsonl").read_text()

    monkeypatch.setattr(measure, "measure", real)
    run.replicate(plan, places, only=["own-micro"], probe=False, say=lines.append)
    first = places.result("own-micro-s0")
    result = json.loads(first.read_text())
    assert result["tokens"].keys() == result["training"].keys() == {"induce", "calibrate", "finish"}
    assert trained.count("\n") == 8  # it was measured, not trained again
    assert not places.run("own-micro-s0").exists()
    assert places.stage_2("own-micro-s0").is_dir()  # the branch still needs it
    assert list(result["routes"]["snapshots"]) == ["stage 2", "25 %", "50 %", "75 %", "100 %", "fresh router"]
    assert set(result["loss"]) == set(measure.conditions(("logic", "social", "world", "language")))
    stamp = first.stat().st_mtime_ns

    (found,) = run.replicate(plan, places, probe=False, say=lines.append)
    assert first.stat().st_mtime_ns == stamp
    assert run.done(plan, places) == {"own-micro-s0", "own-straight_through-s0", "own-dense-s0"}
    assert not places.stage_2("own-micro-s0").exists()
    assert found.preliminary == []
    assert {c.claim for c in found.claims if c.parts} == {"steering"} | {"stability"}
    branch = json.loads(places.result("own-straight_through-s0").read_text())
    assert list(branch["tokens"]) == ["finish"]
    assert branch["routes"]["snapshots"]["stage 2"] == result["routes"]["snapshots"]["stage 2"]
    dense = json.loads(places.result("own-dense-s0").read_text())
    assert list(dense["loss"]) == ["none"] and "routed" not in dense
    for path in places.result("x").parent.glob("*.json"):
        assert path.stat().st_size < run.MOST_BYTES
        assert str(tmp_path) not in path.read_text()
    assert (places.results / "own" / "claims.png").is_file()
    backbone = json.loads((places.results / "backbone-own.json").read_text())
    assert backbone["parameters"] > 10_000 and backbone["corpus"]

    with pytest.raises(ValueError, match="results of other settings"):
        run.claim(replace(plan, draws=51), places)
    with pytest.raises(ValueError, match="no run is called own-moe"):
        run.replicate(plan, places, only=["own-moe"], probe=False)


def test_over_budget_is_refused(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.replication import cost

    speeds = {"pretraining": 100.0, "tokens": {}, "training": {}}
    for key, stages in (("block staged", ("induce", "calibrate", "finish")), ("dense joint", ("joint",))):
        speeds["tokens"][key] = dict.fromkeys(stages, 50_000)
        speeds["training"][key] = dict.fromkeys(stages, 100.0)
    speeds["evaluation"] = {"tokens_per_second": 1000.0, "held_out_tokens": 2000.0, "localizers": 0.0}
    monkeypatch.setattr(cost, "measured", lambda *args, **kwargs: {"setups": {"own": speeds}})
    found = cost.estimate(plan, Places(tmp_path, tmp_path))
    # Three stages and one, 50,000 tokens at 100 tokens/s each; the branch repeats the last stage.
    assert [(c.name, c.training) for c in found.runs] == [
        ("own-micro-s0", 1500.0),
        ("own-straight_through-s0", 500.0),
        ("own-dense-s0", 500.0),
    ]
    assert found.problems(plan) == []
    small = replace(plan, budget=replace(plan.budget, minutes=10, training_tokens=120_000, evaluation_seconds=4))
    assert len(found.problems(small)) == 1 + 2 + 1  # micro's tokens, two evaluations, all of it
    lines: list[str] = []
    with pytest.raises(RunError, match="exceeds the budget"):
        run.replicate(small, Places(tmp_path / "w", tmp_path / "r"), say=lines.append)
    assert any(line.startswith("in all 3 runs") for line in lines)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--work", str(tmp_path / "w"), "--results", str(tmp_path / "r")]
    assert command.main(["list", "--plan", "nano", *folders]) == 0
    assert "own-straight_through-s0" in capsys.readouterr().out
    assert command.main(["verdict", "--plan", "nano", *folders]) == 2
    assert "no run is there yet" in capsys.readouterr().err
    assert command.main(["rules"]) == 0
    assert capsys.readouterr().out.startswith("# Verdict rules")


@pytest.mark.parametrize("name", run.COMMITTED)
def test_what_is_committed_is_whole_and_of_its_plan(name: str) -> None:
    plan = PLANS[name]
    places = run.default_places(plan, None, None)
    assert run.done(plan, places) == {job.name for job in jobs(plan)}
    digests = {json.loads(places.result(job.name).read_text())["plan"] for job in jobs(plan)}
    assert digests == {plan.digest, json.loads((places.results / "plan.json").read_text())["digest"]}
    before = json.loads((places.results / "backbone-own.json").read_text())["held_out_loss"]
    assert set(before) == set(NAMES) and all(0 < loss < 10 for loss in before.values())


@pytest.mark.parametrize("name", run.COMMITTED)
def test_committed_estimates_come_from_the_committed_runs(name: str) -> None:
    plan = PLANS[name]
    places = run.default_places(plan, None, None)
    for setup in plan.setups:
        tables = estimates.read_runs(places.result("x").parent, setup.name)
        again = verdict.verdicts(tables, setup=setup.title, plan=plan.digest, draws=20)
        kept = json.loads((places.results / setup.name / "verdicts.json").read_text())
        values = {part["name"]: part["value"] for claim in kept["claims"] for part in claim["parts"]}
        found = {part.name: part.value for claim in again.claims for part in claim.parts}
        drawn = "no contrary row or column"  # a bound of the bootstrap itself
        assert found.pop(drawn) == pytest.approx(values.pop(drawn), abs=0.02)
        assert found == pytest.approx(values, abs=1e-9)
