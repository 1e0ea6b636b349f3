"""How much of an ablation the later routers make up for: routes free against routes replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from micro.analysis.ablations.scores import (
    INTACT,
    Condition,
    Scores,
    ScoreStore,
    asked_conditions,
    expert_names,
    row_names,
    score,
)
from micro.analysis.ablations.statistics import DRAWS, Line, drawn_means, resampled, sign_flip_p
from micro.analysis.result import Result
from micro.analysis.statistics import Array, holm, interval
from micro.analysis.suites import SHARE, Suite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM


@dataclass
class CompensationReport(Result):
    """Harm of each ablation with routes free and with routes replayed, and the difference.

    Lines: task, ablated, unit, free and replayed (harm: above 0 = worse than intact, in nats or points) with their 95 %
    intervals, compensation = replayed - free with interval, p (sign flips of records) and p_holm (one family: all
    lines).
    """

    name: ClassVar[str] = "routing_compensation"

    lines: list[Line]
    records: int
    exact: bool  # replaying without ablation gave the intact scores bit for bit
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """The lines."""
        import pandas as pd

        return pd.DataFrame(self.lines)

    def __str__(self) -> str:
        """The lines, and whether replaying alone changed nothing."""
        same = "gives the intact scores bit for bit" if self.exact else "CHANGES THE SCORES: do not trust these numbers"
        return f"{super().__str__()}\nreplay without ablation {same}"

    def plot(self) -> Figure:
        """Bars of both harms, one panel per row."""
        from micro.analysis.ablations.figures import compensation_figure

        return compensation_figure(self)


def routing_compensation(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    sets: Literal["all"] | Sequence[str | Sequence[str]] | None = None,
    *,
    controls: Mapping[str, Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> CompensationReport:
    """Compensation through routing: what an ablation costs with routes held, minus what it costs with routes free.

    *Replayed*: in every layer every token takes the choices of the intact run, except that a choice that is ablated
    becomes the best remaining expert of that layer and token, by the intact run's router. *Free*: the routers choose
    anew among the remaining experts from the changed hidden states. In the first layer both are the same.

    Args:
        model: a MiCRo model of either kind.
        suites: tasks that read the same texts in the same batches under every condition (losses, candidate choices);
            generated text cannot be replayed.
        sets: what to remove, as in :func:`~micro.analysis.ablation`; "all" goes without the sets that leave a single
            expert, where routing has nothing to choose.
        controls: other steering arguments, the same in every condition.
        draws: of the bootstrap over records, or over groups of them where a suite has ``groups``.
        seed: of the bootstrap.
        store: where scores are kept; those of free routes are those of an ablation.
        progress: show a bar on stderr.

    Returns:
        A :class:`CompensationReport`. Compensation above 0: later routers make up for part of what was removed; below
        0: they are led astray by it.

    Raises:
        ValueError: as for an ablation, or a suite that generates.

    Source: capabilities.md 7 (routes replayed and free); model.md 9.3.
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    asked = asked_conditions(model, sets)
    if sets == "all":
        asked = [c for c in asked if len(c.ablate) < len(expert_names(model)) - 1]
    free = [INTACT, *asked]
    replayed = [Condition(c.name, c.ablate, routes="replayed") for c in free]
    every = score(
        model, several, [*free, *replayed], controls=controls, store=store, what="routes replayed", progress=progress
    )
    every_name = row_names(every)
    report = CompensationReport(
        [], sum(suite.records for suite in several),
        all(np.array_equal(scores.sums[0], scores.sums[len(free)]) for scores in every),
        {
            "interval": "95 % paired bootstrap", **resampled(every, every_name), "bootstrap_draws": draws,
            "seed": seed, "correction": "Holm, one family: all lines",
            "replayed": "choices of the intact run; an ablated one becomes the best remaining of its layer and token",
            "controls": {name: str(value) for name, value in (controls or {}).items()},
        },
    )  # fmt: skip
    for scores, names in zip(every, every_name, strict=True):
        report.lines += _lines(scores, names, len(free), draws, seed)
    for line, p in zip(report.lines, holm([line["p"] for line in report.lines]), strict=True) if report.lines else ():
        line["p_holm"] = float(p)
    return report


def _lines(scores: Scores, names: Sequence[str], count: int, draws: int, seed: int) -> list[Line]:
    about = scores.traits
    drawn = drawn_means(scores, draws=draws, seed=seed)
    means = scores.means[None]

    def harm(values: Array, c: int, row: int) -> Array:
        """[D] of condition c over the intact one."""
        return about.sign * about.factor * (values[:, 0, row] - values[:, c, row])

    flips = sign_flip_p(np.moveaxis(scores.sums[count:] - scores.sums[:count], 0, 1), seed=seed)  # [count, rows]
    lines = []
    for row in scores.shown():
        for c in range(1, count):
            line: Line = {"task": names[row], "ablated": scores.conditions[c].name,
                          "unit": "points" if about.unit == SHARE else about.unit}  # fmt: skip
            for name, at in (("free", c), ("replayed", count + c)):
                low, high = interval(harm(drawn, at, row))
                line |= {name: float(harm(means, at, row)[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
            low, high = interval(harm(drawn, count + c, row) - harm(drawn, c, row))
            compensation = line["replayed"] - line["free"]
            line |= {"compensation": compensation, "low": float(low), "high": float(high), "p": float(flips[c, row])}
            lines.append(line)
    return lines
