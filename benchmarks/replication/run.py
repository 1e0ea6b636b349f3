"""The whole replication, run by run: what is there is not done again, and Ctrl-C loses nothing but the current step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.replication import arms, backbone, cost, estimates, figures, measure, verdict
from benchmarks.replication.arms import Places
from benchmarks.replication.data import Items, held_out_records
from benchmarks.replication.plan import Job, Plan, Pretraining, Setup, jobs
from benchmarks.replication.verdict import Verdicts
from micro.errors import RunError
from micro.files import write_text
from micro.training.backbone import quiet_transformers

MOST_BYTES = 300_000  # of one committed file
Say = Callable[[str], None]


def claim(plan: Plan, places: Places) -> None:
    """Results of one plan in one folder. Errors: ValueError where the folder holds those of another."""
    path = places.results / "plan.json"
    content = json.dumps({"digest": plan.digest, **asdict(plan)}, indent=1) + "\n"
    if path.is_file() and json.loads(path.read_text())["digest"] != plan.digest:
        raise ValueError(f"{places.results}: holds results of other settings; choose another --results, or remove them")
    places.results.mkdir(parents=True, exist_ok=True)
    write_text(path, content)


def done(plan: Plan, places: Places) -> set[str]:
    """Names of the runs whose file stands."""
    return {job.name for job in jobs(plan) if places.result(job.name).is_file()}


def replicate(
    plan: Plan,
    places: Places,
    *,
    only: Sequence[str] = (),
    over_budget: bool = False,
    probe: bool = True,
    again: bool = False,
    say: Say = print,
) -> list[Verdicts]:
    """Everything: cost, backbone, runs, verdicts, figures.

    Args:
        plan: what to do.
        places: where.
        only: names of runs, or beginnings of names, to do now; the others stay for another time.
        over_budget: go on where the estimate exceeds the budget.
        probe: measure the cost before the start.
        again: measure it anew although a measurement is there.
        say: receives one line per event.

    Raises:
        ValueError: the results folder belongs to another plan.
        RunError: the estimate exceeds the budget.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    torch.set_num_threads(plan.threads)
    claim(plan, places)
    wanted = [job for job in jobs(plan) if not only or any(job.name.startswith(name) for name in only)]
    if not wanted:
        raise ValueError(f"no run is called {', '.join(only)}; `list` shows all")
    left = [job for job in wanted if job.name not in done(plan, places)]
    if probe and left:
        _check_cost(plan, places, over_budget, again, say)
    for setup in plan.setups:
        if isinstance(setup.backbone, Pretraining) and any(job.setup is setup for job in left):
            _pretrain(setup, setup.backbone, places)
    for index, job in enumerate(left, len(wanted) - len(left) + 1):
        say(f"run {index} of {len(wanted)}: {job.name}")
        _run(job, plan, places, say)
    return judge(plan, places, say=say)


def _check_cost(plan: Plan, places: Places, over_budget: bool, again: bool, say: Say) -> None:
    found = cost.estimate(plan, places, again=again)
    for line in found.lines(plan, done(plan, places)):
        say(line)
    problems = found.problems(plan)
    for problem in problems:
        say(f"over budget: {problem}")
    if problems and not over_budget:
        raise RunError(f"the estimate exceeds the budget ({problems[0]}): idle the machine, shrink the plan, or give "
                       "--over-budget")  # fmt: skip


def _pretrain(setup: Setup, settings: Pretraining, places: Places) -> None:
    folder = places.work / f"backbone-{setup.name}"
    if not backbone.ready(folder, settings):
        places.work.mkdir(parents=True, exist_ok=True)
        backbone.train(settings, folder, precision=setup.precision)
    note = json.loads((folder / "pretraining.json").read_text())
    note["held_out_loss"] = _before(setup, folder)
    write_text(places.results / f"backbone-{setup.name}.json", json.dumps(note, indent=1) + "\n")


def _before(setup: Setup, folder: Path) -> dict[str, float]:
    """What the backbone itself makes of the held-out answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=backbone.DTYPES[setup.precision]).train(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    items = Items.of(held_out_records(setup), tokenizer, max_length=4 * setup.max_length, max_tokens=setup.eval_tokens)
    return measure.domain_losses(model, items)


def _run(job: Job, plan: Plan, places: Places, say: Say) -> None:
    result = arms.execute(job, places, plan.digest, most_tokens=plan.budget.training_tokens)
    text = json.dumps(result, separators=(",", ":")) + "\n"
    if len(text) > MOST_BYTES:
        raise RunError(f"{job.name}: its file would hold {len(text):,} bytes, {MOST_BYTES:,} are allowed")
    places.result(job.name).parent.mkdir(parents=True, exist_ok=True)
    write_text(places.result(job.name), text)
    waiting = [other for other in jobs(plan) if other.source == job.name and not places.result(other.name).is_file()]
    arms.clean(job, places, branches=bool(waiting))
    seconds = result["seconds"]
    say(f"{job.name}: {sum(result['tokens'].values()):,} tokens, {sum(seconds.values()):.0f} s, of which "
            f"{seconds['evaluation']:.0f} s evaluation; {len(text) / 1000:.0f} kB")  # fmt: skip
    if seconds["evaluation"] > plan.budget.evaluation_seconds:
        say(f"{job.name}: evaluation took longer than {plan.budget.evaluation_seconds:.0f} s")


def judge(plan: Plan, places: Places, *, say: Say = print) -> list[Verdicts]:
    """Verdicts and figures of all runs that are there; both are written into the results folder."""
    found = []
    there = done(plan, places)
    for setup in plan.setups:
        arm_tables = estimates.read_runs(places.result("x").parent, setup.name)
        if not arm_tables:
            continue
        missing = [job.name for job in jobs(plan) if job.setup is setup and job.name not in there]
        result = verdict.verdicts(
            arm_tables, setup=setup.title, plan=plan.digest, draws=plan.draws, preliminary=missing
        )
        result.save(places.results / setup.name)
        figures.draw(arm_tables, result, places.results / setup.name)
        say(f"\n{result}")
        found.append(result)
    return found


# Plans whose results are committed, and where.
COMMITTED = {"full": "replication", "mild": "replication_mild"}


def default_places(plan: Plan, work: Path | None, results: Path | None) -> Places:
    """build/replication/PLAN for what can be made again, below benchmarks/results for what is committed."""
    root = Path(__file__).resolve().parents[2]
    scratch = work or root / "build" / "replication" / plan.name
    kept = COMMITTED.get(plan.name)
    return Places(scratch, results or (root / "benchmarks" / "results" / kept if kept else scratch / "results"))
