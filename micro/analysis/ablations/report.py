"""What it costs to lose an expert: the score of each task with sets of experts removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from micro.analysis.ablations.random_cells import check_draws, random_cells
from micro.analysis.ablations.scores import (
    INTACT,
    Condition,
    Scores,
    ScoreStore,
    asked_conditions,
    row_names,
    score,
)
from micro.analysis.ablations.statistics import (
    DRAWS,
    Line,
    best_lines,
    claim_lines,
    drawn_means,
    resampled,
    split_records,
)
from micro.analysis.result import Result
from micro.analysis.statistics import interval
from micro.analysis.suites import LossSuite, Suite
from micro.files import write_text

__all__ = ["AblationReport", "LossSuite", "Suite", "ablation"]

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM


@dataclass
class AblationReport(Result):
    """Score per row (task or domain) and condition, and its rise over no ablation with a paired bootstrap interval.

    ``score`` and ``rise`` are in the unit of the row's suite (nats, or shares); ``claims``, ``best`` and ``random`` are
    in nats or points (100 times a share). ``settings["resampled"]`` says what the bootstrap draws.
    """

    name: ClassVar[str] = "ablation"

    rows: list[str]
    conditions: list[str]  # the first is "none"
    score: list[list[float]]  # [rows][conditions]
    rise: list[list[float]]
    rise_interval: list[list[list[float]]]  # [rows][conditions][2]
    records: int
    items: list[int]  # of each row
    settings: dict[str, Any] = field(default_factory=dict)
    higher_is_better: list[bool] = field(default_factory=list)  # of each row; empty = losses
    units: list[str] = field(default_factory=list)
    members: list[list[str]] = field(default_factory=list)  # experts of each condition
    domains: list[str] = field(default_factory=list)  # expert that each row belongs to, or its name
    claims: list[Line] = field(default_factory=list)
    best: list[Line] = field(default_factory=list)
    random: list[Line] = field(default_factory=list)  # the control by random cells, if asked for

    def harm(self, row: int) -> list[float]:
        """How much worse each condition is than none in a row, in the row's unit; above 0 = worse."""
        better = bool(self.higher_is_better) and self.higher_is_better[row]
        return [-rise if better else rise for rise in self.rise[row]]

    @property
    def own_domain_is_worst(self) -> dict[str, bool]:
        """For each row that belongs to an expert: does ablating that one alone harm it most of all single experts?"""
        verdict = {}
        singles = [c for c in range(len(self.conditions)) if not self.members or len(self.members[c]) <= 1]
        for r, row in enumerate(self.rows):
            domain = self.domains[r] if self.domains else row
            if domain in self.conditions:
                harm = self.harm(r)
                worst = singles[int(np.argmax([harm[c] for c in singles]))]
                verdict[row] = worst == self.conditions.index(domain)
        return verdict

    def table(self) -> pd.DataFrame:
        """Score of every row under every condition."""
        import pandas as pd

        frame = pd.DataFrame(self.score, columns=self.conditions)
        frame.insert(0, "domain", self.rows)
        return frame

    def tests(self) -> pd.DataFrame:
        """The claim table: one line per row and ablated set, one Holm family over all lines.

        Columns: task, ablated, unit, records, items; intact, score (with intact_se, score_se over records), change with
        the standard error ``se`` of the paired difference and its 95 % bootstrap interval low..high; test ("exact
        McNemar" for records that are right or wrong, else "sign flips" of records), p, p_holm; p_bootstrap, the paired
        bootstrap's p, which like the interval is too sure of itself below some 20 records. Interval and p_bootstrap
        draw groups (templates) where the suite names them; se, p and p_holm speak of these records alone;
        and the published test: published_se (``sqrt(se^2 + intact_se^2)``), published_t, published_df, published_p,
        published_stars (unpaired, uncorrected). The line "Average" is over tasks scored as shares.
        """
        import pandas as pd

        return pd.DataFrame(self.claims)

    def best_table(self) -> pd.DataFrame:
        """Best single ablation per row: chosen on validation records, and on the test itself (``optimistic``)."""
        import pandas as pd

        return pd.DataFrame(self.best)

    def random_table(self) -> pd.DataFrame:
        """Each ablated set against as many random cells, as :func:`~micro.analysis.random_cells` returns them. Random
        cells may be the set's own (1 in 4 for one of four experts), so ``excess`` is less than all of its harm.
        """
        import pandas as pd

        return pd.DataFrame(self.random)

    def save(self, folder: str | Path) -> None:
        """Write ablation.json, ablation.csv, and the tables ablation_tests.csv, ablation_best.csv, ablation_random.csv
        where they have lines.
        """
        super().save(folder)
        tables = (
            ("tests", self.claims, self.tests), ("best", self.best, self.best_table),
            ("random", self.random, self.random_table),
        )  # fmt: skip
        for suffix, lines, frame in tables:
            if lines:
                write_text(Path(folder) / f"{self.name}_{suffix}.csv", frame().to_csv(index=False))

    def plot(self, kind: Literal["rise", "bars"] = "rise") -> Figure:
        """``rise``: heat map of the change by row and ablated set; ``bars``: scores with intervals, a panel per row."""
        from micro.analysis.ablations.figures import ablation_bars, ablation_heat_map

        if kind not in ("rise", "bars"):
            raise ValueError(f'kind is {kind!r}, expected "rise" or "bars"')
        return ablation_bars(self) if kind == "bars" else ablation_heat_map(self)


