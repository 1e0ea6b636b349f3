"""``micro ablate``: what it costs to lose an expert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from micro.cli.analysis_common import expert_set, load_model, read_inputs, save_figure


def ablate(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    data: Annotated[Path, typer.Option(help="Labelled records (JSON, JSON lines, Parquet).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")] = Path("ablate"),
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Comma list of experts to remove together; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first N records.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Loss per domain with each expert (or given sets) ablated, with paired intervals."""
    from micro.analysis import LossSuite, ablation

    records = read_inputs(data, [], limit)
    model, tokenizer = load_model(folder)
    removed = [expert_set(value) or [] for value in sets] if sets else None
    suite = LossSuite(records, tokenizer, names=model.config.expert_names)
    report = ablation(model, suite, removed, seed=seed, progress=True)
    report.settings |= {"model": str(folder), "data": str(data)}
    report.save(output)
    save_figure(report.plot(), output / report.name)
    if json:
        import json as format_json

        typer.echo(format_json.dumps(report.to_dict()))
        return
    typer.echo(str(report))
    for row, worst in report.own_domain_is_worst.items():
        typer.echo(f"{row}: own expert's ablation is {'' if worst else 'not '}the worst of its row")
    typer.echo(f"written: {output}/ablation.json, .csv, .png, .svg")
