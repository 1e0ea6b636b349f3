"""Reproduces the table of goals: every figure from interleaved rounds of one run (README.md).

    python benchmarks/python/run.py [--rows G2,G3] [--official FOLDER --official-python PYTHON]

Results stand in a folder, one file per experiment. A run that was stopped goes on where it was: what the folder holds
from the same commit, machine and settings is not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import machine
import report
import rows_decode
import rows_ffn
import rows_kernels
import rows_llama_cpp
import rows_memory
import rows_prefill
import rows_training
import torch
from experiment import Experiment
from goals import NAMES, Line
from lab import Lab, Options
from paired import ROUNDS

import micro

EXPERIMENTS: list[Experiment] = [
    *rows_kernels.EXPERIMENTS,
    *rows_ffn.EXPERIMENTS,
    *rows_decode.EXPERIMENTS,
    *rows_prefill.EXPERIMENTS,
    *rows_training.EXPERIMENTS,
    *rows_llama_cpp.EXPERIMENTS,
    *rows_memory.EXPERIMENTS,
]
RESULTS = machine.ROOT / "benchmarks" / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help=f"goals to measure, comma-separated, of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that everything runs, measures nothing"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the folder holds")
    parser.add_argument("--list", action="store_true", help="say what would be measured, and stop")
    parser.add_argument("--report", action="store_true", help="only write table and plot of what the folder holds")
    parser.add_argument("--output", type=Path, help="folder (default benchmarks/results/goals, which fills the README)")
    parser.add_argument("--official", type=Path, help="your copy of the official repository")
    parser.add_argument("--official-python", default=sys.executable, help="interpreter with the transformers it needs")
    parser.add_argument("--official-revision", default="r2", choices=["r1", "r2"])
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    wanted = {name for name in options.rows.split(",") if name}
    if unknown := sorted(wanted - set(NAMES)):
        parser.error(f"--rows: {', '.join(unknown)} are no goals; known are {', '.join(NAMES)}")
    options.wanted = wanted
    return options


def settings(options: argparse.Namespace, reference: str) -> dict[str, Any]:
    """What must be equal for a result to count as measured already."""
    return {
        "sources": machine.sources(),
        "cpu": machine.cpu(),
        "instruction_set": micro.build_info()["isa"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "rounds": options.rounds,
        "quick": options.quick,
        "reference": reference,
    }


def is_current(path: Path, keys: set[str], now: dict[str, Any]) -> bool:
    """Whether a file holds a figure of every one of these goals, taken under these settings."""
    lines = json.loads(path.read_text())["lines"] if path.is_file() else []
    return keys <= {line["key"] for line in lines if line["settings"] == now}


def announce(todo: list[Experiment], done: list[Experiment], options: argparse.Namespace, reference: str) -> None:
    print(f"official side: {reference}")
    if done:
        print(f"measured already in this folder: {', '.join(e.name for e in done)} (--again measures anew)")
    scale = options.rounds / ROUNDS
    for experiment in todo:
        minutes = "seconds" if options.quick else f"about {experiment.minutes * scale + 0.3:.1f} min"
        print(f"  {experiment.name:<20} {minutes:<14} {', '.join(experiment.goals)}")
    if todo and not options.quick:
        total = sum(e.minutes * scale + 0.3 for e in todo)
        print(
            f"{len(todo)} experiments, about {total:.0f} minutes on one core of 2022; stop at any time and go on later"
        )
    sys.stdout.flush()


def measure(
    lab: Lab, experiment: Experiment, options: argparse.Namespace, now: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Run one experiment; its lines are printed as they come. Lines of ``path`` that were not asked for stay."""
    lab.start(experiment.name)
    lab.recorded = []
    environment = machine.environment(options.threads, 1 if options.quick else 5)
    lines, skipped = [], []
    for result in experiment.run(lab):
        if isinstance(result, Line):
            lines.append({**report.as_json(result), "settings": now, "environment": environment})
            fast = f", fast {result.fast}" if result.fast else ""
            times = f"{result.ours} / {result.theirs}"
            print(f"{result.key:<20} {result.value}{fast}   {times}   {result.against}; {result.note}")
        else:
            skipped.append({"key": result.key, "why": result.why, "environment": environment})
            print(f"{result.key:<20} not measured: {result.why}")
        sys.stdout.flush()
    new = {line["key"] for line in lines}
    if path.is_file():
        lines += [line for line in json.loads(path.read_text())["lines"] if line["key"] not in new]
    return {
        "experiment": experiment.name,
        "command": f"make bench ROWS={','.join(dict.fromkeys(key.split('/')[0] for key in experiment.goals))}",
        "numerics": "reference; fast beside it",
        "shortest_region_seconds": min((min(t) for r in lab.recorded for t in r.values()), default=None),
        "lines": lines,
        "skipped": skipped,
        "seconds": lab.recorded,
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folder = options.output or (RESULTS / ("quick" if options.quick else "goals"))
    if options.report:
        publish(folder, options)
        return 0
    lab = Lab(
        Options(
            rounds=options.rounds,
            threads=options.threads,
            quick=options.quick,
            official=options.official,
            official_python=options.official_python,
            official_revision=options.official_revision,
            llama_python=options.llama_python,
            wanted=options.wanted,
        )
    )
    now = settings(options, lab.reference_name)
    asked = [e for e in EXPERIMENTS if e.keys(options.wanted)]
    paths = {e.name: folder / f"{e.name}.json" for e in EXPERIMENTS}
    done = [e for e in asked if not options.again and is_current(paths[e.name], e.keys(options.wanted), now)]
    todo = [e for e in asked if e not in done]
    announce(todo, done, options, lab.reference_name)
    failed: list[str] = []
    try:
        for experiment in [] if options.list else todo:
            began = time.monotonic()
            try:
                content = measure(lab, experiment, options, now, paths[experiment.name])
            except Exception as error:
                traceback.print_exc()
                print(f"{experiment.name}: {type(error).__name__}: {error}", file=sys.stderr)
                failed.append(experiment.name)
                continue
            report.write_json(paths[experiment.name], content)
            lab.say(f"done in {(time.monotonic() - began) / 60:.1f} min")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    finally:
        lab.close()
    if not options.list:
        publish(folder, options)
    if failed:
        print(f"failed: {', '.join(failed)}; run {shlex.join(['make', 'bench'])} again after the cause is gone")
    return 1 if failed else 0


def publish(folder: Path, options: argparse.Namespace) -> None:
    """Table and plot of everything that the folder holds; the README only shows real runs of the default folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(report.table(folder) + "\n")
    report.plot(folder, folder / report.PICTURE)
    if folder == RESULTS / "goals" and not options.quick:
        report.fill(machine.ROOT / "benchmarks" / "README.md", folder)
    print(f"table and plot: {folder}")


if __name__ == "__main__":
    sys.exit(main())
