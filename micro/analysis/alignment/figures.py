"""Figures of alignment, drawn from saved numbers only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.figures import GREY, RED, heat_map, new_figure, whole_numbers
from micro.experts import NAMES
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from micro.analysis.alignment.result import AlignmentResult, ReadingTimesResult

STYLES = ("-", "--", ":", "-.")


def alignment_figure(result: AlignmentResult) -> Figure:
    """Scores over layers (or bars, where sets are no layers) and self-test; below, networks and contrasts."""
    by_layer = all(s["layer"] is not None for s in result.sets) and len({s["layer"] for s in result.sets}) > 1
    below = [panel for panel, rows in ((_networks, result.networks), (_contrasts, result.contrasts)) if rows]
    first = 4.2 if by_layer else max(3.4, 1.4 + 0.24 * len(result.sets))
    groups = len({row["group"] for row in result.networks})
    second = max(2.2, 1.3 + 0.27 * max(groups, len(result.contrasts))) if below else 0.0
    heights = [first, second] if below else [first]
    figure, axes = new_figure(11.0, sum(heights), 2, rows=len(heights), height_ratios=heights, width_ratios=[1.3, 1])
    (_layers if by_layer else _bars)(axes[0], result)
    _self_test(axes[1], result)
    for ax in axes[2 + len(below) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes[2:], below, strict=False):
        panel(ax, result)
    return figure


def _layers(ax: Axes, result: AlignmentResult) -> None:
    """One line per model and expert with its interval; the shaded band is what shuffled responses give."""
    lines: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for entry in result.sets:
        lines.setdefault((entry["model"], entry["expert"]), []).append(entry)
    models = list(dict.fromkeys(model for model, _ in lines))
    colours = _colours([expert for _, expert in lines])
    for model, expert in _ordered(list(lines)):
        entries = sorted(lines[model, expert], key=lambda entry: entry["layer"])
        x = [entry["layer"] for entry in entries]
        low, high = np.transpose([entry["interval"] for entry in entries])
        name = " ".join(part for part in (model if len(models) > 1 else "", expert or "") if part)
        style = STYLES[models.index(model) % len(STYLES)]
        scores = [entry["score"] for entry in entries]
        ax.plot(x, scores, style, marker="o", markersize=3, color=colours[expert], label=name or model)
        ax.fill_between(x, low, high, color=colours[expert], alpha=0.15, linewidth=0)
    layers = sorted({entry["layer"] for entry in result.sets})
    null = [max(e["null_95"] for e in result.sets if e["layer"] == layer) for layer in layers]
    ax.plot(layers, null, color=GREY, linewidth=1, linestyle=(0, (1, 2)), label="shuffled responses, 95 %")
    _ceiling(ax, result, vertical=False)
    ax.set(xlabel="layer", ylabel="held-out Pearson r, median of voxels", title="Encoding score, 95 % intervals")
    whole_numbers(ax.xaxis)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False, fontsize=8)


def _bars(ax: Axes, result: AlignmentResult) -> None:
    colours = _colours([entry["expert"] for entry in result.sets])
    for y, entry in enumerate(result.sets):
        ax.barh(y, entry["score"], color=colours[entry["expert"]], height=0.66)
        ax.plot(entry["interval"], [y, y], color="black", linewidth=1.2)
        ax.plot([entry["null_95"]] * 2, [y - 0.4, y + 0.4], color=GREY, linewidth=1.4, linestyle=(0, (1, 1)))
    ax.set_yticks(range(len(result.sets)), [entry["name"] for entry in result.sets])
    ax.invert_yaxis()
    ax.axvline(0, color=GREY, linewidth=1)
    _ceiling(ax, result, vertical=True)
    ax.set(xlabel="held-out Pearson r, median of voxels", title="Encoding score; dotted: shuffled, 95 %")


def _ceiling(ax: Axes, result: AlignmentResult, *, vertical: bool) -> None:
    if result.ceiling is not None:
        line = ax.axvline if vertical else ax.axhline
        line(result.ceiling, color="black", linewidth=1, linestyle="--", label="noise ceiling")


def _networks(ax: Axes, result: AlignmentResult) -> None:
    """Heat map: groups of sets by networks of voxels."""
    experts = {(row["model"], row["expert"]): row["group"] for row in result.networks}
    groups = [experts[line] for line in _ordered(list(experts), by_model=True)]
    networks = list(dict.fromkeys(row["network"] for row in result.networks))
    values = np.zeros((len(groups), len(networks)))
    for row in result.networks:
        values[groups.index(row["group"]), networks.index(row["network"])] = row["score"]
    bound = max(float(np.abs(values).max()), 1e-9)
    heat_map(ax, values, groups, networks, limit=bound, signed=True)
    ax.set(title="Mean over layers, by network")


def _contrasts(ax: Axes, result: AlignmentResult) -> None:
    """Differences of groups with their intervals; filled where the corrected p is below 0.05."""
    for y, row in enumerate(result.contrasts):
        ax.plot(row["interval"], [y, y], color="black", linewidth=1.2)
        face = "black" if row["p_holm"] < 0.05 else "white"
        ax.plot(row["difference"], y, "o", markersize=5, markerfacecolor=face, markeredgecolor="black")
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(range(len(result.contrasts)), [f"{row['first']} - {row['second']}" for row in result.contrasts])
    ax.tick_params(axis="y", labelsize=7.5)
    ax.set_ylim(len(result.contrasts) - 0.5, -0.5)
    ax.set(xlabel="difference of r", title="Contrasts; filled: p < 0.05 (Holm)")


def _self_test(ax: Axes, result: AlignmentResult) -> None:
    """Score of a known layer against the best other one, when the responses are its own noisy units."""
    markers = dict(zip(("ridge", "rsa", "topological_rsa", "cka"), "osD^", strict=True))
    for i, (metric, rows) in enumerate(result.self_test.items()):
        first = sum(row["rank"] == 1 for row in rows)
        x = [row["next"] if row["next"] is not None else 0.0 for row in rows]
        ax.scatter(
            x,
            [row["own"] for row in rows],
            s=26,
            marker=markers.get(metric, "o"),
            facecolor=[("#188038" if row["rank"] == 1 else RED) for row in rows],
            edgecolor="white",
            linewidth=0.5,
            label=f"{metric.replace('_', ' ')}: {first} of {len(rows)} first",
            zorder=3 - 0.1 * i,
        )
    low, high = ax.get_xlim()[0], max(ax.get_xlim()[1], ax.get_ylim()[1])
    ax.plot([low, high], [low, high], color=GREY, linewidth=1)
    ax.set(xlabel="best other set", ylabel="known layer", title="Self-test: green = found")
    legend = ax.legend(frameon=False, fontsize=8, loc="lower right")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(facecolor=GREY)


def _colours(experts: list[str | None]) -> dict[str | None, str]:
    """Palette of the experts; black for sets that belong to none."""
    names = [e for e in dict.fromkeys(experts) if e is not None]
    known = dict(zip(NAMES, expert_colours(NAMES), strict=True))
    others = expert_colours([str(i) for i in range(len(names))])
    return {None: "black"} | {e: known.get(e, others[i]) for i, e in enumerate(names)}


def _ordered(lines: list[tuple[str, str | None]], *, by_model: bool = False) -> list[tuple[str, str | None]]:
    """Experts in display order, models in the order given; ``by_model``: all experts of a model together."""
    rank = {NAMES[e]: i for i, e in enumerate(display_order(NAMES))}
    models = list(dict.fromkeys(model for model, _ in lines))

    def place(line: tuple[str, str | None]) -> tuple[int, int]:
        model, expert = models.index(line[0]), rank.get(line[1] or "", -1)
        return (model, expert) if by_model else (expert, model)

    return sorted(lines, key=place)


def reading_times_figure(result: ReadingTimesResult) -> Figure:
    """Held-out gain per word of each surprisal, with its interval and its null."""
    figure, axes = new_figure(6.4, 1.5 + 0.42 * len(result.models))
    ax = axes[0]
    for y, model in enumerate(result.models):
        ax.plot(model["interval"], [y, y], color="black", linewidth=1.4)
        ax.plot(model["gain_held_out"], y, "o", color="black")
        ax.plot([model["null_95"]] * 2, [y - 0.3, y + 0.3], color=RED, linewidth=1.4)
    ax.axvline(0, color=GREY, linewidth=1)
    ax.set_yticks(range(len(result.models)), [model["name"] for model in result.models])
    ax.set_ylim(len(result.models) - 0.5, -0.5)
    ax.set(xlabel="held-out gain in log-likelihood, nats per word", title="Surprisal beyond length and frequency")
    ax.text(0.99, 0.02, "red: 95 % of shuffled surprisal", transform=ax.transAxes, ha="right", fontsize=8, color=GREY)
    return figure
