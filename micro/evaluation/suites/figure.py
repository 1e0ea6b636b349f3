"""Bars of the offline suites and of harness tasks, drawn from the saved numbers."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, new_figure
from micro.experts import COLOURS, DISPLAY_ORDER, NAMES
from micro.report.palette import OTHER_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.evaluation.harness import HarnessResult
    from micro.evaluation.suites.result import SuitesResult

SHADES = ("#3c4043", "#80868b", "#bdc1c6", "#5f6368", "#9aa0a6")  # for sets of several experts
ORDER = [NAMES[e] for e in DISPLAY_ORDER]


def suites_figure(result: SuitesResult) -> Figure:
    """Score of every task with its interval, chance and best simple rule; below it, what each ablation changes."""
    rows = sorted(result.summary(), key=lambda row: ORDER.index(row["domain"]))
    ablated = len(result.conditions) > 1
    width = 2.2 + 1.0 * len(rows)
    figure, axes = new_figure(max(width, 6.0), 6.6 if ablated else 3.9, rows=2 if ablated else 1, sharex=True)
    _scores(axes[0], rows)
    if ablated:
        _changes(axes[1], rows, result.conditions)
    axes[-1].set_xticks(range(len(rows)), [wrap(row["task"]) for row in rows])
    figure.supxlabel(result.note, fontsize=8, color=GREY)
    return figure


def _scores(ax: Axes, rows: list[dict[str, Any]]) -> None:
    colours = dict(zip(NAMES, COLOURS, strict=True))
    seen = set()
    for x, row in enumerate(rows):
        label = None if row["domain"] in seen else row["domain"]
        seen.add(row["domain"])
        ax.bar(x, row["score"][0], color=colours[row["domain"]], width=0.7, label=label)
        ax.plot([x, x], row["interval"][0], color="black", linewidth=1.3)
        ax.plot([x - 0.42, x + 0.42], [row["chance"]] * 2, color="black", linewidth=1.3, linestyle="--")
        if row["rule"] is not None:
            ax.plot([x - 0.42, x + 0.42], [row["rule_score"]] * 2, color=GREY, linewidth=1.3, linestyle=":")
        ax.text(x, 1.02, f"n = {row['items']}", ha="center", fontsize=8, color=GREY)
    ax.plot([], [], color="black", linewidth=1.3, linestyle="--", label="chance")
    if any(row["rule"] is not None for row in rows):
        ax.plot([], [], color=GREY, linewidth=1.3, linestyle=":", label="best simple rule")
    ax.set(ylim=(0, 1.08), ylabel="share correct", title="Offline suites")
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def _changes(ax: Axes, rows: list[dict[str, Any]], conditions: list[str]) -> None:
    own = dict(zip(NAMES, COLOURS, strict=True))
    removed = sorted(range(1, len(conditions)), key=lambda c: _place(conditions[c]))
    width = 0.8 / len(removed)
    for n, c in enumerate(removed):
        x = np.arange(len(rows)) + (n - (len(removed) - 1) / 2) * width
        colour = own.get(conditions[c], SHADES[n % len(SHADES)])
        ax.bar(x, [100 * row["change"][c] for row in rows], color=colour, width=0.9 * width, label=conditions[c])
        for at, row in zip(x, rows, strict=True):
            low, high = row["change_interval"][c]
            ax.plot([at, at], [100 * low, 100 * high], color="black", linewidth=1.0)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set(ylabel="change in points", title="When experts are ablated")
    ax.legend(title="ablated", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, title_fontsize=9)


def wrap(name: str) -> str:
    """A task's name in short lines."""
    return textwrap.fill(name.replace("_", " "), 10)


def _place(condition: str) -> int:
    return ORDER.index(condition) if condition in ORDER else len(ORDER)


def harness_figure(result: HarnessResult) -> Figure:
    """Value of every task, metric and filter with its 95 % interval, where the harness gives a standard error."""
    rows = result.rows
    figure, (ax,) = new_figure(6.4, 1.3 + 0.34 * len(rows))
    for y, row in enumerate(rows):
        ax.barh(y, row["value"], color=OTHER_COLOURS[0], height=0.62)
        if row["low"] is not None:
            ax.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1.2)
    ax.set_yticks(range(len(rows)), [_label(row) for row in rows])
    ax.invert_yaxis()
    ax.set(title="lm-evaluation-harness " + str(result.settings.get("lm_eval", "")))
    return figure


def _label(row: dict[str, Any]) -> str:
    shots = f", {row['shots']} shots" if row["shots"] else ""
    return f"{row['task']}: {row['metric']}" + (f" ({row['filter']})" if row["filter"] != "none" else "") + shots
