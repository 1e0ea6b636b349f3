"""Figures of localizers and lesions, drawn from saved numbers only."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, RED, new_figure, shown_order, whole_numbers
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from micro.analysis.localizers.result import LesionResult, LocalizerResult

COLUMNS = 4  # panels in one row


def localizer_figure(result: LocalizerResult) -> Figure:
    """Share of each cell's units that are selected: a panel per expert, layers from left to right.

    The band behind the bars is what random masks of the same size select.
    """
    rate, chance = 100 * np.asarray(result.rate), 100 * np.asarray(result.rate_random)
    counts = np.asarray(result.counts).sum(0)
    layers = np.arange(len(rate))
    order = display_order(result.experts)
    columns = min(len(order), COLUMNS)
    rows = -(-len(order) // columns)
    width = max(2.7 * columns + 0.7, 4.5)
    figure, axes = new_figure(width, 2.5 * rows + 0.8, columns, rows=rows, sharex=True, sharey=True)
    colours = expert_colours(result.experts)
    expected = 100 * result.selected / result.units
    for ax, e in zip(axes, order, strict=False):
        edges = np.append(layers - 0.5, len(layers) - 0.5)
        band: dict[str, Any] = {"fill": True, "color": "#dadce0", "zorder": 1, "label": "95 % of random masks"}
        ax.stairs(chance[:, e, 1], edges, baseline=chance[:, e, 0], **band)
        ax.bar(layers, rate[:, e], width=0.7, color=colours[e], zorder=2)
        ax.axhline(expected, color=GREY, linewidth=1, linestyle="--", zorder=3, label="their mean")
        share = 100 * result.share[e]
        ax.set_title(f"{result.experts[e]}: {counts[e]:,} units, {share:.0f} %", fontsize=10)
        whole_numbers(ax.xaxis)
    for ax in axes[len(order) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("selected, % of the cell's units", fontsize=9)
    for ax in axes[max(0, len(order) - columns) : len(order)]:
        ax.set_xlabel("layer", fontsize=9)
    what = f"{_which(result.settings.get('range'))} {expected:.3g} % of {result.units:,} units ({result.unit})"
    name = result.localizer.replace("_", " ")
    figure.suptitle(fill(f"{name} localizer, {what}", int(13 * width)), fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _which(band: list[float] | None) -> str:
    """The words for which units were selected."""
    if band is None:
        return "top"
    return "lowest" if list(band) == [0, 0] else f"percentiles {band[0]:g} to {band[1]:g}, random"


def lesion_figure(result: LesionResult) -> Figure:
    """Harm of the lesion (mark) among those of the random masks (dots), a line per row."""
    figure, axes = new_figure(6.4, 1.4 + 0.55 * len(result.rows))
    ax = axes[0]
    order = shown_order(result.rows)
    heights = np.arange(len(order))[::-1]
    for height, row in zip(heights, order, strict=True):
        harm, random = result.harm[row], result.random[row]
        jitter = np.linspace(-0.18, 0.18, len(random)) if len(random) > 1 else np.zeros(1)
        first = height == heights[0]
        ax.scatter(random, height + jitter, s=14, color="#9aa0a6", label="random units" if first else None)
        ax.scatter([harm], [height], s=70, marker="D", color=RED, zorder=3, label="lesion" if first else None)
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(heights, [result.rows[r] for r in order])
    ax.set(ylim=(-0.6, len(heights) - 0.4), xlabel=f"harm, {result.scale}")
    title = f"Lesion of {result.selected:,} of {result.units:,} units, {len(result.random[0])} random masks"
    ax.set_title(title, fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
