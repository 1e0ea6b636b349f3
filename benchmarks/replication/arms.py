"""Each arm as a recipe of micro.training, and the run from recipe to numbers."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replication import data, measure
from benchmarks.replication.data import Items
from benchmarks.replication.plan import Arm, Job, Setup, Size
from micro.errors import RunError
from micro.progress import Progress
from micro.training import Recipe, Source, Stage, run
from micro.training.backbone import quiet_transformers
from micro.training.plan import Plan

INDUCE, CALIBRATE, FINISH, JOINT = "induce", "calibrate", "finish", "joint"
FRESH_ROUTER_SEED = 77_000


@dataclass(frozen=True)
class Places:
    """Folders of a replication. work: what can be made again; results: what is committed."""

    work: Path
    results: Path

    def run(self, name: str) -> Path:
        """Training folder of a run."""
        return self.work / "runs" / name

    def stage_2(self, name: str) -> Path:
        """Model of a run after stage 2, kept for the branch that starts from it."""
        return self.work / "stage-2" / name

    def result(self, name: str) -> Path:
        """The run's committed file."""
        return self.results / "runs" / f"{name}.json"


def recipe(job: Job, backbone: str, records: Path, chats: Path) -> Recipe:
    """What ``micro.training.run`` does for this run. All arms of a seed share backbone, rows, rates and router seed."""
    setup, arm = job.setup, job.arm
    # The order of a stage's rows depends on (seed + stage index): a branch visits them as stage 3 of its source does.
    shift = 2 if arm.curriculum == "branch" else 0
    return Recipe(
        backbone=backbone,
        name=job.name,
        kind=arm.kind,
        stages=_stages(setup, arm, str(records), str(chats)),
        batch_size=setup.rows,
        micro_batch_size=setup.rows,
        max_length=setup.max_length,
        precision=setup.precision,
        warmup=setup.warmup,
        weight_decay=setup.weight_decay,
        freeze=setup.freeze,
        seed=job.seed + shift,
        save_every=None,
        keep_stage_models=setup.route_items > 0,
    )


def _stages(setup: Setup, arm: Arm, records: str, chats: str) -> list[Stage]:
    finish = Stage(name=FINISH, data=chats, **_length(setup.finish))
    if arm.curriculum == "branch":
        return [finish]
    if arm.curriculum == "joint":
        rows: list[str | Source] = [Source(path=records, repeat=2), Source(path=chats)]
        losses = arm.losses or None
        return [Stage(name=JOINT, data=rows, epochs=1, learning_rate=setup.induce.learning_rate, losses=losses)]
    induce = Stage(
        name=INDUCE,
        data=records,
        route_by="labels",
        trainable="experts",
        experts_per_token=2,
        random_labels=arm.random_labels,
        **_length(setup.induce),
    )
    calibrate = Stage(
        name=CALIBRATE, data=records, trainable="routers", experts_per_token=2, **_length(setup.calibrate)
    )
    return [induce, calibrate, finish]


def _length(size: Size) -> dict[str, Any]:
    return {"epochs": size.epochs, "max_steps": size.steps, "learning_rate": size.learning_rate}


def backbone_of(job: Job, places: Places) -> str:
    """The folder or name that a run starts from. Errors: ValueError where a branch's source has not run yet."""
    if job.source is not None:
        folder = places.stage_2(job.source)
        if not folder.is_dir():
            raise ValueError(f"{job.name} starts from stage 2 of {job.source}, which is not there; run that one first")
        return str(_with_weight_rule(folder, str(job.arm.weight_rule), places.work / "branches" / job.name))
    setup = job.setup
    return setup.backbone if isinstance(setup.backbone, str) else str(places.work / f"backbone-{setup.name}")


