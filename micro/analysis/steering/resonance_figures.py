"""Figures of resonance maps, drawn from stored numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import depth_upward, new_figure
from micro.report.palette import display_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.steering.resonance import ResonanceReport


def resonance_figure(report: ResonanceReport) -> Figure:
    """The map of resonance, and for every switch the map of its effect on A less that on B."""
    maps: list[tuple[str, Any, Any]] = [("Resonance, A - B (dot: family p < 0.05)", report.resonance, report.p_family)]
    effects = {(effect["switch"], effect["set"]): effect for effect in report.effects}
    for switch in dict.fromkeys(effect["switch"] for effect in report.effects):
        for name in "ab":
            effect = effects[switch, name]
            maps.append((f"{switch}: change on {name.upper()} (dot: q < 0.05)", effect["effect"], effect["q"]))
    layers = len(report.resonance)
    figure, axes = new_figure(3.1 * len(maps), max(2.6, 1.2 + 0.28 * layers), len(maps))
    high = max([float(np.abs(values).max()) for _, values, _ in maps[1:]], default=0.0)
    for i, (ax, (title, values, tested)) in enumerate(zip(axes, maps, strict=True)):
        limit = float(np.abs(values).max()) if i == 0 else high
        _map(ax, report, np.asarray(values), np.asarray(tested), max(limit, 1e-9))
        ax.set_title(title, fontsize=9)
    return figure


def _map(ax: Axes, report: ResonanceReport, values: Any, tested: Any, high: float) -> None:
    order = display_order(report.experts)
    image = ax.imshow(values[:, order], cmap="RdBu_r", vmin=-high, vmax=high, aspect="auto")
    found = np.argwhere(tested[:, order] < 0.05)
    ax.scatter(found[:, 1], found[:, 0], s=9, color="black")
    ax.set_xticks(range(len(order)), [report.experts[e] for e in order], rotation=30, fontsize=8)
    ax.set_yticks(range(len(values)), [str(l) for l in range(len(values))])
    depth_upward(ax, len(values))
    ax.set_ylabel("layer")
    ax.spines[:].set_visible(False)
    if ax.figure is not None:
        ax.figure.colorbar(image, ax=ax, shrink=0.8)
