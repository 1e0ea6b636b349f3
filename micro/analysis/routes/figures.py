"""Figures of routing: layers, groups, flow, agreement, similarity, selectivity. Drawn from saved numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, RED, depth_upward, heat_map, new_figure, whole_numbers
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.routes.agreement_report import AgreementReport
    from micro.analysis.routes.report import RoutingReport
    from micro.analysis.routes.selectivity_report import SelectivityReport
    from micro.analysis.routes.similarity_report import SimilarityReport

MOST_GROUPS = 12  # bars that fit into a figure; the table holds all


def floats(values: Any) -> Any:
    """An array of saved numbers, None as NaN."""
    return np.asarray(values, dtype=np.float64)


def _line(ax: Axes, values: Any, interval: Any, **style: Any) -> None:
    """A curve over layers in its interval."""
    whole_numbers(ax.xaxis)
    x, y, bounds = np.arange(len(values)), floats(values), floats(interval)
    ax.fill_between(x, bounds[:, 0], bounds[:, 1], color=style["color"], alpha=0.18, linewidth=0)
    ax.plot(x, y, linewidth=1.6, marker="o", markersize=3, **style)


def _legend(ax: Axes, columns: int = 4) -> None:
    ax.legend(frameon=False, fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def layers_figure(report: RoutingReport) -> Figure:
    """Usage per layer with intervals; entropies and mutual information; load variation."""
    figure, (usage, information, load) = new_figure(14.4, 4.2, 3)
    values, bounds = floats(report.usage_by_layer), floats(report.usage_by_layer_interval)
    colours = expert_colours(report.experts)
    for e in display_order(report.experts):
        _line(usage, values[:, e], bounds[:, e], color=colours[e], label=report.experts[e])
    usage.axhline(1 / len(report.experts), color=RED, linewidth=1, label="chance")
    _shade_excluded(usage, report)
    usage.set(xlabel="layer", ylabel="share of slots", ylim=(0, 1), title="Usage (grey: not in the summary)")
    _legend(usage, 3)
    for name, line, colour in (
        ("usage entropy", "usage_entropy", "#202124"),
        ("decision entropy", "decision_entropy", "#1a73e8"),
        ("mutual information", "mutual_information", "#188038"),
    ):
        _line(information, getattr(report, line), getattr(report, f"{line}_interval"), color=colour, label=name)
    information.axhline(np.log(len(report.experts)), color=GREY, linewidth=1, linestyle="--", label="log E")
    information.set(xlabel="layer", ylabel="nats", title="Entropy and information")
    information.set_ylim(bottom=0)
    _legend(information, 2)
    _line(load, report.load_variation, report.load_variation_interval, color="#202124")
    limit = np.sqrt(len(report.experts) - 1)
    load.axhline(limit, color=GREY, linewidth=1, linestyle="--", label="all on one expert (K = 1)")
    dead = sorted({layer for layer, _ in report.dead_cells})
    if dead:
        load.plot(dead, [0.0] * len(dead), "x", color=RED, label="layer with a dead expert", clip_on=False)
    load.set(xlabel="layer", ylabel="coefficient of variation", title="Load over experts")
    load.set_ylim(0, 1.08 * limit if limit else 1)
    _legend(load, 1)
    return figure


def _shade_excluded(ax: Axes, report: RoutingReport) -> None:
    for layer in range(len(report.usage_by_layer)):
        if layer not in report.layers_counted:
            ax.axvspan(layer - 0.5, layer + 0.5, color="#f1f3f4", linewidth=0, zorder=0)


def groups_figure(report: RoutingReport) -> Figure:
    """Grouped bars of usage for each group and each label, with intervals and the chance line."""
    largest = sorted(report.by_group, key=lambda g: -g["samples"])[:MOST_GROUPS]
    groups = [g for g in report.by_group if g in largest]
    title = "Usage by group" if len(groups) == len(report.by_group) else f"Usage, the {MOST_GROUPS} largest groups"
    panels = [(t, g) for t, g in ((title, groups), ("Usage by label", report.by_label)) if g]
    if not panels:
        raise ValueError("groups_figure: the report has neither groups nor labels")
    widths = [1.2 + 1.2 * max(len(g), 2) for _, g in panels]
    figure, axes = new_figure(sum(widths) + 1.4, 3.8, len(panels), sharey=True, width_ratios=widths)
    for ax, (title, groups) in zip(axes, panels, strict=True):
        _bars(ax, groups, report.experts)
        ax.set(title=title)
    axes[0].set(ylabel="share of slots", ylim=(0, 1))
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _bars(ax: Axes, groups: list[dict[str, Any]], experts: list[str]) -> None:
    colours, order = expert_colours(experts), display_order(experts)
    width = 0.8 / len(order)
    for i, e in enumerate(order):
        x = np.arange(len(groups)) + (i - (len(order) - 1) / 2) * width
        y = floats([g["usage"][e] for g in groups])
        bounds = floats([g["interval"][e] for g in groups])
        error = np.clip([y - bounds[:, 0], bounds[:, 1] - y], 0, None)
        ax.bar(x, y, width=0.92 * width, color=colours[e], label=experts[e])
        ax.errorbar(x, y, yerr=error, fmt="none", ecolor="#202124", elinewidth=0.9, capsize=2)
    ax.axhline(1 / len(experts), color=RED, linewidth=1, label="chance")
    ax.set_xticks(range(len(groups)), [f"{_short(g['name'])}\nn = {g['samples']}" for g in groups], fontsize=8)


def layer_maps_figure(report: RoutingReport) -> Figure:
    """Layer x expert, a panel for each label (without labels: each group), on one scale."""
    groups = report.by_label or sorted(report.by_group, key=lambda g: -g["samples"])[:MOST_GROUPS]
    if not groups:
        raise ValueError("layer_maps_figure: the report has neither groups nor labels")
    order, layers = display_order(report.experts), len(report.usage_by_layer)
    size = 0.6 + 0.75 * len(order)
    figure, axes = new_figure(1.0 + size * len(groups), 1.6 + 0.2 * layers, len(groups), sharey=True)
    names = [report.experts[e] for e in order]
    for ax, group in zip(axes, groups, strict=True):
        heat_map(ax, floats(group["by_layer"])[:, order], [str(l) for l in range(layers)], names, size=7)
        depth_upward(ax, layers)
        ax.set_title(_short(group["name"]), fontsize=10)
        ax.set(ylabel="layer" if ax is axes[0] else None)
    return figure


def _short(name: str, most: int = 16) -> str:
    """A name that fits under its bars."""
    line = " ".join(name.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def flow_figure(report: RoutingReport) -> Figure:
    """Layer x layer: share of slots with the same first choice, above chance; expert to expert, mean over layers."""
    figure, (left, right) = new_figure(9.6, 4.0, 2)
    above = floats(report.together) - floats(report.together_chance)
    np.fill_diagonal(above, np.nan)  # a layer with itself
    limit = max(float(np.nanmax(np.abs(above))) if above.size > 1 else 0.0, 1e-9)
    image = left.imshow(above, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=left, shrink=0.8)
    left.set(xlabel="layer", ylabel="layer", title="Same expert in both layers, above chance")
    whole_numbers(left.xaxis)
    whole_numbers(left.yaxis)
    depth_upward(left, len(above))
    order = display_order(report.experts)
    joint = floats(report.transitions).mean(0) if report.transitions else np.zeros((len(order), len(order)))
    rows = joint / np.maximum(joint.sum(1, keepdims=True), 1e-12)
    heat_map(right, rows[np.ix_(order, order)], [report.experts[e] for e in order], [report.experts[e] for e in order])
    right.set(xlabel="expert in the next layer", ylabel="expert", title="Where an expert's slots go next")
    return figure


def agreement_figure(report: AgreementReport) -> Figure:
    """Kappa of each pair per layer, with the nulls dashed; and kappa of all pairs as a matrix."""
    figure, (lines, matrix) = new_figure(11.0, 4.0, 2, width_ratios=[1.5, 1])
    shades = [str(v) for v in np.linspace(0.0, 0.6, max(len(report.pairs), 1))]
    for entry, shade in zip(report.pairs, shades, strict=False):
        label = f"{entry['first']}, {entry['second']}"
        _line(lines, entry["kappa_by_layer"], entry["kappa_by_layer_interval"], color=shade, label=label)
    for entry, colour in zip(report.nulls, (RED, "#E69F00"), strict=False):
        label = f"null: {entry['second']}"
        _line(
            lines, entry["kappa_by_layer"], entry["kappa_by_layer_interval"], color=colour, label=label, linestyle="--"
        )
    lines.axhline(0, color=GREY, linewidth=0.8)
    lines.set(xlabel="layer", ylabel="Cohen's κ", title="Agreement of first choices, beyond chance")
    lines.set_ylim(top=1.02)
    _legend(lines, 2)
    names = report.checkpoints
    values = np.eye(len(names))
    for entry in report.pairs:
        i, j = names.index(entry["first"]), names.index(entry["second"])
        values[i, j] = values[j, i] = np.nan if entry["kappa"] is None else entry["kappa"]
    heat_map(matrix, values, names, names, signed=True)
    matrix.set(title="κ, all layers")
    return figure


def similarity_figure(report: SimilarityReport) -> Figure:
    """Mean cosine of the outputs of two experts per layer; an expert with itself in grey, as the ceiling."""
    figure, (ax,) = new_figure(7.2, 4.2)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
    own = [i for i, (first, second) in enumerate(report.pairs) if first == second]
    for number, i in enumerate(i for i in range(len(report.pairs)) if i not in own):
        label = ", ".join(report.pairs[i])
        _line(ax, report.by_layer[i], report.by_layer_interval[i], color=colours[number % len(colours)], label=label)
    for number, i in enumerate(own):
        named = {"label": "an expert with itself"} if number == 0 else {}
        ax.plot(floats(report.by_layer[i]), color="#9aa0a6", linewidth=1, linestyle="--", **named)
    ax.set(xlabel="layer", ylabel="mean cosine", title="Outputs of two experts on the same sentences")
    _legend(ax, 3)
    return figure


def selectivity_figure(report: SelectivityReport, measure: str = "share") -> Figure:
    """Correlation of each expert with each rating (star: Holm p at most 0.05), and the strongest pair's sentences."""
    figure, (matrix, points) = new_figure(3.6 + 1.3 * len(report.ratings) + 4.4, 3.8, 2)
    order = display_order(report.experts)
    r = floats(report.correlation[measure])
    p = floats(report.p_holm[measure])
    names = [report.experts[e] for e in order]
    heat_map(matrix, r[order], names, report.ratings, signed=True, starred=p[order] <= 0.05)
    matrix.set(title=f"Pearson's r, {measure}s")
    if np.isnan(r).all():
        return figure
    e, k = divmod(int(np.nanargmax(np.abs(r))), r.shape[1])
    x, y = floats([row[k] for row in report.rated]), floats(report.values[measure])[:, e]
    points.plot(x, y, "o", color=expert_colours(report.experts)[e], markersize=4, alpha=0.75)
    low, high = floats(report.interval[measure][e][k])
    points.set(xlabel=f"mean rating: {report.ratings[k]}", ylabel=f"{measure} of {report.experts[e]}")
    points.set_title(f"strongest of {r.size} pairs: r = {r[e, k]:.2f} [{low:.2f}, {high:.2f}]", fontsize=10)
    return figure
