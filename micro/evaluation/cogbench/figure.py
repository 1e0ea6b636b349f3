"""Bars of every metric between random and human, drawn from the saved numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from micro.evaluation.cogbench.result import CogBenchResult

LOW, HIGH = -1.5, 3.0  # values outside are drawn at the edge, with their number
GREY = "#5f6368"
COLOURS = {"behaviour": "#0072B2", "performance": "#E69F00"}


def cogbench_figure(result: CogBenchResult) -> Figure:
    """(x - random) / (human - random) with 95 % intervals; random = 0, human = 1."""
    from matplotlib.figure import Figure

    rows = result.rows()
    figure = Figure(figsize=(7.4, 1.5 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for y, row in enumerate(rows):
        x, low, high = (_place(row, row[key]) for key in ("value", "low", "high"))
        shown = min(max(x, LOW), HIGH)
        ax.barh(y, shown, color=COLOURS[row["group"]], height=0.62)
        if low == low:
            ax.plot([max(min(low, high), LOW), min(max(low, high), HIGH)], [y, y], color="black", linewidth=1.2)
        if shown != x:
            ax.text(
                shown, y - 0.2, f" {x:.1f} ", va="center", ha="right" if x > 0 else "left", fontsize=8, color="white"
            )
    ax.axvline(0, color=GREY, linewidth=1)
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    labels = [row["experiment"].replace("_", " ") if row["group"] == "performance" else row["metric"] for row in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_xticks([-1, 0, 1, 2, 3], ["-1", "0\nrandom", "1\nhuman", "2", "3"])
    ax.set(xlim=(LOW, HIGH), title=_title(result))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, colors=GREY)
    from matplotlib.patches import Patch

    groups = dict.fromkeys(row["group"] for row in rows)
    ax.legend(
        handles=[Patch(color=COLOURS[group], label=group) for group in groups], frameon=False, fontsize=9, loc="best"
    )
    return figure


def _place(row: dict[str, Any], value: float) -> float:
    """On the scale from random to human, with its sign."""
    return float((value - row["random"]) / (row["human"] - row["random"]))


def _title(result: CogBenchResult) -> str:
    parts = [f"{key} {value:.2f}" for key, value in result.s_bre.items() if value is not None and key != "mean"]
    how = "" if result.variant == "direct" else f", {result.variant}"
    return f"CogBench, {result.preset}{how}: S_BRE " + ", ".join(parts)
