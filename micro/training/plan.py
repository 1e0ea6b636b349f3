"""What a run is going to cost, before it starts: parameters per group, steps, tokens, memory, disk."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.training.recipe import Recipe, ResolvedStage, parse_save_every

if TYPE_CHECKING:
    from rich.console import RenderableType

    from micro.training.sources import StageData

GROUPS = ("embedding", "head", "final norm", "routers", "experts", "shared layers")


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    dropped: rows that could not be encoded; tokens: real tokens that are visited, padding apart; targets: those of them
    that are trained on; memory: bytes by part, for the longest micro batch; checkpoint_bytes: one checkpoint with its
    optimizer state; checkpoints: how many of them stand on disk at a time.
    """

    name: str
    trainable: dict[str, int]
    trainable_total: int
    rows: int
    dropped: int
    steps: int
    batch_size: int
    micro_batch_size: int
    tokens: int
    targets: int
    longest: int
    memory: dict[str, int]
    checkpoint_bytes: int
    checkpoints: int


@dataclass(frozen=True)
class Plan:
    """A run before it starts. disk: bytes that its folder needs at most at any time."""

    name: str
    parameters: dict[str, int]
    parameters_total: int
    precision: str
    processes: int
    stages: list[StagePlan]
    disk: int

    def to_dict(self) -> dict[str, Any]:
        """For --json and run.json."""
        return asdict(self)

    def tables(self) -> list[RenderableType]:
        """Two rich tables: what trains, and what it costs."""
        return [self._groups(), self._stages()]

    def _groups(self) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"{self.name}: trainable parameters")
        table.add_column("group")
        table.add_column("parameters", justify="right")
        for stage in self.stages:
            table.add_column(stage.name, justify="right")
        for group, count in self.parameters.items():
            table.add_row(
                group, f"{count:,}", *(_trained(stage.trainable.get(group, 0), count) for stage in self.stages)
            )
        table.add_section()
        table.add_row("all", f"{self.parameters_total:,}", *(f"{stage.trainable_total:,}" for stage in self.stages))
        return table

    def _stages(self) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"cost ({self.precision}, {self.processes} process{'es' if self.processes > 1 else ''})")
        table.add_column("")
        for stage in self.stages:
            table.add_column(stage.name, justify="right")
        for title, text in _COST_ROWS:
            table.add_row(title, *(text(stage) for stage in self.stages))
        table.caption = f"disk needed: {size(self.disk)}"
        return table


_COST_ROWS: list[tuple[str, Callable[[StagePlan], str]]] = [
    ("rows", lambda stage: f"{stage.rows:,}"),
    ("rows dropped", lambda stage: f"{stage.dropped:,}"),
    ("longest row", lambda stage: f"{stage.longest:,}"),
    ("steps", lambda stage: f"{stage.steps:,}"),
    ("rows per step", lambda stage: f"{stage.batch_size:,}"),
    ("rows at a time", lambda stage: f"{stage.micro_batch_size:,}"),
    ("tokens", lambda stage: f"{stage.tokens:,}"),
    ("trained on", lambda stage: f"{stage.targets:,}"),
    *(
        (f"memory: {part}", lambda stage, part=part: size(stage.memory[part]))
        for part in ("weights", "gradients", "optimizer", "activations", "process", "total")
    ),
    ("checkpoints kept", lambda stage: f"{stage.checkpoints} x {size(stage.checkpoint_bytes)}"),
]


def make_plan(
    recipe: Recipe,
    model: Any,
    stages: list[ResolvedStage],
    data: list[StageData],
    trains: Sequence[Callable[[str], bool]],
    processes: int,
) -> Plan:
    """The plan of a run. trains[i](name): whether stage i trains a parameter.

    Errors: ValueError for a stage that trains nothing, and for batch sizes that the processes cannot share.
    """
    groups: dict[str, int] = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        groups[group_of(name)] += parameter.numel()
    plans = [
        _stage_plan(recipe, model, stage, rows, trained, processes)
        for stage, rows, trained in zip(stages, data, trains, strict=True)
    ]
    weights = _weight_bytes(model)
    models = len(stages) if recipe.keep_stage_models else min(2, len(stages))
    kept = [p.checkpoint_bytes * p.checkpoints for p in plans]
    if recipe.keep_stage_checkpoints:
        saved = sum(kept)
    else:
        saved = max(kept)
    # One checkpoint more than is kept stands on disk while it is written.
    saved += max(p.checkpoint_bytes if p.checkpoints else 0 for p in plans)
    return Plan(
        name=recipe.name or "run",
        parameters={name: count for name, count in groups.items() if count},
        parameters_total=sum(groups.values()),
        precision=recipe.precision,
        processes=processes,
        stages=plans,
        disk=models * weights + saved,
    )


