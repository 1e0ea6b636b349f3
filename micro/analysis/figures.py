"""Figures, drawn from saved numbers only. Experts stand in the order language, logic, social, world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from micro.errors import require
from micro.experts import DISPLAY_ORDER, NAMES
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.routes.report import RoutingReport

GREY, RED = "#5f6368", "#c5221f"
NUMBERS_UP_TO = 8  # columns of a heat map that still has room for numbers


def new_figure(width: float, height: float, columns: int = 1, *, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of ``width`` x ``height`` inches and its panels in reading order, in the style of all reports.

    ``options`` go to :meth:`matplotlib.figure.Figure.subplots` (``sharey=True``, say).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    Figure = require("matplotlib.figure", "viz", "a figure").Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9, colors=GREY)
    return figure, axes


def whole_numbers(axis: Any) -> None:
    """Ticks of an axis that counts layers: no layer 0.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def depth_upward(ax: Axes, rows: int) -> None:
    """Rows of a map from the bottom up: in every figure layer 0 lies at the bottom, as depth grows upward."""
    ax.set_ylim(-0.5, rows - 0.5)


def shown_order(names: Sequence[str]) -> list[int]:
    """Indices of domains, tasks or sets in the order of all figures: those named like an expert in the experts' order,
    then the rest as it stands.
    """
    rank = {NAMES[e]: place for place, e in enumerate(DISPLAY_ORDER)}
    return sorted(range(len(names)), key=lambda i: rank.get(names[i], len(rank)))


def usage_panel(ax: Axes, report: RoutingReport) -> None:
    """Stacked share of each expert in each layer."""
    usage = np.asarray(report.usage_by_layer)
    bottom = np.zeros(len(usage))
    colours = expert_colours(report.experts)
    for e in display_order(report.experts):
        ax.bar(np.arange(len(usage)), usage[:, e], bottom=bottom, color=colours[e], width=0.9, label=report.experts[e])
        bottom += usage[:, e]
    ax.set(xlabel="layer", ylabel="share of tokens", ylim=(0, 1), title="Usage per layer")
    whole_numbers(ax.xaxis)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False, fontsize=9)


def confusion_panel(ax: Axes, report: RoutingReport) -> None:
    """Label of the token against the expert it was routed to, mean over layers."""
    order = display_order(report.experts)
    values = np.mean(report.confusion or [], axis=0)[np.ix_(order, order)]
    names = [report.experts[e] for e in order]
    heat_map(ax, values, names, names)
    ax.set(xlabel="routed to", ylabel="label", title="Label and route, mean over layers")


def heat_map(
    ax: Axes,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float = 1.0,
    signed: bool = False,
    starred: Any = None,
    size: float = 9,
) -> None:
    """Numbers [rows,columns] as colours on one scale, grey from 0 to ``limit`` or, ``signed``, blue to red around 0;
    written out for up to eight columns. NaN (or None) stays empty.

    starred: bool [rows,columns], which numbers get a star; size: of letters.
    """
    values = np.asarray(values, dtype=np.float64)
    colours = "RdBu_r" if signed else "Greys"
    ax.imshow(values, cmap=colours, vmin=-limit if signed else 0.0, vmax=limit, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, fontsize=size)
    ax.set_yticks(range(len(rows)), rows, fontsize=size)
    ax.spines[:].set_visible(False)
    if len(columns) > NUMBERS_UP_TO:
        return
    for (r, c), value in np.ndenumerate(values):
        dark = abs(value) > 0.6 * limit
        shown = "" if np.isnan(value) else f"{value:+.2f}" if signed else f"{value:.2f}"
        shown += "*" if starred is not None and starred[r, c] else ""
        ax.text(c, r, shown, ha="center", va="center", fontsize=size, color="white" if dark else "black")


def accuracy_panel(ax: Axes, reports: Mapping[str, RoutingReport]) -> None:
    """Accuracy of each layer for several models, with the chance line."""
    for i, (name, report) in enumerate(reports.items()):
        style = {"color": "black", "linewidth": 2} if i == 0 else {"color": GREY, "linestyle": "--"}
        ax.plot(report.accuracy_by_layer or [], label=name, marker="o", markersize=3, **style)
    chance = 1 / len(next(iter(reports.values())).experts)
    ax.axhline(chance, color=RED, linewidth=1, label="chance")
    ax.set(
        xlabel="layer", ylabel="routing accuracy", ylim=(0, 1), title="Routing accuracy per layer, held-out templates"
    )
    ax.legend(frameon=False, fontsize=9)


def routing_figure(report: RoutingReport) -> Figure:
    """Usage per layer and, where there are labels, the confusion of label and route."""
    panels = 1 if report.confusion is None else 2
    figure, axes = new_figure(6.2 * panels, 3.8, panels)
    usage_panel(axes[0], report)
    if report.confusion is not None:
        confusion_panel(axes[1], report)
    return figure


def accuracy_figure(reports: Mapping[str, RoutingReport]) -> Figure:
    """Routing accuracy per layer of a model and its controls."""
    figure, axes = new_figure(6.6, 3.6)
    accuracy_panel(axes[0], reports)
    return figure


def loss_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss against step, one panel per stage. ``metrics``: lines of metrics.jsonl with stage, step, loss."""
    stages = list(dict.fromkeys(str(m["stage"]) for m in metrics))
    figure, axes = new_figure(4.0 * max(len(stages), 1), 3.2, max(len(stages), 1))
    for ax, stage in zip(axes, stages, strict=False):
        lines = [m for m in metrics if str(m["stage"]) == stage and m.get("loss") is not None]
        ax.plot([m["step"] for m in lines], [m["loss"] for m in lines], color="black", linewidth=1.4)
        ax.set(title=stage, xlabel="step", ylabel="loss, nats per token")
    return figure
