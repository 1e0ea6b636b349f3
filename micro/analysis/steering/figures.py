"""Figures of steering, drawn from stored numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, heat_map, new_figure, shown_order
from micro.report.palette import expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.steering.matrix import SteeringReport


def steering_figure(report: SteeringReport) -> Figure:
    """The score matrix and, where there are curves, use of each expert and change of its own domain against bias."""
    rows, columns = shown_order(report.rows), shown_order(report.sets)
    width = 1.9 + 1.15 * len(columns)
    widths = [width, *([4.2, 4.2] if report.curves else [])]
    height = max(3.4 if report.curves else 2.0, 1.4 + 0.62 * len(rows))
    figure, axes = new_figure(sum(widths), height, len(widths), width_ratios=widths)
    _matrix(axes[0], report, rows, columns)
    if report.curves:
        _use(axes[1], report)
        _own_change(axes[2], report)
    return figure


def _matrix(ax: Axes, report: SteeringReport, rows: list[int], columns: list[int]) -> None:
    values = np.asarray(report.change)[np.ix_(rows, columns)]
    high = max(float(np.nanmax(np.abs(values))), 1e-9)
    names = [report.rows[r] for r in rows], [report.sets[c] for c in columns]
    found = np.asarray(report.p_holm, dtype=float)[np.ix_(rows, columns)] < 0.05
    heat_map(ax, values, *names, limit=high, signed=True, starred=found, size=10)
    kinds = {"nats per token": "log-likelihood, nats per token", "points": "share correct, points"}
    kind = kinds.get(report.unit, report.unit)
    ax.set(xlabel="steered to (* p < 0.05, Holm)", ylabel="task or domain", title=f"Change of {kind}")


def _styled(report: SteeringReport) -> list[tuple[dict[str, Any], str]]:
    """Curves in display order with the colour of their expert."""
    domains = report.curves[0]["domains"]
    colours = dict(zip(domains, expert_colours(domains), strict=True))
    order = shown_order([curve["expert"] for curve in report.curves])
    return [(report.curves[i], colours[report.curves[i]["expert"]]) for i in order]


def _use(ax: Axes, report: SteeringReport) -> None:
    for curve, colour in _styled(report):
        ax.plot(curve["values"], curve["probability"], color=colour, marker="o", markersize=3, label=curve["expert"])
        ax.plot(curve["values"], curve["usage"], color=colour, linestyle=":")
    ax.plot([], [], color=GREY, linestyle=":", label="share of tokens")
    ax.set(xlabel="bias, nats", ylabel="probability", ylim=(-0.03, 1.03), title="Probability of the biased expert")
    ax.legend(frameon=False, fontsize=8)


def _own_change(ax: Axes, report: SteeringReport) -> None:
    for curve, colour in _styled(report):
        own = curve["domains"].index(curve["expert"])
        change, interval = (np.asarray(curve[key], dtype=float)[:, own] for key in ("change", "interval"))
        ax.plot(curve["values"], change, color=colour, marker="o", markersize=3, label=f"{curve['expert']}: own domain")
        ax.fill_between(curve["values"], interval[:, 0], interval[:, 1], color=colour, alpha=0.2, linewidth=0)
        others = np.delete(np.asarray(curve["change"], dtype=float), own, 1)
        ax.plot(curve["values"], np.nanmean(others, 1), color=colour, linestyle="--", linewidth=1)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.plot([], [], color=GREY, linestyle="--", label="mean of the others")
    ax.set(xlabel="bias, nats", ylabel="nats per token", title="Change of log-likelihood")
    ax.legend(frameon=False, fontsize=8)
