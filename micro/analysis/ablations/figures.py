"""Figures of ablations, drawn from saved numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, RED, depth_upward, new_figure
from micro.analysis.suites import SHARE
from micro.experts import DISPLAY_ORDER, NAMES
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.ablations.cell_shapley_report import CellShapleyReport
    from micro.analysis.ablations.cells import CellReport
    from micro.analysis.ablations.compensation import CompensationReport
    from micro.analysis.ablations.report import AblationReport
    from micro.analysis.ablations.shapley_report import ShapleyReport

FOUND = 0.05  # q of a marked cell
PER_LINE, WIDEST = 4, 15.0  # panels side by side; inches


def ablation_heat_map(report: AblationReport) -> Figure:
    """Change of the score for each row and ablated set; experts in display order. Red = worse.

    Rows of different units do not share a scale: each is coloured by its own largest change.
    """
    columns = _display(report.conditions, [c for c, name in enumerate(report.conditions) if name != "none"])
    rows = _display(report.rows, range(len(report.rows)))
    units = [_unit(report, r) for r in rows]
    factors = np.array([100.0 if unit == SHARE else 1.0 for unit in units])[:, None]
    values = np.asarray(report.rise)[np.ix_(rows, columns)] * factors
    worse = np.asarray([report.harm(r) for r in rows])[:, columns] * factors
    largest = np.abs(values).max(1, keepdims=True) if len(set(units)) > 1 else np.abs(values).max(keepdims=True)
    width = 0.75 if len(columns) > 6 else 1.2
    tilt = 40 if len(columns) > 6 else 0
    figure, axes = new_figure(1.8 + width * len(columns), (2.4 if tilt else 1.4) + 0.62 * len(rows))
    ax = axes[0]
    shown = worse / np.maximum(largest, 1e-12)
    ax.imshow(shown, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    names = [report.conditions[c] for c in columns]
    ax.set_xticks(range(len(columns)), names, rotation=tilt, ha="right" if tilt else "center")
    ax.set_yticks(range(len(rows)), [report.rows[r] for r in rows])
    ax.spines[:].set_visible(False)
    for r, c in np.ndindex(values.shape):
        colour = "white" if abs(shown[r, c]) > 0.6 else "black"
        text = f"{values[r, c]:+.1f}" if units[r] == SHARE else f"{values[r, c]:+.2f}"
        ax.text(c, r, text, ha="center", va="center", fontsize=10 if width > 1 else 8, color=colour)
    losses = not any(report.higher_is_better)
    title = f"Rise of the loss, {units[0]}" if losses and len(set(units)) == 1 else "Change by ablation, red = worse"
    ax.set(xlabel="ablated", ylabel="domain of the tokens" if losses else "task", title=title)
    return figure


def ablation_bars(report: AblationReport) -> Figure:
    """Score under each condition, as a bar from the intact model's line, with the 95 % interval of the difference."""
    order = _display(report.conditions, [c for c, name in enumerate(report.conditions) if name != "none"])
    rows = _display(report.rows, range(len(report.rows)))
    colours = _condition_colours(report.conditions)
    figure, axes = _panels(len(rows), max(2.6, 0.34 * len(order) + 1.0), 3.4 if len(order) <= 6 else 4.6)
    for ax, r in zip(axes, rows, strict=False):
        factor = 100.0 if _unit(report, r) == SHARE else 1.0
        score, bounds = factor * np.asarray(report.score[r]), factor * np.asarray(report.rise_interval[r])
        for i, c in enumerate(order):
            low, high = score[0] + bounds[c]
            ax.bar(i, score[c] - score[0], bottom=score[0], color=colours[c], width=0.8)
            ax.plot([i, i], [low, high], color="black", linewidth=1.2)
        ax.axhline(score[0], color=RED, linewidth=1.2, linestyle="--", label="intact")
        _names_below(ax, [report.conditions[c] for c in order])
        unit = "percent correct" if _unit(report, r) == SHARE else _unit(report, r)
        ax.set(title=report.rows[r], ylabel=unit)
        ax.use_sticky_edges = False  # the line is not the frame
        ax.margins(y=0.08)
    return _legend(figure, axes)


def shapley_figure(report: ShapleyReport) -> Figure:
    """Shapley values with 95 % intervals, one panel per row, as distances from the mean of the experts.

    The mean is the worth of everybody less that of nobody, divided by E: a convention, the same for all experts. It is
    written into the panel.
    """
    rows = _display(report.rows, range(len(report.rows)))
    order = display_order(report.experts)
    colours = expert_colours(report.experts)
    figure, axes = _panels(len(rows), 2.9, 3.2)
    for ax, r in zip(axes, rows, strict=False):
        mean = float(np.mean(report.values[r]))
        for i, e in enumerate(order):
            ax.bar(i, report.values[r][e] - mean, color=colours[e], width=0.8)
            ax.plot([i, i], report.distance_interval[r][e], color="black", linewidth=1.2)
        ax.axhline(0, color=GREY, linewidth=0.8)
        _names_below(ax, [report.experts[e] for e in order])
        ax.set(title=f"{report.rows[r]}  (mean {mean:+.2f})", ylabel=f"value - mean, {report.units[r]}")
    figure.suptitle("Shapley value of each expert", fontsize=11)
    return figure


