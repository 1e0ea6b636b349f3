"""What it costs to lose an expert: loss per domain with sets of experts removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.result import Result
from micro.analysis.statistics import Array, bootstrap, ratio
from micro.analysis.suites import LossSuite, Suite
from micro.progress import track

__all__ = ["AblationReport", "LossSuite", "Suite", "ablation"]

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM


@dataclass
class AblationReport(Result):
    """Loss per row (domain) and condition, and its rise over no ablation with a paired bootstrap interval."""

    name: ClassVar[str] = "ablation"

    rows: list[str]
    conditions: list[str]  # the first is "none"
    loss: list[list[float]]  # [rows][conditions]
    rise: list[list[float]]
    rise_interval: list[list[list[float]]]  # [rows][conditions][2]
    records: int
    tokens: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def own_domain_is_worst(self) -> dict[str, bool]:
        """For each row named like a single-expert condition: is the rise there the largest of its row?"""
        verdict = {}
        for r, row in enumerate(self.rows):
            if row in self.conditions:
                verdict[row] = int(np.argmax(self.rise[r])) == self.conditions.index(row)
        return verdict

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> AblationReport:
        return cls(**content)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        frame = pd.DataFrame(self.loss, columns=self.conditions)
        frame.insert(0, "domain", self.rows)
        return frame

    def plot(self) -> Figure:
        from micro.analysis.figures import ablation_figure

        return ablation_figure(self)


def ablation(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    sets: Sequence[str | Sequence[str]] | None = None,
    *,
    controls: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AblationReport:
    """Score suites without ablation and with each set of experts removed in all layers.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several :class:`LossSuite` (or anything with their shape).
        sets: what to remove; each expert alone if not given. A set is a name or a list of names.
        controls: other steering arguments, the same in every condition (``experts_per_token=1``, say).
        seed: of the bootstrap.
        progress: show a bar on stderr.

    Returns:
        An :class:`AblationReport`; items are paired, so the interval is of the difference (bootstrap over records).

    Raises:
        ValueError: an unknown expert, or a set that leaves no expert.

    Source: MiCRo, causal ablation; paired intervals instead of the published unpaired test.
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    chosen = list(sets) if sets is not None else list(model.config.expert_names or ())
    base = dict(controls or {})
    conditions: list[tuple[str, dict[str, Any]]] = [("none", base)]
    conditions += [("+".join([s] if isinstance(s, str) else s), {**base, "ablate": s}) for s in chosen]
    report = AblationReport(
        rows=[],
        conditions=[name for name, _ in conditions],
        loss=[],
        rise=[],
        rise_interval=[],
        records=sum(suite.records for suite in several),
        tokens=[],
        settings={"interval": "95 % paired bootstrap over records", "bootstrap_draws": 2000, "seed": seed},
    )
    work = [(suite, given) for suite in several for _, given in conditions]
    was_training = model.training
    model.train(False)
    try:
        scores = [suite.score(model, given) for suite, given in track(work, "ablation", enabled=progress)]
    finally:
        model.train(was_training)
    for i, suite in enumerate(several):
        _add_rows(report, suite, scores[i * len(conditions) : (i + 1) * len(conditions)], seed)
    return report


def _add_rows(report: AblationReport, suite: Suite, scores: list[tuple[Array, Array]], seed: int) -> None:
    sums = np.stack([s for s, _ in scores])  # [conditions, records, rows]
    counts = scores[0][1]

    def rises(weights: Array) -> Array:
        means = ratio(np.einsum("crk,r->ck", sums, weights), weights @ counts)
        return means - means[:1]

    everyone = np.ones(suite.records)
    low, high = bootstrap(suite.records, rises, seed=seed)
    losses = ratio(sums.sum(1), counts.sum(0))
    rise = rises(everyone)
    for r, name in enumerate(suite.names):
        if counts[:, r].sum() == 0:
            continue
        report.rows.append(name)
        report.loss.append(losses[:, r].tolist())
        report.rise.append(rise[:, r].tolist())
        report.rise_interval.append(np.stack([low[:, r], high[:, r]], -1).tolist())
        report.tokens.append(int(counts[:, r].sum()))
