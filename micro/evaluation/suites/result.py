"""Scores of the offline suites: a table, files, bars per task."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from micro.analysis.result import Result
from micro.errors import require
from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NOTE = "Own items and forced choices: not comparable with published benchmarks."
ALL = "all"  # the row that is the mean over a task's rows


@dataclass
class SuitesResult(Result):
    """Share of items answered rightly, per task and row, without ablation and with each set of experts removed.

    ``conditions``: the first is "none". ``rows``: task, domain, row ("all": the mean over the task's rows), items,
    chance, rule and rule_score (the best of the rules that understand nothing; None where there are none), and one
    entry per condition in score, interval (95 %; interval_by: "binomial", exact, where records are single items, right
    or wrong, else "bootstrap" over records), change (against "none") and change_interval (95 % bootstrap over records,
    paired). ``tasks``: task -> settings of its items. ``missing``: task -> why it was left out. ``outcomes``:
    task -> condition -> one dictionary per item, saved in ``suites_items.jsonl``.
    """

    name: ClassVar[str] = "suites"
    apart: ClassVar[tuple[str, ...]] = ("outcomes",)

    conditions: list[str]
    rows: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = NOTE
    outcomes: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict, repr=False, compare=False)

    def table(self) -> pd.DataFrame:
        """One line per task, row and condition; the means over rows come first."""
        lines = [
            {
                **{name: row[name] for name in ("domain", "task", "row")},
                "condition": condition,
                "items": row["items"],
                "score": row["score"][c],
                "low": row["interval"][c][0],
                "high": row["interval"][c][1],
                "interval_by": row.get("interval_by", "bootstrap"),
                "chance": row["chance"],
                "rule": row["rule"],
                "rule_score": row["rule_score"],
                "change": row["change"][c],
                "change_low": row["change_interval"][c][0],
                "change_high": row["change_interval"][c][1],
                "note": self.note,
            }
            for row in [*self.summary(), *(row for row in self.rows if row["row"] != ALL)]
            for c, condition in enumerate(self.conditions)
        ]
        return require("pandas", "eval", "SuitesResult.table").DataFrame(lines)

    def summary(self) -> list[dict[str, Any]]:
        """One row per task."""
        return [row for row in self.rows if row["row"] == ALL]

    def save(self, folder: str | Path) -> None:
        """Write ``suites.json``, ``suites.csv`` and, one item a line, ``suites_items.jsonl`` into ``folder``."""
        super().save(folder)
        lines = [
            json.dumps({"task": task, "condition": condition, **outcome}, ensure_ascii=False)
            for task, by_condition in self.outcomes.items()
            for condition, outcomes in by_condition.items()
            for outcome in outcomes
        ]
        write_text(Path(folder) / f"{self.name}_items.jsonl", "".join(f"{line}\n" for line in lines))

    @classmethod
    def load(cls, path: str | Path) -> SuitesResult:
        """Read a result back, with the items that stand beside it."""
        result = super().load(path)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        items = folder / f"{cls.name}_items.jsonl"
        for line in items.read_text(encoding="utf-8").splitlines() if items.is_file() else []:
            outcome = json.loads(line)
            by_condition = result.outcomes.setdefault(outcome.pop("task"), {})
            by_condition.setdefault(outcome.pop("condition"), []).append(outcome)
        return result

    def plot(self) -> Figure:
        from micro.evaluation.suites.figure import suites_figure

        return suites_figure(self)

    def __str__(self) -> str:
        head = ["domain", "task", "items", "score", "95 %", "chance", "best rule"]
        head += [f"-{condition}" for condition in self.conditions[1:]]
        lines = [head]
        for row in self.summary():
            low, high = row["interval"][0]
            rule = "" if row["rule"] is None else f"{row['rule_score']:.2f} {row['rule']}"
            cells = [
                row["domain"],
                row["task"],
                str(row["items"]),
                f"{row['score'][0]:.3f}",
                f"[{low:.2f}, {high:.2f}]",
            ]
            lines.append([*cells, f"{row['chance']:.2f}", rule, *[f"{100 * c:+.1f}" for c in row["change"][1:]]])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        told = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        if len(self.conditions) > 1:
            told.append("-expert: change in points when it is ablated")
        told += [f"without {task}: {why}" for task, why in self.missing.items()]
        return "\n".join([*told, self.note])
