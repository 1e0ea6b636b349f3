"""What every expert is worth to a task: exact Shapley values over all sets of kept experts, and interactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.ablations.scores import INTACT, Condition, Scores, ScoreStore, expert_names, row_names, score
from micro.analysis.ablations.shapley import MOST_PLAYERS, interactions, members, shapley_values
from micro.analysis.ablations.statistics import DRAWS, drawn_means, resampled
from micro.analysis.result import Result
from micro.analysis.statistics import Array, interval
from micro.analysis.suites import SHARE, Suite
from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM

CHUNK = 512  # bootstrap draws whose coalition tables are held at once


@dataclass
class ShapleyReport(Result):
    """Shapley value of each expert per row, pairwise interactions, and the worth of every coalition.

    Worth is the score, its sign turned where lower is better, in nats or points. ``worth[row][m]``: of the experts that
    are the bits of m, ``worth[row][0]`` of nobody, by convention. That convention gives every expert the same share, a
    large one for losses: compare experts by their distance from the mean.
    """

    name: ClassVar[str] = "shapley"

    experts: list[str]
    rows: list[str]
    values: list[list[float]]  # [rows][E]
    interval: list[list[list[float]]]  # [rows][E][2]
    distance_interval: list[list[list[float]]]  # [rows][E][2], of the value less the mean of all experts
    interactions: list[list[list[float]]]  # [rows][E][E]
    interaction_interval: list[list[list[list[float]]]]  # [rows][E][E][2]
    worth: list[list[float]]  # [rows][2**E]
    units: list[str]
    records: int
    items: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per row and expert: value; its distance from the mean of the experts, which no convention moves;
        what removing it alone costs (``alone``). Intervals: low, high; distance_low, distance_high.
        """
        import pandas as pd

        everybody = len(self.worth[0]) - 1 if self.worth else 0
        lines = [
            {
                "task": row, "expert": expert, "unit": self.units[r], "value": self.values[r][e],
                "low": self.interval[r][e][0], "high": self.interval[r][e][1],
                "distance": self.values[r][e] - sum(self.values[r]) / len(self.experts),
                "distance_low": self.distance_interval[r][e][0], "distance_high": self.distance_interval[r][e][1],
                "alone": self.worth[r][everybody] - self.worth[r][everybody & ~(1 << e)],
            }
            for r, row in enumerate(self.rows)
            for e, expert in enumerate(self.experts)
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def interaction_table(self) -> pd.DataFrame:
        """One line per row and pair of experts: interaction (above 0: worth more together), low, high."""
        import pandas as pd

        lines = [
            {
                "task": row, "first": self.experts[i], "second": self.experts[j], "unit": self.units[r],
                "interaction": self.interactions[r][i][j], "low": self.interaction_interval[r][i][j][0],
                "high": self.interaction_interval[r][i][j][1],
            }
            for r, row in enumerate(self.rows)
            for i in range(len(self.experts))
            for j in range(i + 1, len(self.experts))
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def save(self, folder: str | Path) -> None:
        """Write shapley.json, shapley.csv and shapley_interactions.csv."""
        super().save(folder)
        write_text(Path(folder) / f"{self.name}_interactions.csv", self.interaction_table().to_csv(index=False))

    def plot(self) -> Figure:
        """Values with intervals, one panel per row."""
        from micro.analysis.ablations.figures import shapley_figure

        return shapley_figure(self)


def expert_shapley(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    *,
    controls: Mapping[str, Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> ShapleyReport:
    """Exact Shapley values of the experts from the scores of all ``2**E - 1`` non-empty sets of kept experts.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several tasks.
        controls: other steering arguments, the same for every set.
        draws: of the bootstrap over records, or over groups of them where a suite has ``groups``.
        seed: of the bootstrap.
        store: where scores are kept; those of :func:`~micro.analysis.ablation` with ``sets="all"`` are these.
        progress: show a bar on stderr.

    Returns:
        A :class:`ShapleyReport`. The worth of no expert is the suite's chance: ln V for losses, so -ln V. It moves all
        values by the same amount (its E-th part), and all interactions; differences between experts do not depend on
        it.

    Raises:
        ValueError: more than 16 experts, or a suite without ``chance``.

    Source: capabilities.md 8; Shapley (1953); Grabisch and Roubens (1999).
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    experts = expert_names(model)
    if len(experts) > MOST_PLAYERS:
        raise ValueError(f"expert_shapley: {len(experts)} experts have 2**{len(experts)} sets; at most {MOST_PLAYERS}")
    everybody = (1 << len(experts)) - 1
    conditions = [_keeping(experts, mask) for mask in range(everybody, 0, -1)]  # the intact model first
    every = score(model, several, conditions, controls=controls, store=store, what="shapley", progress=progress)
    every_name = row_names(every)
    report = ShapleyReport(
        experts, [], [], [], [], [], [], [], [], sum(suite.records for suite in several), [],
        {
            "interval": "95 % bootstrap", **resampled(every, every_name), "bootstrap_draws": draws, "seed": seed,
            "worth_of_nobody": {}, "sets": everybody,
            "controls": {name: str(value) for name, value in (controls or {}).items()},
        },
    )  # fmt: skip
    for scores, names in zip(every, every_name, strict=True):
        _add_rows(report, scores, names, draws, seed)
    return report


def _keeping(experts: Sequence[str], mask: int) -> Condition:
    kept = members(mask)
    removed = tuple(name for e, name in enumerate(experts) if e not in kept)
    return Condition("+".join(removed), removed) if removed else INTACT


def _add_rows(report: ShapleyReport, scores: Scores, names: Sequence[str], draws: int, seed: int) -> None:
    about = scores.traits
    scale = about.sign * about.factor
    nobody = scale * np.asarray(about.chance)
    if np.isnan(nobody[scores.shown()]).any():
        raise ValueError(
            f"expert_shapley: suite {about.task!r} does not say what nobody is worth; give it .chance (a share: 1 / "
            "number of choices; a loss: ln V)"
        )
    exact = _tables(scores.means[None] * scale, nobody)[:, 0]
    drawn = drawn_means(scores, draws=draws, seed=seed) * scale
    parts = [_tables(drawn[i : i + CHUNK], nobody) for i in range(0, len(drawn), CHUNK)]
    phi = np.concatenate([np.moveaxis(shapley_values(part), 1, 0) for part in parts])  # [draws, E, K]
    low, high = interval(phi)
    near, far = interval(phi - phi.mean(1, keepdims=True))
    pair_low, pair_high = interval(np.concatenate([np.moveaxis(interactions(part), 2, 0) for part in parts]))
    values, pairs = shapley_values(exact), interactions(exact)
    for row in scores.shown():
        report.rows.append(names[row])
        report.values.append(values[:, row].tolist())
        report.interval.append(np.stack([low[:, row], high[:, row]], -1).tolist())
        report.distance_interval.append(np.stack([near[:, row], far[:, row]], -1).tolist())
        report.interactions.append(pairs[..., row].tolist())
        report.interaction_interval.append(np.stack([pair_low[..., row], pair_high[..., row]], -1).tolist())
        report.worth.append(exact[:, row].tolist())
        report.units.append("points" if about.unit == SHARE else about.unit)
        report.items.append(int(scores.counts[:, row].sum()))
        report.settings["worth_of_nobody"][names[row]] = float(nobody[row])


def _tables(worth: Array, nobody: Array) -> Array:
    """From worth [D,C,K], conditions from everybody down to one, the coalition table [C + 1, D, K]."""
    rising = np.moveaxis(worth, 1, 0)[::-1]
    return np.concatenate([np.broadcast_to(nobody, (1, *rising.shape[1:])), rising])
