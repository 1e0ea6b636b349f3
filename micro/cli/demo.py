"""``micro demo``: the whole of MiCRo on a real backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything that the demo writes.")] = Path(
        "demo-out"
    ),
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A small model that is trained on the spot; under a minute.")
    ] = False,
    full_control: Annotated[
        bool, typer.Option("--full-control", help="Train the random-label control as long as the model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data, routers and training.")] = 0,
) -> None:
    """Upcycle SmolLM2-135M-Instruct, train the three stages, ablate, steer, and write a report."""
    from micro.demo import FULL, TINY, run_demo
    from micro.demo.verdict import verdicts

    plan = TINY if tiny else FULL
    if full_control:
        plan = plan.full_control()
    result = run_demo(plan, output, seed=seed, say=lambda line: typer.echo(line, err=True))
    typer.echo("")
    typer.echo(str(result.routing))
    typer.echo("\nloss per domain with one expert ablated, nats per token")
    typer.echo(str(result.ablation))
    typer.echo("")
    for verdict in verdicts(result):
        typer.echo(f"{'HOLDS' if verdict.holds else 'DOES NOT HOLD'}: {verdict.claim}")
    typer.echo(
        f"bag-of-words classifier on the same held-out words: {result.baseline['word_accuracy']:.3f}; "
        f"peak memory {result.peak_memory_gb:.1f} GB; {sum(result.seconds.values()) / 60:.1f} minutes"
    )
    typer.echo(f"report: {output / 'report.html'}")
