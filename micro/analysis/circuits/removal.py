"""Removing components while tasks are scored: zero, mean and resample ablation, and how selective each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from micro import interventions as iv
from micro.analysis.circuits.components import Component, Level, components
from micro.analysis.modes import evaluating
from micro.analysis.result import Result
from micro.analysis.statistics import Array, bootstrap, ratio
from micro.interventions.points import Point
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.analysis.suites import Suite
    from micro.modeling import MiCRoForCausalLM

How = Literal["zero", "mean", "resample"]


@dataclass
class RemovalResult(Result):
    """Change of each task's score when a component is removed, [components][tasks], with paired intervals.

    Change: score with the component removed minus the intact one, in the unit of the task. ``selectivity``: the change
    on a task minus the mean change on the other tasks.
    """

    name: ClassVar[str] = "removal"

    experts: list[str]
    tasks: list[str]
    components: list[dict[str, Any]]
    intact: list[float]
    change: list[list[float]]
    interval: list[list[list[float]]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def selectivity(self) -> list[list[float]]:
        """[components][tasks]; with a single task the change itself."""
        change = np.asarray(self.change)
        others = (change.sum(1, keepdims=True) - change) / max(1, change.shape[1] - 1)
        result: list[list[float]] = (change - (others if change.shape[1] > 1 else 0)).tolist()
        return result

    def table(self) -> pd.DataFrame:
        """One row per component: change, interval and selectivity of each task."""
        import pandas as pd

        frame = pd.DataFrame({"component": [Component(**part).label(self.experts) for part in self.components]})
        for t, task in enumerate(self.tasks):
            frame[task] = [row[t] for row in self.change]
            frame[f"{task} low"] = [row[t][0] for row in self.interval]
            frame[f"{task} high"] = [row[t][1] for row in self.interval]
            frame[f"{task} selectivity"] = [row[t] for row in self.selectivity]
        return frame

    def plot(self) -> Figure:
        from micro.analysis.circuits.figures import removal_figure

        return removal_figure(self)


def removal(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    *,
    point: Point = "heads",
    level: Level = "head",
    how: How = "zero",
    reference: torch.Tensor | None = None,
    only: Sequence[Component] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> RemovalResult:
    """Score tasks with each component removed.

    Args:
        model: a MiCRo model of either kind.
        suites: what is scored, as in :func:`micro.analysis.ablation`.
        point: where.
        level: "layer", "cell" or "head".
        how: "zero"; "mean" puts in the mean of what the point gives on ``reference``; "resample" a random row of it, of
            the same layer and expert.
        reference: token ids int64 [B,S] that mean and resample are taken from.
        only: these components at ``point`` instead of all of the level.
        seed: of the bootstrap and of resampling.
        progress: show a bar on stderr.

    Returns:
        A :class:`RemovalResult`; items are paired (bootstrap over records).

    Raises:
        ValueError: an unknown ``how``, or ``reference`` is missing.

    Source: structured ablation; resample: Chan et al. (2022), causal scrubbing.
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    parts = list(only) if only is not None else components(model.config, point, level)
    if not parts or {part.point for part in parts} != {point}:
        raise ValueError(f"removal: only must hold components at the point {point!r}")
    source = _reference(model, point, how, reference)
    with evaluating(model):
        intact = [suite.score(model, {}) for suite in several]
    result = RemovalResult(
        experts=list(model.config.expert_names or ()),
        tasks=[name for suite in several for name in suite.names],
        components=[asdict(part) for part in parts],
        intact=[float(v) for sums, counts in intact for v in ratio(sums.sum(0), counts.sum(0))],
        change=[],
        interval=[],
        settings={"point": point, "level": level, "how": how, "seed": seed, "interval": "95 % paired bootstrap"},
    )
    for part in track(parts, "removal", unit="components", enabled=progress):
        with evaluating(model), model.intervene(_action(part, how, source, seed)):
            scores = [suite.score(model, {}) for suite in several]
        changes = [_change(before, after, seed) for before, after in zip(intact, scores, strict=True)]
        result.change.append([v for change, _ in changes for v in change])
        result.interval.append([v for _, bounds in changes for v in bounds])
    return result


def _reference(model: MiCRoForCausalLM, point: Point, how: How, ids: torch.Tensor | None) -> Any:
    if how == "zero":
        return None
    if how not in ("mean", "resample"):
        raise ValueError(f'how is {how!r}, expected "zero", "mean" or "resample"')
    if ids is None:
        raise ValueError(f'how="{how}" needs reference: token ids [B,S] of texts to take activations from')
    look = iv.moments(point, name="r") if how == "mean" else iv.read(point, name="r")
    with evaluating(model), model.intervene(look, all_experts=True) as run:
        model.model(ids.to(model.device), use_cache=False)
    return run.moments("r").mean if how == "mean" else run.reading("r")


def _action(part: Component, how: How, source: Any, seed: int) -> iv.Action:
    if how == "zero":
        return iv.zero(part.point, **part.where())
    if how == "mean":
        return iv.replace(part.point, source, **part.where())
    return iv.resample(part.point, source, seed=seed, **part.where())


def _change(
    before: tuple[Array, Array], after: tuple[Array, Array], seed: int
) -> tuple[list[float], list[list[float]]]:
    (sums, counts), (removed, _) = before, after

    def difference(weights: Array) -> Array:
        return ratio(weights @ (removed - sums), weights @ counts)

    low, high = bootstrap(len(sums), difference, seed=seed)
    return difference(np.ones(len(sums))).tolist(), np.stack([low, high], -1).tolist()
