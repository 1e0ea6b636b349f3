"""``micro train``: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A YAML file, or the name of a bundled recipe (see --list).", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings over the recipe's, e.g. max_length=512 stages.induce.epochs=1"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the run (default runs/RECIPE).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder, from its newest checkpoint.")
    ] = False,
    from_checkpoint: Annotated[
        Path | None, typer.Option("--from", help="Go on from this checkpoint of the run instead of the newest.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameters, steps, tokens, memory and disk; train and write nothing."),
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the bundled recipes.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe's file, to copy and change.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No tables and no progress.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the plan or the result as JSON on standard output.")
    ] = False,
) -> None:
    """Train the stages of a recipe.

    Ctrl-C saves a checkpoint and exits with status 130; `touch OUTPUT/CHECKPOINT` saves one and goes on. For several
    processes: python -m torch.distributed.run --nproc_per_node 2 -m micro.cli.main train RECIPE ...
    """
    if list_recipes:
        _list(json)
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe, or see --list", param_hint="RECIPE")
    from micro.training import recipe as recipes

    if show:
        typer.echo(recipes.find(recipe).read_text(encoding="utf-8"), nl=False)
        return
    resolved = recipes.load(recipe, settings or [])
    from micro.training import run

    folder = output or Path("runs") / (resolved.name or "run")
    result = run(resolved, output_dir=folder, resume=from_checkpoint or resume, dry_run=dry_run, quiet=quiet or json)
    _report(result, json)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _list(json: bool) -> None:
    from micro.training import recipe as recipes

    found = {name: recipes.describe(name) for name in recipes.names()}
    if json:
        import json as format_json

        typer.echo(format_json.dumps(found))
        return
    width = max(map(len, found))
    for name, description in found.items():
        typer.echo(f"{name:{width}}  {description}")


def _report(result: object, json: bool) -> None:
    import os

    from micro.training import RunResult

    if os.environ.get("RANK", "0") != "0":
        return  # one process of several speaks
    assert isinstance(result, RunResult)
    if json:
        import json as format_json

        fields = {
            "status": result.status,
            "output": str(result.output_dir),
            "model": str(result.model_dir) if result.model_dir else None,
            "seconds": result.seconds,
            "plan": result.plan.to_dict(),
        }
        typer.echo(format_json.dumps(fields))
    elif result.status == "done":
        typer.echo(f"done: {result.model_dir}")
    elif result.status == "interrupted":
        typer.echo(f"interrupted: go on with --resume --output {result.output_dir}", err=True)
