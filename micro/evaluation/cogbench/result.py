"""What a CogBench run found, as a table, files and a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from micro.analysis.result import Result
from micro.errors import require
from micro.evaluation.cogbench.bre import relative_error
from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class CogBenchResult(Result):
    """Scores of one agent, and S_BRE (random = 0, human = 1) with 95 % bootstrap intervals over runs.

    ``scores`` and ``intervals``: experiment -> metric -> value; ``human``, ``random``, ``relative``: "behaviour" ->
    metric, "performance" -> experiment; ``baseline``: whose random values were used; ``replies``: questions and
    unreadable replies per experiment; ``variant``: "direct", or "step by step" where the agent reasoned before it
    answered; ``tables``: experiment -> pandas frame, saved as CSV files of their own.
    """

    name: ClassVar[str] = "cogbench"
    apart: ClassVar[tuple[str, ...]] = ("tables",)

    preset: str
    baseline: str
    scores: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, list[float]]]
    human: dict[str, dict[str, float]]
    random: dict[str, dict[str, float]]
    s_bre: dict[str, float | None]
    s_bre_intervals: dict[str, list[float] | None]
    relative: dict[str, dict[str, float]]
    missing: list[str]
    agent: str = ""
    variant: str = "direct"
    replies: dict[str, dict[str, int]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def rows(self) -> list[dict[str, Any]]:
        """One entry per metric, behaviour first: value, interval, human, random, s and bounded relative error."""
        out = []
        for group in ("behaviour", "performance"):
            for experiment, score in self.scores.items():
                for metric, value in score.items():
                    if (metric == "performance") != (group == "performance"):
                        continue
                    key = experiment if group == "performance" else metric
                    human, random = self.human[group][key], self.random[group][key]
                    s, error = relative_error(value, human, random)
                    low, high = self.intervals.get(experiment, {}).get(metric, (float("nan"),) * 2)
                    out.append(
                        {
                            "group": group,
                            "experiment": experiment,
                            "metric": metric,
                            "value": value,
                            "low": low,
                            "high": high,
                            "human": human,
                            "random": random,
                            "s": s,
                            "error": error,
                        }
                    )
        return out

    def table(self) -> pd.DataFrame:
        return require("pandas", "eval", "CogBenchResult.table").DataFrame(self.rows())

    def save(self, folder: str | Path) -> None:
        """Write ``cogbench.json``, ``cogbench.csv`` and one CSV file per experiment into ``folder``."""
        super().save(folder)
        for name, table in self.tables.items():
            write_text(Path(folder) / f"{name}.csv", table.to_csv(index=False))

    @classmethod
    def load(cls, path: str | Path) -> CogBenchResult:
        """Read a result back, with the tables that stand beside it."""
        result = super().load(path)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        for name in result.scores:
            if (folder / f"{name}.csv").is_file():
                result.tables[name] = require("pandas", "eval", "CogBenchResult.load").read_csv(folder / f"{name}.csv")
        return result

    def plot(self) -> Figure:
        from micro.evaluation.cogbench.figure import cogbench_figure

        return cogbench_figure(self)

    def __str__(self) -> str:
        lines = [super().__str__()]
        for key, value in self.s_bre.items():
            if value is not None:
                interval = self.s_bre_intervals.get(key)
                told = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
                lines.append(f"S_BRE {key}: {value:.3f}{told}")
        whose = "its own random agent" if self.baseline == "own" else "the published random values"
        how = "" if self.variant == "direct" else f", {self.variant}"
        lines.append(f"preset {self.preset}{how}; random = {whose}; s = 1 is human, 0 random")
        questions = sum(r["questions"] for r in self.replies.values())
        if questions:
            lost = {name: r["unreadable"] for name, r in self.replies.items() if r["unreadable"]}
            told = ": " + ", ".join(f"{name} {n}" for name, n in lost.items()) if lost else ""
            lines.append(f"{sum(lost.values())} of {questions} replies were unreadable{told}")
            if 2 * sum(lost.values()) > questions:
                lines.insert(0, "MOST REPLIES WERE UNREADABLE: what follows scores random choices, not the model")
        if self.missing:
            lines.append(f"S_BRE without: {', '.join(self.missing)}")
        return "\n".join(lines)
