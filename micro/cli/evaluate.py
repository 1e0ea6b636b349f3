"""``micro evaluate``: suites of tasks for a model, one sub-command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Suites of tasks: CogBench.")


@app.callback()
def _suites() -> None:
    """Suites of tasks: CogBench."""


@app.command()
def cogbench(
    model: Annotated[str, typer.Argument(help='Model folder, ours or in the official layout; "random": chance.')],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for tables, JSON and figures; a run there is continued.")
    ] = Path("cogbench"),
    experiments: Annotated[str | None, typer.Option(help="Comma list; default: all seven.")] = None,
    preset: Annotated[
        str, typer.Option(help="clean, or published: with the known slips of the published one.")
    ] = "clean",
    baseline: Annotated[
        str | None, typer.Option(help="What counts as random: own, published; default: by preset.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Runs of each experiment; default: those of the protocol.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are completed together.")] = 32,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep.")] = None,
    seed: Annotated[int, typer.Option(help="Of environments, random agent and bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Seven experiments of cognitive psychology; S_BRE says how human behaviour and performance are."""
    from micro.cli.analysis_common import expert_set, load_model, save_figure
    from micro.evaluation import cogbench as suite

    given = {"ablate": expert_set(ablate), "keep": expert_set(keep)}
    player, tokenizer = (suite.RandomAgent(seed), None) if model == "random" else load_model(Path(model))
    result = suite.run(
        player,
        tokenizer,
        experiments=expert_set(experiments),
        preset=preset,
        runs=runs,
        seed=seed,
        batch_size=batch_size,
        controls={name: value for name, value in given.items() if value is not None},
        baseline=baseline,
        output=output,
        progress=True,
    )
    result.settings["model"] = model
    result.save(output)
    save_figure(result.plot(), output / result.name)
    if json:
        import json as format_json

        typer.echo(format_json.dumps(result.to_dict()))
        return
    typer.echo(str(result))
    typer.echo(f"written: {output}/cogbench.json, .csv, .png, .svg; one table per experiment")
