"""Results as files: JSON per experiment, the table of README.md, a plot."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from goals import BY_KEY, GOALS, Line

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PICTURE = "goals.png"
COLOURS = {"target": "#1b7837", "floor": "#7fbf7b", "missed": "#d95f02", "": "#888888"}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Beside and renamed: what is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def as_json(line: Line) -> dict[str, Any]:
    goal = BY_KEY[line.key]
    fields = asdict(line)
    return {"goal": asdict(goal), "reached": goal.reached(line.value.median), **fields}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """By goal: its line, with settings and environment. Goals that were skipped have "why"."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for line in content["lines"]:
            found[line["key"]] = line
        for skipped in content["skipped"]:
            found.setdefault(skipped["key"], skipped)
    return found


# ---- table -----------------------------------------------------------------------------------------------------------


def table(folder: Path) -> str:
    """The measured goals as Markdown, in the order of the goals."""
    found = read(folder)
    lines = [
        "| | what | floor | target | measured | fast numerics | ours / theirs | against |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(found[goal.key]) for goal in GOALS if goal.key in found),
    ]
    return "\n".join([*_machine(found), "", *lines])


def _row(line: dict[str, Any]) -> str:
    goal = BY_KEY[line["key"]]
    sign = "" if goal.better == "higher" else "<= "
    floor, target = ("" if x is None else f"{sign}{x:g}" for x in (goal.floor, goal.target))
    start = f"| {goal.name} | {goal.what} | {floor} | {target} |"
    if "why" in line:
        return f"{start} not measured: {line['why']} | | | |"
    fast = "" if line["fast"] is None else _ratio(line["fast"])
    note = f"; {line['note']}" if line["note"] else ""
    value = _ratio(line["value"])
    value = f"**{value}**" if line["reached"] == "target" else value
    missed = " (floor missed)" if line["reached"] == "missed" else ""
    return f"{start} {value}{missed} | {fast} | {line['ours']} / {line['theirs']} | {line['against']}{note} |"


def _ratio(ratio: dict[str, float]) -> str:
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _machine(found: dict[str, dict[str, Any]]) -> list[str]:
    """The environment in a sentence or two; probes and load as ranges over the experiments."""
    every = [line["environment"] for line in found.values()]
    if not every:
        return ["Nothing was measured yet."]
    last = max(every, key=lambda e: e["date"])

    def span(values: list[float]) -> str:
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g} - {high:g}"

    probes = {name: span([e["probes"][name] for e in every]) for name in last["probes"] if name != "threads"}
    loads = span([e["load_average"][0] for e in every])
    commits = ", ".join(sorted({e["commit"] for e in every}))
    return [
        f"{last['date'].split()[0]}, {last['cpu']}, {last['cores']} cores, {last['instruction_set']}; "
        f"{last['threads']} thread; torch {last['torch']}, transformers {last['versions']['transformers']}; commit "
        f"{commits}. Load average {loads}. Probes of the runs: BF16 {probes['bfloat16_gflops']} GFLOP/s, fp32 "
        f"{probes['float32_gflops']} GFLOP/s, stream read {probes['stream_read_gb_per_s']} GB/s, memcpy "
        f"{probes['memory_copy_gb_per_s']} GB/s. Medians [extremes]; bold: target reached.",
    ]


def fill(readme: Path, folder: Path) -> None:
    """Put the table between the markers of a Markdown file."""
    text = readme.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} lacks the markers {BEGIN} and {END}")
    picture = f"![times the floor](results/{folder.name}/{PICTURE})"
    readme.write_text(f"{before}{BEGIN}\n{table(folder)}\n\n{picture}\n{END}{after}")


# ---- plot ------------------------------------------------------------------------------------------------------------


def plot(folder: Path, path: Path) -> None:
    """A bar per goal, as a multiple of its floor in the good direction; a mark at the target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    found = read(folder)
    goals = [g for g in GOALS if g.floor is not None and "value" in found.get(g.key, {})][::-1]
    figure, axes = pyplot.subplots(figsize=(11, 1.4 + 0.3 * len(goals)), layout="constrained")
    most = 3.0
    for y, goal in enumerate(goals):
        assert goal.floor is not None and goal.target is not None
        value = found[goal.key]["value"]

        def share(x: float, goal: Any = goal) -> float:
            return float(x / goal.floor if goal.better == "higher" else goal.floor / x)

        bar = min(share(value["median"]), most)
        axes.barh(y, bar, height=0.7, color=COLOURS[goal.reached(value["median"])])
        ends = sorted(min(share(value[end]), most) for end in ("low", "high"))
        axes.plot(ends, [y, y], color="black", linewidth=1)
        axes.plot([share(goal.target)] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2)
        sign = "" if goal.better == "higher" else "<= "
        beyond = "\u00bb " if share(value["median"]) > most else ""  # the bar is cut off
        text = f"{beyond}{value['median']:.2f}   (floor {sign}{goal.floor:g}, target {sign}{goal.target:g})"
        axes.text(max(ends[1], share(goal.target), bar) + 0.03, y, text, va="center", fontsize=8)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(goals)), [f"{g.name}  {g.what}" for g in goals], fontsize=8)
    axes.set_xlim(0, most + 0.9)
    axes.set_ylim(-0.7, len(goals) - 0.3)
    axes.set_xlabel("times the floor (dashed); thick mark: target; thin line: extremes")
    names = {"target": "target reached", "floor": "floor reached", "missed": "floor missed"}
    handles = [Patch(color=COLOURS[kind]) for kind in names]
    axes.legend(handles, names.values(), loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