def cells_figure(report: CellReport) -> Figure:
    """Change of the score by single cells, layer upwards; red = worse, a dot where q <= 0.05."""
    rows = _display(report.rows, range(len(report.rows)))
    order = display_order(report.experts)
    layers = len(report.rise[0]) if report.rise else 1
    figure, axes = _panels(len(rows), 2.6, max(2.6, 0.16 * layers + 1.4))
    for ax, r in zip(axes, rows, strict=False):
        sign = -1.0 if report.higher_is_better[r] else 1.0
        harm = sign * np.asarray(report.rise[r])[:, order]
        largest = max(float(np.abs(harm).max()), 1e-12)
        image = ax.imshow(harm, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        depth_upward(ax, layers)
        found = np.argwhere(np.asarray(report.q[r])[:, order] <= FOUND)
        ax.plot(found[:, 1], found[:, 0], linestyle="", marker="o", markersize=3, color="black")
        ax.set_xticks(range(len(order)), [report.experts[e] for e in order], rotation=30, ha="right")
        ax.spines[:].set_visible(False)
        ax.set(title=report.rows[r], ylabel="layer")
        bar = figure.colorbar(image, ax=ax, shrink=0.8)
        bar.set_label(f"harm, {report.units[r]}", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    return figure


def compensation_figure(report: CompensationReport) -> Figure:
    """Harm with routes free (full colour) and replayed (hatched), with 95 % intervals, one panel per row."""
    tasks = list(dict.fromkeys(line["task"] for line in report.lines))
    tasks = [tasks[i] for i in _display(tasks, range(len(tasks)))]
    count = max((sum(line["task"] == task for line in report.lines) for task in tasks), default=1)
    figure, axes = _panels(len(tasks), max(2.9, 0.55 * count + 1.0), 3.4 if count <= 6 else 4.6)
    for ax, task in zip(axes, tasks, strict=False):
        some = [line for line in report.lines if line["task"] == task]
        some = [some[i] for i in _display([line["ablated"] for line in some], range(len(some)))]
        colours = _condition_colours([line["ablated"] for line in some])
        for i, (line, colour) in enumerate(zip(some, colours, strict=True)):
            for shift, name, hatch in ((-0.2, "free", None), (0.2, "replayed", "////")):
                ax.bar(
                    i + shift, line[name], width=0.38, color=colour if hatch is None else "white", edgecolor=colour,
                    hatch=hatch, label=f"routes {name}" if i == 0 else None,
                )  # fmt: skip
                ax.plot([i + shift] * 2, [line[f"{name}_low"], line[f"{name}_high"]], color="black", linewidth=1.2)
        ax.axhline(0, color=GREY, linewidth=0.8)
        _names_below(ax, [line["ablated"] for line in some])
        ax.set(title=task, ylabel=f"harm, {some[0]['unit']}")
    return _legend(figure, axes)


def _panels(count: int, width: float, height: float) -> tuple[Figure, Any]:
    columns = max(1, min(count, PER_LINE, int(WIDEST / width)))
    lines = -(-max(count, 1) // columns)
    figure, axes = new_figure(width * columns, height * lines, columns, rows=lines)
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: Any) -> Figure:
    """One legend below all panels, of the first one's marks."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _display(names: Sequence[str], which: Sequence[int] | range) -> list[int]:
    """Indices with the experts first, in display order, and the rest in its own order."""
    rank = {NAMES[e]: i for i, e in enumerate(DISPLAY_ORDER)}
    return sorted(which, key=lambda i: rank.get(names[i], len(rank)))


def _condition_colours(names: Sequence[str]) -> list[str]:
    """The expert's colour where one alone is removed, grey for the rest."""
    single = [name for name in names if name != "none" and "+" not in name]
    colours = dict(zip(NAMES, expert_colours(NAMES), strict=True))
    if not set(single) <= set(NAMES):
        colours = dict(zip(single, expert_colours(single), strict=True))
    return [colours.get(name, GREY) for name in names]


def _unit(report: AblationReport, row: int) -> str:
    return report.units[row] if report.units else "nats per token"


def _names_below(ax: Axes, names: Sequence[str]) -> None:
    ax.set_xticks(
        range(len(names)), names, rotation=90 if len(names) > 6 else 30, ha="center" if len(names) > 6 else "right"
    )


def cell_shapley_figure(report: CellShapleyReport) -> Figure:
    """Value of each expert's cell by layer; the band is two standard errors over orders."""
    rows = _display(report.rows, range(len(report.rows)))
    colours = _condition_colours(report.experts)
    figure, axes = _panels(len(rows), 3.1, 3.2)
    for ax, r in zip(axes, rows, strict=False):
        values, error = np.asarray(report.values[r]), np.asarray(report.error[r])
        layers = np.arange(len(values))
        for e in _display(report.experts, range(len(report.experts))):
            ax.plot(layers, values[:, e], color=colours[e], linewidth=1.6, label=report.experts[e])
            ax.fill_between(
                layers, values[:, e] - 2 * error[:, e], values[:, e] + 2 * error[:, e], color=colours[e], alpha=0.2
            )
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set(title=report.rows[r], xlabel="layer", ylabel=f"value, {report.units[r]}")
    return _legend(figure, axes)
