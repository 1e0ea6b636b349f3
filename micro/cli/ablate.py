"""``micro ablate``: what it costs to lose an expert."""

from __future__ import annotations

import json as format_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from micro.cli.analysis_common import expert_set, load_model, read_inputs, save_figure

if TYPE_CHECKING:
    from micro.analysis.result import Result


def ablate(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    data: Annotated[Path, typer.Option(help="Labelled records (JSON, JSON lines, Parquet).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")] = Path("ablate"),
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Comma list of experts to remove together; may be repeated.")
    ] = None,
    all_sets: Annotated[
        str | None, typer.Option("--sets", metavar="all", help='"all": every set that leaves an expert.')
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Where the best ablation is chosen: a file of records, or a share of --data (0.5, say)."),
    ] = None,
    shapley: Annotated[
        bool, typer.Option("--shapley", help="Exact Shapley values and interactions of the experts, too.")
    ] = False,
    replayed: Annotated[
        bool, typer.Option("--replayed", help="With the routes of the intact model, too: what routing compensates.")
    ] = False,
    cells: Annotated[
        bool, typer.Option("--cells", help="Every cell (layer, expert) alone, too, against random cells.")
    ] = False,
    cell_records: Annotated[int, typer.Option(min=1, help="Records per domain for --cells.")] = 20,
    random_draws: Annotated[int, typer.Option(help="Random sets of cells for --cells, at least 20; 0 = none.")] = 20,
    limit: Annotated[int | None, typer.Option(help="Use the first N records.")] = None,
    seed: Annotated[int, typer.Option(help="Of bootstrap, splits, random cells.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Loss per domain with experts ablated, with paired intervals and tests.

    Scores are kept in OUTPUT/scores: a run that was stopped goes on from there, and --shapley, --replayed and --cells
    can be added later.
    """
    from micro import analysis

    if all_sets not in (None, "all"):
        raise ValueError(f'--sets is {all_sets!r}, expected "all"; name single sets with --set')
    if all_sets and sets:
        raise ValueError('give --sets all or --set, not both: "all" holds every set')
    records = read_inputs(data, [], limit)
    model, tokenizer = load_model(folder)
    names = model.config.expert_names
    suite = analysis.LossSuite(records, tokenizer, names=names)
    held = _validation(validation, tokenizer, names)
    removed: Any = "all" if all_sets else [expert_set(value) or [] for value in sets] if sets else None
    shared: dict[str, Any] = {
        "store": analysis.ScoreStore(output / "scores"), "seed": seed, "progress": True,
    }  # fmt: skip
    reports: list[Result] = [analysis.ablation(model, suite, removed, validation=held, **shared)]
    if shapley:
        reports.append(analysis.expert_shapley(model, suite, **shared))
    if replayed:
        reports.append(analysis.routing_compensation(model, suite, removed, **shared))
    if cells:
        few = analysis.LossSuite(analysis.few_per_domain(records, cell_records), tokenizer, names=names)
        reports.append(analysis.cell_map(model, few, random_draws=random_draws, **shared))
    for report in reports:
        _keep(report, output, {"model": str(folder), "data": str(data)})
    if json:
        typer.echo(format_json.dumps({report.name: report.to_dict() for report in reports}))
        return
    for report in reports:
        _show(report)
    typer.echo(f"written: {output}/ ({', '.join(report.name for report in reports)}: .json, .csv, .png, .svg)")


def _validation(value: str | None, tokenizer: Any, names: Any) -> Any:
    """A share of the records, or a suite over a file of its own."""
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        from micro.analysis import LossSuite

        return LossSuite(read_inputs(Path(value), [], None), tokenizer, names=names)


def _keep(report: Any, output: Path, about: dict[str, str]) -> None:
    report.settings |= about
    report.save(output)
    save_figure(report.plot(), output / report.name)
    if report.name == "ablation":
        save_figure(report.plot("bars"), output / "ablation_bars")


def _show(report: Any) -> None:
    from micro.analysis import AblationReport

    typer.echo(f"\n{report.name}\n{report}")
    if not isinstance(report, AblationReport):
        return
    columns = ["task", "ablated", "change", "low", "high", "test", "p", "p_holm", "published_p", "published_stars"]
    for frame in (report.tests()[columns], report.best_table()):
        if len(frame):
            typer.echo("\n" + frame.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    for row, worst in report.own_domain_is_worst.items():
        typer.echo(f"{row}: own expert's ablation is {'' if worst else 'not '}the worst of its row")
