"""Figures of the results on deltas, drawn from stored numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, RED, heat_map, new_figure, whole_numbers
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.deltas.report import CompressionReport, DeltaReport, InterferenceReport


def deltas_figure(report: DeltaReport) -> Figure:
    """Size of each expert's delta per layer, cosines of pairs per layer, and the cosines over everything."""
    figure, axes = new_figure(14.5, 3.8, 3)
    layers = report.by_layer()
    x = [row["layer"] for row in layers]
    colours, order = expert_colours(report.experts), display_order(report.experts)
    for e in order:
        axes[0].plot(x, [r["relative"][e] for r in layers], color=colours[e], marker="o", markersize=3,
                     label=report.experts[e])  # fmt: skip
    axes[0].set(xlabel="layer", ylabel="|delta| / |base|", title="How far experts went from the base", ylim=(0, None))
    whole_numbers(axes[0].xaxis)
    axes[0].legend(frameon=False, fontsize=9)
    _cosine_panel(axes[1], report, layers, order)
    names = [report.experts[e] for e in order]
    values = np.asarray(report.overall["cosine"])[np.ix_(order, order)]
    heat_map(axes[2], values, names, names, signed=True)
    axes[2].set(title="Cosine of deltas, all weights")
    return figure


def _cosine_panel(ax: Axes, report: DeltaReport, layers: list[dict[str, Any]], order: list[int]) -> None:
    styles = ["-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1))]
    pairs = [(i, j) for a, i in enumerate(order) for j in order[a + 1 :]]
    for n, (i, j) in enumerate(pairs):
        label = f"{report.experts[i]}, {report.experts[j]}"
        style: dict[str, Any] = {"color": "black" if n % 2 else GREY, "linestyle": styles[n % len(styles)]}
        ax.plot([r["layer"] for r in layers], [r["cosine"][i][j] for r in layers], linewidth=1.3, label=label, **style)
    ax.axhline(report.unrelated_cosine, color=RED, linewidth=1, label="unrelated")
    ax.set(xlabel="layer", ylabel="cosine", title="Cosine of deltas per layer")
    whole_numbers(ax.xaxis)
    if len(pairs) <= 6:
        ax.legend(frameon=False, fontsize=8, ncols=2)


def interference_figure(report: InterferenceReport) -> Figure:
    """Interference of each matrix per layer, over its random control."""
    names = list(dict.fromkeys(row["matrix"] for row in report.rows))
    columns = min(len(names), 4)
    lines = -(-len(names) // max(columns, 1))
    figure, axes = new_figure(3.4 * columns, 2.7 * lines, columns, rows=lines, sharex=True)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes, names, strict=False):
        rows = [row for row in report.rows if row["matrix"] == name]
        x = [row["layer"] for row in rows]
        ax.plot(x, [row["interference"] for row in rows], color="black", marker="o", markersize=3, label="experts")
        if all(row["random"] is not None for row in rows):
            low, high = ([row[key] for row in rows] for key in ("random_low", "random_high"))
            ax.fill_between(x, low, high, color=GREY, alpha=0.3, linewidth=0)
            ax.plot(x, [row["random"] for row in rows], color=GREY, linestyle="--", label="random directions")
        ax.set(title=name, ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("layer", fontsize=10)
    figure.supylabel("interference / sum of singular values", fontsize=10)
    return figure


def compression_figure(report: CompressionReport) -> Figure:
    """Relative error of the low-rank deltas: one dot per matrix, layers from left to right."""
    figure, axes = new_figure(7.5, 3.6)
    colours, order = expert_colours(report.experts), display_order(report.experts)
    layers = [row["layer"] for row in report.rows]
    width = 0.8 / len(order)
    for place, e in enumerate(order):
        x = [layer + (place - (len(order) - 1) / 2) * width for layer in layers]
        y = [row["relative_error"][e] for row in report.rows]
        axes[0].scatter(x, y, s=14, color=colours[e], label=report.experts[e])
    axes[0].set(
        xlabel="layer",
        ylabel="relative error of the delta",
        ylim=(0, 1),
        title=f"Deltas of low rank: {report.size:.2f} times one dense model",
    )
    whole_numbers(axes[0].xaxis)
    axes[0].legend(frameon=False, fontsize=9, ncols=2)
    return figure
