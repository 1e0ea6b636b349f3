"""The pictures that matter, drawn from the runs' files and the verdicts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.replication import estimates as st
from benchmarks.replication.estimates import Table
from benchmarks.replication.plan import ARMS
from micro.analysis.figures import GREY, new_figure
from micro.experts import NAMES
from micro.report.palette import display_order, expert_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.replication.verdict import Verdicts

TITLES = {arm.name: arm.title for arm in ARMS}
VERDICT_COLOURS = {"supported": "#0072B2", "not supported": "#D55E00", "inconclusive": "#7F7F7F"}


def _ones(table: Table) -> st.Array:
    return np.ones((1, len(table.seeds), len(table.tokens)))


def routing_figure(arms: dict[str, Table]) -> Figure:
    """Routing accuracy on held-out templates: every arm by seed, and by layer with a line per domain for MiCRo."""
    figure, (left, right) = new_figure(10, 3.8, 2)
    names = [name for name in TITLES if name in arms and arms[name].routed is not None]
    for y, name in enumerate(names):
        table = arms[name]
        matched = name != "micro" and name != "micro_moe" and name != "straight_through"
        by_seed = [float(st.accuracy(table.of([s]), matched=matched)(_ones(table.of([s])))[0]) for s in table.seeds]
        left.plot(by_seed, [y] * len(by_seed), "o", color=GREY, alpha=0.6, markersize=5)
        left.plot([np.mean(by_seed)] * 2, [y - 0.25, y + 0.25], color="#000000", linewidth=2)
    left.axvline(0.25, color=GREY, linestyle=":", linewidth=1)
    left.set(yticks=range(len(names)), yticklabels=[TITLES[n] for n in names], xlim=(0, 1), xlabel="routing accuracy")
    left.set_title("Held-out templates; dots are seeds, dotted line is chance", fontsize=10)
    left.invert_yaxis()
    _layers_panel(right, arms["micro"])
    return figure


def _layers_panel(ax: Axes, table: Table) -> None:
    assert table.routed is not None
    total = table.routed.sum(0)  # [I,L,E]
    colours = expert_colours(NAMES)
    for d in display_order(NAMES):
        counts = total[table.domain == d].sum(0)  # [L,E]
        ax.plot(counts[:, d] / counts.sum(-1), "o-", color=colours[d], label=NAMES[d], markersize=4)
    ax.axhline(0.25, color=GREY, linestyle=":", linewidth=1)
    ax.set(ylim=(0, 1), xlabel="layer", ylabel="share to the labelled expert")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_title("MiCRo, by layer and domain", fontsize=10)
    ax.legend(frameon=False, fontsize=8, ncols=2)


def ablation_figure(arms: dict[str, Table]) -> Figure:
    """Relative loss rise of each domain (rows) when each expert (columns) is ablated: MiCRo and its control."""
    names = [name for name in ("micro", "random", "mob") if name in arms]
    figure, axes = new_figure(3.3 * len(names) + 0.8, 3.4, len(names))
    order = display_order(NAMES)
    rises = {name: 100 * st.rises(_ones(arms[name]), arms[name])[0] for name in names}
    limit = max(1e-9, *(float(np.abs(rise).max()) for rise in rises.values()))
    image = None
    for ax, name in zip(axes, names, strict=True):
        shown = rises[name][np.ix_(order, order)]
        image = ax.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
        for (r, c), value in np.ndenumerate(shown):
            strong = abs(value) > 0.6 * limit
            ax.text(c, r, f"{value:+.1f}", ha="center", va="center", fontsize=9, color="white" if strong else "black")
        labels = [NAMES[e] for e in order]
        ax.set_xticks(range(4), labels, rotation=30, ha="right")
        ax.set_yticks(range(4), labels)
        ax.set_xlabel("ablated expert")
        ax.set_title(TITLES[name], fontsize=10)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("domain of the held-out answer")
    figure.colorbar(image, ax=list(axes), label="loss rise, %", shrink=0.8)
    return figure


def claims_figure(verdicts: Verdicts) -> Figure:
    """Each part of each claim: estimate, interval and what it had to reach, in units of its own threshold's scale."""
    parts = [(claim, part) for claim in verdicts.claims for part in claim.parts]
    figure, axes = new_figure(9, 0.42 * max(4, len(parts)) + 1.2)
    ax = axes[0]
    for y, (_, part) in enumerate(parts):
        scale = max(abs(part.value), abs(part.low), abs(part.high), abs(part.smallest), 1e-9)
        colour = VERDICT_COLOURS[part.verdict]
        ax.plot([part.low / scale, part.high / scale], [y, y], color=colour, linewidth=2.5)
        ax.plot(part.value / scale, y, "o", color=colour, markersize=6)
        ax.plot([part.smallest / scale] * 2, [y - 0.3, y + 0.3], color="#000000", linewidth=1.2)
        text = f"{part.value:.3g} [{part.low:.3g}, {part.high:.3g}]  needs {part.smallest:g}"
        ax.text(1.06, y, text, fontsize=8, va="center", color=GREY)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set(xlim=(-1.05, 1.05), xticks=[], yticks=range(len(parts)), ylim=(len(parts) - 0.5, -0.5))
    ax.set_yticklabels([f"{claim.claim}: {part.name}" for claim, part in parts])
    ax.set_title(f"{verdicts.setup}: estimates, 95 % intervals, thresholds (bars); each row has its scale", fontsize=10)
    handles = [ax.plot([], [], "o-", color=c, label=v)[0] for v, c in VERDICT_COLOURS.items()]
    ax.legend(handles=handles, frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.02))
    return figure


def draw(arms: dict[str, Table], verdicts: Verdicts, folder: Path, prefix: str = "") -> list[Path]:
    """Write the three PNGs, as far as the runs for them are there."""
    made: list[tuple[str, Any]] = [("claims", verdicts.plot())]
    if "micro" in arms:
        made += [("routing", routing_figure(arms)), ("ablation", ablation_figure(arms))]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in made:
        path = folder / f"{prefix}{name}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight")
        paths.append(path)
    return paths