def _with_weight_rule(source: Path, rule: str, folder: Path) -> Path:
    """A copy of a model folder with another weight rule in its configuration."""
    if not folder.is_dir():
        shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["weight_rule"] = rule
    path.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def execute(job: Job, places: Places, plan_digest: str, *, most_tokens: int) -> dict[str, Any]:
    """Train and measure one run; returns what is committed. Ctrl-C saves the place and raises KeyboardInterrupt.

    Raises:
        RunError: it would visit more than `most_tokens`.
    """
    setup = job.setup
    records, chats = data.write_training_data(setup, job.seed, places.work / "data" / f"{setup.name}-s{job.seed}")
    folder = places.run(job.name)
    origin = backbone_of(job, places)
    wanted = recipe(job, origin, records, chats)
    planned = run(wanted, output_dir=folder, dry_run=True, quiet=True)
    _check_tokens(job, planned.plan, most_tokens)
    tokenizer = planned.tokenizer
    held_out = Items.of(
        data.held_out_records(setup), tokenizer, max_length=4 * setup.max_length, max_tokens=setup.eval_tokens
    )
    kept = measure.kept_items(held_out, setup.route_items)
    recorder = measure.RouteRecorder(FINISH, held_out, kept, places.work / "routes" / job.name)
    staged = job.arm.curriculum != "joint"
    callbacks = [recorder.callback()] if kept and staged else []
    with Progress(f"{job.name} training", unit="steps") as bar:
        shown = [*callbacks, _bar_callback(bar)]
        trained = run(wanted, output_dir=folder, resume=folder.exists(), callbacks=shown, quiet=True)
    if trained.status != "done":
        raise KeyboardInterrupt
    begin = time.monotonic()
    matching = Items.of(
        data.training_records(setup, job.seed)[: setup.matching_records],
        tokenizer,
        max_length=4 * setup.max_length,
        max_tokens=setup.eval_tokens,
    )
    whole_blocks = job.arm.kind == "block"
    numbers = measure.measure(
        trained.model, trained.tokenizer, held_out, matching, localizers=setup.localizers and whole_blocks
    )
    if callbacks:
        numbers["routes"] = _stability(job, origin, folder, held_out, kept, recorder)
    seconds = {**_seconds(folder), "evaluation": round(time.monotonic() - begin, 2)}
    _keep_stage_2(job, folder, places)
    return {
        "format": 1,
        "plan": plan_digest,
        "name": job.name,
        "setup": setup.name,
        "arm": job.arm.name,
        "seed": job.seed,
        "experts": list(data.NAMES) if job.arm.kind != "dense" else [],
        "tokens": {stage.name: stage.tokens for stage in trained.plan.stages},
        "steps": {stage.name: stage.steps for stage in trained.plan.stages},
        "parameters": trained.plan.parameters_total,
        "seconds": seconds,
        "training": _training_summary(folder),
        "bag_of_words": round(data.bag_of_words(setup, job.seed), 4),
        "versions": _versions(folder),
        **numbers,
    }


def _bar_callback(bar: Progress) -> Any:
    """The training's place: stage and step; ``run`` itself is silent, so that 27 runs can be read."""
    from transformers import TrainerCallback

    class Show(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stage = Path(str(args.output_dir)).name
            bar.update(int(state.global_step), total=int(state.max_steps), note=f"stage {stage}")

    return Show()


def clean(job: Job, places: Places, *, branches: bool) -> None:
    """Remove what a finished run leaves in `work`; its stage-2 model stays while a branch still needs it."""
    for folder in (places.run(job.name), places.work / "branches" / job.name, places.work / "routes" / job.name):
        shutil.rmtree(folder, ignore_errors=True)
    if not branches:
        shutil.rmtree(places.stage_2(job.name), ignore_errors=True)
    if job.source is not None:
        shutil.rmtree(places.stage_2(job.source), ignore_errors=True)


def _stability(
    job: Job, origin: str, folder: Path, held_out: Items, kept: list[int], recorder: measure.RouteRecorder
) -> dict[str, Any]:
    """Routes at the end of stage 2, through stage 3, and with routers drawn anew at the end of stage 2."""
    import micro

    stage_2 = Path(origin) if job.source else folder / f"2-{CALIBRATE}" / "model"
    with quiet_transformers():
        model = micro.load(stage_2).train(False)
    snapshots = {"stage 2": measure.token_routes(model, held_out, kept), **recorder.recorded()}
    snapshots["fresh router"] = measure.fresh_router_routes(model, held_out, kept, FRESH_ROUTER_SEED + job.seed)
    counts = held_out.counts()
    return {"items": kept, "tokens": [int(counts[item]) for item in kept], "snapshots": snapshots}


def _keep_stage_2(job: Job, folder: Path, places: Places) -> None:
    needed = any(arm.source == job.arm.name and job.seed < arm.seeds for arm in job.setup.arms)
    model = folder / f"2-{CALIBRATE}" / "model"
    if needed and model.is_dir():
        kept = places.stage_2(job.name)
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(model, kept)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.strip()]


def _seconds(folder: Path) -> dict[str, float]:
    """Training time of each stage, over all sessions, from the log of its steps."""
    found: dict[str, float] = {}
    for record in _metrics(folder):
        if record.get("tokens_per_second"):
            found[record["stage"]] = found.get(record["stage"], 0.0) + record["tokens"] / record["tokens_per_second"]
    return {stage: round(seconds, 2) for stage, seconds in found.items()}


def _training_summary(folder: Path) -> dict[str, dict[str, Any]]:
    """First and last losses of each stage (means of up to five steps), and the last label accuracy."""
    found: dict[str, dict[str, Any]] = {}
    records = _metrics(folder)
    for stage in dict.fromkeys(record["stage"] for record in records):
        own = [record for record in records if record["stage"] == stage]
        losses = [record.get("lm_loss", record.get("loss")) for record in own]
        ends = [round(sum(part) / len(part), 4) for part in (losses[:5], losses[-5:])]
        found[stage] = {"first_loss": ends[0], "last_loss": ends[1], "label_accuracy": own[-1].get("label_accuracy")}
    return found


def _versions(folder: Path) -> dict[str, Any]:
    """What could change a number; without paths."""
    found = json.loads((folder / "run.json").read_text())["versions"]
    return {name: found.get(name) for name in ("python", "micro-reasoners", "torch", "transformers", "commit")}


def _check_tokens(job: Job, plan: Plan, limit: int) -> None:
    total = sum(stage.tokens for stage in plan.stages)
    if total > limit:
        raise RunError(f"{job.name} would visit {total:,} tokens, the budget is {limit:,}: make the plan smaller")
