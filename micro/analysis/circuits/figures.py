"""Figures of patching, removal, head gating and self-repair, from stored numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.circuits.components import Component
from micro.analysis.figures import GREY, depth_upward, new_figure, whole_numbers
from micro.report.palette import display_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.circuits.gating import GatingResult
    from micro.analysis.circuits.patching import PatchingResult
    from micro.analysis.circuits.removal import RemovalResult
    from micro.analysis.circuits.repair import RepairResult


def signed_map(ax: Axes, values: np.ndarray[Any, Any], xlabel: str, ylabel: str, limit: float | None = None) -> Any:
    """A matrix in a diverging scale around 0, first row at the bottom; NaN stays grey."""
    finite = np.abs(values[np.isfinite(values)])
    limit = limit or float(finite.max() if finite.size else 1.0) or 1.0
    ax.set_facecolor("#e8eaed")
    image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    depth_upward(ax, len(values))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    whole_numbers(ax.yaxis)
    return image


def patching_figure(result: PatchingResult) -> Figure:
    """Effect per layer and expert (or head, or slot), and the screen against the effect."""
    parts = [Component(**part) for part in result.components]
    effect = np.asarray(result.effect).mean(1)
    figure, axes = new_figure(9.5, 4.2, 2)
    columns = {part: _column(part, result.experts) for part in parts}
    names = sorted(set(columns.values()), key=lambda c: c[0])
    grid = np.full((max(p.layer for p in parts) + 1, len(names)), np.nan)
    for part, value in zip(parts, effect, strict=True):
        grid[part.layer, names.index(columns[part])] = value
    image = signed_map(axes[0], grid, "", "layer")
    step = max(1, len(names) // 12)
    axes[0].set_xticks(range(0, len(names), step), [name for _, name in names[::step]], rotation=45, ha="right")
    axes[0].set_title(f"Effect of patching, {result.settings.get('point', '')}", fontsize=10)
    figure.colorbar(image, ax=axes[0], label="share of the difference carried")
    screen = np.asarray(result.screen).mean(1)
    axes[1].axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    axes[1].scatter(screen, effect, s=12, color="#4285F4", alpha=0.7)
    axes[1].set(xlabel="first-order estimate", ylabel="effect", title="Screen against effect")
    return figure


def _column(part: Component, experts: list[str]) -> tuple[tuple[int, int, int], str]:
    expert = -1 if part.expert is None else display_order(experts).index(part.expert)
    name = "" if part.expert is None else experts[part.expert]
    if part.head is not None:
        name = f"{name} {part.head}".strip()
    if part.slot is not None:
        name = f"{part.slot}"
    return (expert, -1 if part.head is None else part.head, -1 if part.slot is None else part.slot), name or "all"


def removal_figure(result: RemovalResult) -> Figure:
    """Change of every task's score under the removal of each component."""
    change = np.asarray(result.change)
    figure, (ax,) = new_figure(7, max(3.0, 0.16 * len(change) + 1.4))
    image = signed_map(ax, change, "task", "")
    ax.set_xticks(range(len(result.tasks)), result.tasks)
    step = max(1, len(change) // 40)
    labels = [Component(**part).label(result.experts) for part in result.components]
    ax.set_yticks(range(0, len(labels), step), labels[::step], fontsize=7)
    ax.set_title(f"Change of score, {result.settings.get('how', '')} ablation", fontsize=10)
    figure.colorbar(image, ax=ax)
    return figure


def gating_figure(result: GatingResult) -> Figure:
    """The three scores of every head: layers up, heads across, experts side by side."""
    scores = result.scores()
    shape = next(iter(scores.values())).shape
    order = display_order(result.experts) if shape[1] > 1 else [0]
    figure, axes = new_figure(11, 3.6, 3, sharey=True)
    for ax, (name, values) in zip(axes, scores.items(), strict=True):
        flat = np.concatenate([values[:, e] for e in order], -1)
        image = ax.imshow(flat, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        depth_upward(ax, len(flat))
        ax.set(
            title=name, xlabel="heads of " + (", ".join(result.experts[e] for e in order) if len(order) > 1 else "all")
        )
        for edge in range(1, len(order)):
            ax.axvline(edge * shape[2] - 0.5, color="white", linewidth=1.5)
        ax.set_xticks([])
    axes[0].set_ylabel("layer")
    whole_numbers(axes[0].yaxis)
    figure.colorbar(image, ax=list(axes), label="score")
    return figure


def repair_figure(result: RepairResult) -> Figure:
    """Direct effect and what is missing in the end, layer by layer."""
    parts = list(result.direct)
    layers = result.settings["layers"]
    figure, axes = new_figure(5.2 * len(parts), 3.6, len(parts), sharey=True)
    series = [
        ("direct", "-", "#4285F4", result.direct),
        ("total, routes replayed", "--", "#A64D79", result.total_replayed),
        ("total, routes free", ":", "#FFAB40", result.total_free),
    ]
    for ax, part in zip(axes, parts, strict=True):
        for label, style, colour, values in series:
            ax.plot(layers, values[part], style, marker="o", markersize=3, label=label, color=colour)
        ax.axhline(0, color=GREY, linewidth=0.8)
        whole_numbers(ax.xaxis)
        ax.set(xlabel="layer removed", title=f"{part}: lost logit of the target")
    axes[0].set_ylabel("centred logit, frozen norm")
    axes[0].legend(frameon=False, fontsize=8)
    return figure