def ablation(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    sets: Literal["all"] | Sequence[str | Sequence[str]] | None = None,
    *,
    validation: Suite | Sequence[Suite] | float | None = None,
    random_draws: int = 0,
    controls: Mapping[str, Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> AblationReport:
    """Score suites without ablation and with each set of experts removed in all layers.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several tasks: :class:`LossSuite`, or anything with the shape of :class:`Suite`.
        sets: what to remove; each expert alone if not given, "all" for every set that leaves an expert (14 of four
            experts). A set is a name or a list of names.
        validation: where the best single ablation is chosen: suites with the same rows as ``suites``, in their order,
            or a share of the records of ``suites``, which the reported part then goes without. The one chosen on the
            test is always reported too, marked optimistic.
        random_draws: control: so many random sets of cells, at least 20, for each number of experts that a set removes
            (:func:`~micro.analysis.random_cells`); 0 = none.
        controls: other steering arguments, the same in every condition (``experts_per_token=1``, say).
        draws: of the bootstrap over records, or over groups of them where a suite has ``groups`` (answers that were
            made from templates do).
        seed: of the bootstrap, of random cells and of a validation share.
        store: where scores are kept between calls and on disk; nowhere if not given.
        progress: show a bar on stderr.

    Returns:
        An :class:`AblationReport`. Items are paired: intervals are of the difference (bootstrap), p values those of
        :meth:`AblationReport.tests`, corrected by Holm over all lines; beside them the published test.

    Raises:
        ValueError: an unknown expert, a set that leaves no expert, fewer than 20 random draws, or validation suites
            with other rows.

    Source: MiCRo, causal ablation (model.md 9.3).
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    check_draws(random_draws)
    conditions = [INTACT, *asked_conditions(model, sets)]
    store = ScoreStore() if store is None else store
    options: dict[str, Any] = {"controls": controls, "store": store, "progress": progress}
    every = score(model, several, conditions, **options)
    names = row_names(every)
    report = AblationReport(
        rows=[], conditions=[c.name for c in conditions], score=[], rise=[], rise_interval=[],
        records=sum(suite.records for suite in several), items=[],
        members=[list(c.ablate) for c in conditions if not isinstance(c.ablate, Mapping)],
        settings={
            "interval": "95 % paired bootstrap", **resampled(every, names), "bootstrap_draws": draws, "seed": seed,
            "correction": "Holm, one family: all lines of the claim table", "routes": "free",
            "controls": {name: str(value) for name, value in (controls or {}).items()},
        },
    )  # fmt: skip
    for scores, shown in zip(every, names, strict=True):
        _add_rows(report, scores, shown, draws, seed)
    report.claims = claim_lines(every, names, draws=draws, seed=seed)
    report.best = _best(model, every, names, conditions, validation, report.settings, draws, seed, options)
    if random_draws:
        shared: dict[str, Any] = {"draws": random_draws, "bootstrap_draws": draws, "seed": seed}
        report.random = random_cells(model, several, sets, **shared, **options)
        report.settings["random_draws"] = random_draws
    return report


def _add_rows(report: AblationReport, scores: Scores, names: Sequence[str], draws: int, seed: int) -> None:
    drawn = drawn_means(scores, draws=draws, seed=seed)
    low, high = interval(drawn - drawn[:, :1])
    means = scores.means
    for row in scores.shown():
        report.rows.append(names[row])
        report.score.append(means[:, row].tolist())
        report.rise.append((means[:, row] - means[0, row]).tolist())
        report.rise_interval.append(np.stack([low[:, row], high[:, row]], -1).tolist())
        report.items.append(int(scores.counts[:, row].sum()))
        report.higher_is_better.append(scores.traits.higher_is_better)
        report.units.append(scores.traits.unit)
        report.domains.append(str(getattr(scores.suite, "domain", names[row])))


def _best(
    model: MiCRoForCausalLM,
    every: list[Scores],
    names: list[list[str]],
    conditions: Sequence[Condition],
    validation: Suite | Sequence[Suite] | float | None,
    settings: dict[str, Any],
    draws: int,
    seed: int,
    options: dict[str, Any],
) -> list[Line]:
    """Best single ablation per row, chosen on validation and on the test."""
    candidates = [c for c, condition in enumerate(conditions) if len(condition.ablate) == 1]
    if not candidates:
        return []
    held: list[Scores] | None = None
    if isinstance(validation, (int, float)):
        parts = [split_records(scores, float(validation), seed) for scores in every]
        held, every = [part[0] for part in parts], [part[1] for part in parts]
        settings["validation"] = f"{validation:g} of the records; best ablations are reported on the others"
    elif validation is not None:
        given = list(validation) if isinstance(validation, Sequence) else [validation]
        rows = [list(suite.names) for suite in given]
        if rows != [list(scores.suite.names) for scores in every]:
            raise ValueError(f"validation: one suite per suite, with the same rows in the same order; got {rows}")
        held = score(model, given, conditions, what="validation", **options)
        settings["validation"] = f"suites with {sum(suite.records for suite in given)} records"
    lines: list[Line] = []
    shared: dict[str, Any] = {"draws": draws, "seed": seed}
    if held is not None:
        lines += best_lines(held, every, names, candidates, chosen_on="validation", **shared)
    return lines + best_lines(every, every, names, candidates, chosen_on="the test itself", **shared)
