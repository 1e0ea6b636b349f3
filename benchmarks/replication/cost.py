"""What the replication is going to cost here: speeds measured on a few steps of every kind of run."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.replication import arms, backbone, data, measure
from benchmarks.replication.arms import Places
from benchmarks.replication.data import Items
from benchmarks.replication.plan import Arm, Job, Plan, Pretraining, Setup, Size, jobs
from micro.files import write_text
from micro.progress import Progress
from micro.training import run

START_SECONDS = 4.0  # loading, encoding and writing of a run, beside what is measured


@dataclass
class Cost:
    """Seconds and tokens of one run. note: what was measured for it."""

    name: str
    tokens: int
    training: float
    evaluation: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.training + self.evaluation + START_SECONDS


@dataclass
class Estimate:
    """Of a whole replication: pretraining by setup, and every run."""

    pretraining: dict[str, float]
    runs: list[Cost]

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.pretraining.values()) + sum(cost.seconds for cost in self.runs)

    def lines(self, plan: Plan, done: set[str]) -> list[str]:
        """What will be done and what it costs, one line per arm."""
        left = [cost for cost in self.runs if cost.name not in done]
        found = [f"pretraining of {name}: {seconds / 60:.1f} min" for name, seconds in self.pretraining.items()]
        groups: dict[str, list[Cost]] = {}
        for cost in self.runs:
            groups.setdefault(cost.name.rsplit("-s", 1)[0], []).append(cost)
        for name, costs in groups.items():
            tokens, seconds = max(c.tokens for c in costs), sum(c.seconds for c in costs)
            found.append(
                f"{name:24} {len(costs)} runs of {tokens:>8,} tokens, {costs[0].training:4.0f} s training and "
                f"{costs[0].evaluation:3.0f} s evaluation each: {seconds / 60:5.1f} min"
            )
        budget = plan.budget
        found.append(
            f"in all {len(self.runs)} runs, {self.seconds / 60:.0f} min of {budget.minutes:.0f} allowed; "
            f"{len(left)} runs, {sum(c.seconds for c in left) / 60:.0f} min are still to be done"
        )
        return found

    def problems(self, plan: Plan) -> list[str]:
        """Where the budget does not hold."""
        budget = plan.budget
        found = [f"{c.name} visits {c.tokens:,} tokens" for c in self.runs if c.tokens > budget.training_tokens]
        found += [
            f"{c.name} needs {c.evaluation:.0f} s of evaluation"
            for c in self.runs
            if c.evaluation > budget.evaluation_seconds
        ]
        if self.seconds > 60 * budget.minutes:
            found.append(f"all of it needs {self.seconds / 60:.0f} min")
        return found


def measured(plan: Plan, places: Places, *, again: bool = False) -> dict[str, Any]:
    """Speeds on this machine, kept in `work` for this plan: tokens per second by setup, arm's kind and stage."""
    path = places.work / "probe.json"
    if path.is_file() and not again:
        held: dict[str, Any] = json.loads(path.read_text())
        if held["plan"] == plan.digest:
            return held
    found: dict[str, Any] = {"plan": plan.digest, "setups": {}}
    for setup in plan.setups:
        found["setups"][setup.name] = _probe_setup(setup, places)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def _key(arm: Arm) -> str:
    """Arms of one key cost the same per token."""
    return f"{arm.kind} {'joint' if arm.curriculum == 'joint' else 'staged'}"


def _probe_setup(setup: Setup, places: Places) -> dict[str, Any]:
    folder = places.work / "probe" / setup.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found: dict[str, Any] = {"training": {}, "tokens": {}}
    start = setup.backbone
    if isinstance(start, Pretraining):
        found["pretraining"] = backbone.speed(start, folder / "backbone", precision=setup.precision)
        start = str(folder / "backbone")
    shapes = {_key(arm): arm for arm in reversed(setup.arms) if arm.source is None}
    model = tokenizer = None
    with Progress(f"measuring speed, {setup.name}", len(shapes) + 1, unit="kinds of run") as bar:
        for key, arm in shapes.items():
            speeds, tokens, trained = _probe_arm(setup, arm, start, folder)
            found["training"][key], found["tokens"][key] = speeds, tokens
            if arm.kind != "dense":
                model, tokenizer = trained.model, trained.tokenizer
            bar.advance()
        found["evaluation"] = _probe_evaluation(setup, model, tokenizer)
        bar.advance()
    shutil.rmtree(folder)
    return found


