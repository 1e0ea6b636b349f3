"""Figures of router attribution, drawn from stored numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import depth_upward, new_figure
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.steering.attribution import AttributionReport


def attribution_figure(report: AttributionReport) -> Figure:
    """Who decides in each layer, beside random routers; and which cell promotes which later one. Depth grows to the
    right and upward.
    """
    figure, axes = new_figure(15.0, 5.0, 3, width_ratios=[1.0, 1.0, 1.35])
    high = max(float(np.nanmax(np.abs(report.share))), 1e-9)
    for ax, values, title in (
        (axes[0], report.share, "Share of the decision"),
        (axes[1], report.share_random, "The same, random routers"),
    ):
        image = _shares(ax, np.asarray(values, dtype=float), report, high)
        ax.set(title=title, xlabel="layer of the router")
    axes[1].set_yticks([])
    figure.colorbar(image, ax=axes[1], shrink=0.6)
    _entanglement(axes[2], report)
    return figure


def _shares(ax: Axes, share: Any, report: AttributionReport, high: float) -> Any:
    reachable = np.asarray(report.influence) > 0
    image = ax.imshow(np.where(reachable, share, np.nan).T, cmap="RdBu_r", vmin=-high, vmax=high, aspect="auto")
    ax.set_yticks(range(len(report.writers)), report.writers, fontsize=8 if len(report.writers) < 25 else 5)
    ax.set_xticks(range(len(share)), [str(l) for l in range(len(share))])
    depth_upward(ax, len(report.writers))
    ax.spines[:].set_visible(False)
    return image


def _entanglement(ax: Axes, report: AttributionReport) -> None:
    order = display_order(report.experts)
    effect = np.asarray(report.entanglement, dtype=float)[:, order][..., order]
    q = np.asarray(report.entanglement_q, dtype=float)[:, order][..., order]
    layers, experts = effect.shape[:2]
    size = layers * experts
    flat, tested = effect.reshape(size, size), q.reshape(size, size)
    high = max(float(np.nanmax(np.abs(flat))) if np.isfinite(flat).any() else 0.0, 1e-9)
    image = ax.imshow(flat, cmap="RdBu_r", vmin=-high, vmax=high)
    if size <= 64:
        found = np.argwhere(tested < 0.05)
        ax.scatter(found[:, 1], found[:, 0], s=4, color="black", label="q < 0.05")
    for edge in range(experts, size, experts):
        ax.axhline(edge - 0.5, color="white", linewidth=1)
        ax.axvline(edge - 0.5, color="white", linewidth=1)
    middle = [layer * experts + (experts - 1) / 2 for layer in range(layers)]
    ax.set_xticks(middle, [str(l) for l in range(layers)])
    ax.set_yticks(middle, [str(l) for l in range(layers)])
    colours = expert_colours(report.experts)
    for place in range(size):
        colour = colours[order[place % experts]]
        ax.plot([place - 0.5, place + 0.5], [-0.8, -0.8], color=colour, linewidth=4, clip_on=False)
        ax.plot([-0.8, -0.8], [place - 0.5, place + 0.5], color=colour, linewidth=4, clip_on=False)
    ax.set(xlim=(-0.5, size - 0.5))
    depth_upward(ax, size)
    ax.tick_params(axis="x", pad=7, length=0)
    ax.tick_params(axis="y", pad=12, length=0)
    ax.spines[:].set_visible(False)
    ax.set(
        xlabel="promoted cell, by layer",
        ylabel="chosen cell, by layer",
        title="Who leads to whom: change of logit (dot: q < 0.05)",
    )
    if ax.figure is not None:
        ax.figure.colorbar(image, ax=ax, shrink=0.6)
