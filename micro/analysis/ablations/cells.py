"""Where in the model an expert matters: every single cell (layer, expert) removed, with controls by random cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.ablations.random_cells import RANDOM_DRAWS, check_draws, random_cells
from micro.analysis.ablations.scores import INTACT, Condition, Scores, ScoreStore, expert_names, row_names, score
from micro.analysis.ablations.statistics import EXACT_RECORDS, Line, sign_flip_p
from micro.analysis.result import Result
from micro.analysis.statistics import benjamini_hochberg, permutation_p
from micro.analysis.suites import SHARE, Suite

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM

RECORDS_PER_DOMAIN = 20  # of a cell map: L * E conditions are many
FLIPS = 50_000  # many cells: the smallest p must survive the correction


def few_per_domain(records: Sequence[Record], most: int = RECORDS_PER_DOMAIN) -> list[Record]:
    """The first ``most`` records of each domain, in their order; the domain is the label of most of the answer."""
    seen: Counter[str] = Counter()
    chosen = []
    for record in records:
        sizes: Counter[str] = Counter()
        for span in record.spans:
            sizes[span.label] += span.end - span.start
        domain = sizes.most_common(1)[0][0] if sizes else ""
        seen[domain] += 1
        if seen[domain] <= most:
            chosen.append(record)
    return chosen


@dataclass
class CellReport(Result):
    """Rise of the score when one cell is removed, per row, layer and expert, with p and q values.

    ``rise`` is in nats or points. ``q``: Benjamini-Hochberg over all rows and cells. ``held_out``: control of the map;
    the most harmful cell chosen on half of the records, its harm on the other half, and how many cells reach it there.
    ``whole``: control of whole-expert ablation against as many random cells (:func:`random_cells`).
    """

    name: ClassVar[str] = "cells"

    experts: list[str]
    rows: list[str]
    rise: list[list[list[float]]]  # [rows][L][E]
    p: list[list[list[float]]]
    q: list[list[list[float]]]
    units: list[str]
    higher_is_better: list[bool]
    records: int
    items: list[int]
    held_out: list[Line] = field(default_factory=list)
    whole: list[Line] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per row and cell: change, p, q; the smallest q first."""
        import pandas as pd

        lines = [
            {
                "task": row, "layer": l, "expert": expert, "unit": self.units[r], "change": self.rise[r][l][e],
                "p": self.p[r][l][e], "q": self.q[r][l][e],
            }
            for r, row in enumerate(self.rows)
            for l in range(len(self.rise[r]))
            for e, expert in enumerate(self.experts)
        ]  # fmt: skip
        frame = pd.DataFrame(lines)
        if not lines:
            return frame
        order = np.lexsort((-frame["change"].abs().to_numpy(), frame["p"].to_numpy()))
        return frame.iloc[order].reset_index(drop=True)

    def whole_table(self) -> pd.DataFrame:
        """Whole experts against random cells, one line per row and expert."""
        import pandas as pd

        return pd.DataFrame(self.whole)

    def __str__(self) -> str:
        """The first cells of the table, and the controls."""
        import pandas as pd

        found = int((np.asarray(self.q) <= 0.05).sum()) if self.rows else 0
        parts = [f"{found} of {np.size(self.q)} cells with q <= 0.05; the first ten:"]
        for frame in (self.table().head(10), pd.DataFrame(self.held_out), self.whole_table()):
            if len(frame):
                parts.append(frame.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
        return "\n\n".join(parts)

    def plot(self) -> Figure:
        """Heat maps layer x expert, one per row; a dot where q <= 0.05."""
        from micro.analysis.ablations.figures import cells_figure

        return cells_figure(self)


def cell_map(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    *,
    random_draws: int = RANDOM_DRAWS,
    controls: Mapping[str, Any] | None = None,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> CellReport:
    """Remove each single cell, one after the other: L * E conditions, so few records are enough to choose from.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several small tasks, for example a LossSuite over :func:`few_per_domain`.
        random_draws: random sets of cells that whole experts are compared with (:func:`random_cells`); 0 = none, else
            at least 20.
        controls: other steering arguments, the same in every condition.
        seed: of sign flips, random cells, and the halves of the records.
        store: where scores are kept, cell by cell; give one with a folder for a map that may be interrupted.
        progress: show a bar on stderr.

    Returns:
        A :class:`CellReport`; p by sign flips of whole records.

    Raises:
        ValueError: fewer than 20 random draws.

    Source: model.md 9.3 (per-cell map); capabilities.md 2.
    """
    check_draws(random_draws)
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    experts, layers = expert_names(model), int(model.config.num_hidden_layers)
    cells = [Condition(f"{l}:{name}", {l: (name,)}) for l, name in product(range(layers), experts)]
    options: dict[str, Any] = {"controls": controls, "store": ScoreStore() if store is None else store}
    every = score(model, several, [INTACT, *cells], what="cells", progress=progress, **options)
    names = row_names(every)
    report = CellReport(
        experts, [], [], [], [], [], [], sum(suite.records for suite in several), [], settings={
            "p": f"sign flips of records (all patterns up to {EXACT_RECORDS} records, else {FLIPS} random ones)",
            "correction": "Benjamini-Hochberg over all rows and cells", "seed": seed, "random_draws": random_draws,
            "controls": {name: str(value) for name, value in (controls or {}).items()},
        },
    )  # fmt: skip
    grid = (layers, len(experts))
    for scores, shown in zip(every, names, strict=True):
        _add_rows(report, scores, shown, grid, seed)
    report.q = benjamini_hochberg(np.asarray(report.p)).tolist() if report.p else []
    if random_draws:
        report.whole = random_cells(model, several, draws=random_draws, seed=seed, progress=progress, **options)
    return report


def _add_rows(report: CellReport, scores: Scores, names: Sequence[str], grid: tuple[int, int], seed: int) -> None:
    about, means = scores.traits, scores.means
    p = sign_flip_p(np.moveaxis(scores.sums[1:] - scores.sums[:1], 0, 1), draws=FLIPS, seed=seed)  # [cells, rows]
    for row in scores.shown():
        report.rows.append(names[row])
        report.rise.append((about.factor * (means[1:, row] - means[0, row])).reshape(grid).tolist())
        report.p.append(p[:, row].reshape(grid).tolist())
        report.units.append("points" if about.unit == SHARE else about.unit)
        report.higher_is_better.append(about.higher_is_better)
        report.items.append(int(scores.counts[:, row].sum()))
        report.held_out += _held_out(scores, row, names[row], report.experts, seed)


def _held_out(scores: Scores, row: int, name: str, experts: Sequence[str], seed: int) -> list[Line]:
    """The most harmful cell of one half of the records, on the other half; nothing with fewer than four records."""
    present = np.flatnonzero(scores.counts[:, row] > 0)
    if len(present) < 4:
        return []
    order = np.random.default_rng(seed).permutation(present)
    harms = []
    for part in (order[: len(order) // 2], order[len(order) // 2 :]):
        rise = (scores.sums[1:, part, row] - scores.sums[0, part, row]).sum(1) / scores.counts[part, row].sum()
        harms.append(-scores.traits.sign * scores.traits.factor * rise)
    chosen = int(np.argmax(harms[0]))
    layer, expert = divmod(chosen, len(experts))
    others = np.delete(harms[1], chosen)
    return [
        {
            "task": name, "layer": layer, "expert": experts[expert], "harm_where_chosen": float(harms[0][chosen]),
            "harm_held_out": float(harms[1][chosen]), "mean_of_other_cells": float(others.mean()),
            "p": float(permutation_p(harms[1][chosen], others)),
        }
    ]  # fmt: skip