def _probe_arm(setup: Setup, arm: Arm, start: str, folder: Path) -> tuple[dict[str, float], dict[str, int], Any]:
    """(tokens per second by stage, planned tokens by stage, the run): the real recipe, cut to a few steps."""
    job = Job(setup, arm, 0)
    records, chats = data.write_training_data(setup, 0, folder / "data")
    planned = run(arms.recipe(job, start, records, chats), output_dir=folder / "none", dry_run=True, quiet=True).plan
    short = arms.recipe(Job(_shortened(setup), arm, 0), start, records, chats)
    short = replace(short, stages=[replace(s, epochs=None, max_steps=setup.probe_steps) for s in short.stages])
    trained = run(short, output_dir=folder / arm.name, quiet=True)
    lines = [json.loads(line) for line in (folder / arm.name / "metrics.jsonl").read_text().splitlines()]
    speeds = {}
    for stage in short.stages:
        own = [line["tokens_per_second"] for line in lines if line["stage"] == stage.name]
        speeds[stage.name] = statistics.median(own[1:])
    return speeds, {stage.name: stage.tokens for stage in planned.stages}, trained


def _shortened(setup: Setup) -> Setup:
    cut = {
        name: Size(getattr(setup, name).learning_rate, steps=setup.probe_steps)
        for name in ("induce", "calibrate", "finish")
    }
    return replace(setup, route_items=0, **cut)


def _probe_evaluation(setup: Setup, model: Any, tokenizer: Any) -> dict[str, float]:
    """Seconds of one pass over the held-out items and of the localizers."""
    model.train(False)
    records = data.held_out_records(setup)
    items = Items.of(records, tokenizer, max_length=4 * setup.max_length, max_tokens=setup.eval_tokens)
    some = replace(items, batches=items.batches[:: max(1, len(items.batches) // 2)])
    size = sum(int(batch["attention_mask"].sum()) for batch in some.batches)
    measure.item_losses(model, some, {})
    begin = time.monotonic()
    measure.item_losses(model, some, {"ablate": ["logic"]})
    speed = size / (time.monotonic() - begin)
    total = sum(int(batch["attention_mask"].sum()) for batch in items.batches)
    found = {"tokens_per_second": speed, "held_out_tokens": float(total), "localizers": 0.0}
    if setup.localizers and model.config.is_block:
        begin = time.monotonic()
        measure.localizer_shares(model, tokenizer)
        found["localizers"] = time.monotonic() - begin
    return found


def estimate(plan: Plan, places: Places, *, again: bool = False) -> Estimate:
    """The cost of everything, from a probe on this machine."""
    speeds = measured(plan, places, again=again)["setups"]
    pretraining = {
        setup.name: setup.backbone.tokens / speeds[setup.name]["pretraining"]
        for setup in plan.setups
        if isinstance(setup.backbone, Pretraining)
    }
    return Estimate(pretraining, [_cost(job, speeds[job.setup.name]) for job in jobs(plan)])


def _cost(job: Job, found: dict[str, Any]) -> Cost:
    key = _key(job.arm)
    tokens, speeds = dict(found["tokens"][key]), found["training"][key]
    if job.arm.curriculum == "branch":
        tokens = {arms.FINISH: tokens[arms.FINISH]}
    training = sum(count / speeds[stage] for stage, count in tokens.items())
    held_out = found["evaluation"]
    passes = 1 if job.arm.kind == "dense" else len(measure.conditions(data.NAMES)) + 1
    share = job.setup.route_items * 40 / 500  # of the held-out answers, for each of up to six snapshots
    passes += 6 * min(1.0, 3 * share) if job.arm.curriculum != "joint" and job.setup.route_items else 0
    matching = 0 if job.arm.kind == "dense" else job.setup.matching_records / job.setup.test_records
    evaluation = (passes + matching) * held_out["held_out_tokens"] / held_out["tokens_per_second"]
    if job.arm.kind == "block":
        evaluation += held_out["localizers"]
    return Cost(job.name, sum(tokens.values()), training, evaluation)
