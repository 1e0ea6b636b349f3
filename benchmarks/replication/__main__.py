"""The command line: ``python -m benchmarks.replication [run|cost|list|verdict|rules]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from micro.errors import RunError

INTERRUPTED = 130


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; see README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replication", description=__doc__)
    parser.add_argument("command", nargs="?", default="run", choices=("run", "cost", "list", "verdict", "rules"))
    parser.add_argument(
        "--plan",
        default="full",
        choices=("full", "mild", "nano"),
        help="mild: a second look at a quarter of the rate; nano: seconds; shows that all works",
    )
    parser.add_argument("--work", type=Path, help="what can be made again (default build/replication/PLAN)")
    parser.add_argument("--results", type=Path, help="what is committed (default below benchmarks/results)")
    parser.add_argument("--only", default="", help="runs to do now, or beginnings of their names, comma-separated")
    parser.add_argument("--no-probe", action="store_true", help="do not measure the cost first")
    parser.add_argument("--again", action="store_true", help="measure the cost anew")
    parser.add_argument("--over-budget", action="store_true", help="start although the estimate exceeds the budget")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    given = parse(arguments)
    try:
        return _do(given)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return INTERRUPTED
    except (RunError, ValueError) as error:
        print(f"replication: {error}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2


def _do(given: argparse.Namespace) -> int:
    if given.command == "rules":
        from benchmarks.replication.verdict import rules_text

        print(rules_text(), end="")
        return 0
    from benchmarks.replication import run
    from benchmarks.replication.plan import PLANS, jobs

    plan = PLANS[given.plan]
    places = run.default_places(plan, given.work, given.results)
    if given.command == "list":
        there = run.done(plan, places)
        for job in jobs(plan):
            print(f"{'done' if job.name in there else 'to do':6} {job.name:32} {job.arm.title}, {job.setup.title}")
    elif given.command == "verdict":
        if not run.judge(plan, places):
            raise ValueError(f"{places.results}: no run is there yet")
    elif given.command == "cost":
        import torch

        from benchmarks.replication import cost

        torch.set_num_threads(plan.threads)
        print("\n".join(cost.estimate(plan, places, again=given.again).lines(plan, run.done(plan, places))))
    else:
        run.replicate(
            plan,
            places,
            only=[name for name in given.only.split(",") if name],
            over_budget=given.over_budget,
            probe=not given.no_probe,
            again=given.again,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