def _stage_plan(
    recipe: Recipe, model: Any, stage: ResolvedStage, data: StageData, trains: Callable[[str], bool], processes: int
) -> StagePlan:
    if stage.batch_size % (stage.micro_batch_size * processes):
        raise ValueError(
            f"stage {stage.name!r}: batch_size {stage.batch_size} is no multiple of micro_batch_size "
            f"{stage.micro_batch_size} times {processes} processes"
        )
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if trains(name):
            trained[group_of(name)] = trained.get(group_of(name), 0) + parameter.numel()
    total = sum(trained.values())
    if not total:
        raise ValueError(f"stage {stage.name!r} trains nothing: trainable: {stage.trainable} matches no parameter")
    rows, steps = len(data.rows), count_steps(stage, len(data.rows))
    epochs, rest = divmod(steps, math.ceil(rows / stage.batch_size))  # an epoch's last step may hold fewer rows
    visits = epochs + min(1.0, rest * stage.batch_size / rows)
    longest = int(data.rows.lengths.max())
    memory = _memory(recipe, model, stage, total, longest)
    return StagePlan(
        name=stage.name,
        trainable=trained,
        trainable_total=total,
        rows=rows,
        dropped=data.dropped,
        steps=steps,
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        tokens=round(data.rows.tokens * visits),
        targets=round(data.rows.targets * visits),
        longest=longest,
        memory=memory,
        checkpoint_bytes=memory["weights"] + memory["optimizer"],
        checkpoints=_checkpoints(recipe, stage, steps),
    )


def _memory(recipe: Recipe, model: Any, stage: ResolvedStage, trained: int, longest: int) -> dict[str, int]:
    """Bytes of one training step by part (performance.md 4.4); "process": Python, libraries, rows, as they are now."""
    from micro import estimate

    shape = estimate.shape_of(model)
    if shape.kind != "dense":
        # Labels choose one expert: the second one's weight is 0, and it is not computed.
        shape = replace(shape, K=1 if stage.route_by == "labels" else stage.experts_per_token)
    narrow = recipe.precision == "bfloat16"
    width = 2 if narrow else 4
    tokens = stage.micro_batch_size * longest
    parts = {
        "weights": _weight_bytes(model),
        "gradients": trained * width,
        "optimizer": trained * (12 if narrow else 8),
        "activations": estimate.activation_bytes(
            shape, tokens, "float32" if width == 4 else "bfloat16", checkpointing=recipe.gradient_checkpointing
        ),
    }
    parts["process"] = max(0, resident_bytes() - parts["weights"])
    return {**parts, "total": sum(parts.values())}


def resident_bytes() -> int:
    """Memory that this process holds now, its libraries included; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def _weight_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _checkpoints(recipe: Recipe, stage: ResolvedStage, steps: int) -> int:
    """How many checkpoints of a stage stand on disk at a time; none is written at the last step."""
    every = parse_save_every(recipe.save_every)
    if every is None:
        return 0
    kind, amount = every
    if kind == "seconds":
        return recipe.keep_last
    if kind == "epoch":
        made = (stage.epochs or 1) - 1
    else:
        made = (steps - 1) // int(amount if kind == "steps" else max(1, math.ceil(amount * steps)))
    return min(made, recipe.keep_last)


def count_steps(stage: ResolvedStage, rows: int) -> int:
    """Optimizer steps of a stage; an incomplete last window of an epoch is a step too (model.md 6.3)."""
    return stage.max_steps or (stage.epochs or 1) * math.ceil(rows / stage.batch_size)


def check_disk(plan: Plan, folder: Path) -> None:
    """Refuse a run whose folder will not fit. Errors: ValueError with both numbers."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if plan.disk > free:
        raise ValueError(
            f"{folder}: the run needs {size(plan.disk)} on disk and {size(free)} are free: save less often "
            "(save_every), keep fewer checkpoints (keep_last), or set keep_stage_models=false"
        )


def group_of(name: str) -> str:
    """The group of a parameter, by its in-memory name."""
    if ".router." in name:
        return "routers"
    if ".blocks." in name:
        return "experts"
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    return "shared layers" if ".layers." in f".{name}" else "final norm"


def _trained(count: int, total: int) -> str:
    return "frozen" if not count else "trains" if count == total else f"{count:,}"


def size(count: int) -> str:
    """Bytes for people: 1.9 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
