"""``micro route``: who is routed where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from micro.cli.analysis_common import expert_set, load_model, read_inputs, save_figure

SHOWN = 8  # texts drawn as coloured tokens


def route(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    data: Annotated[Path | None, typer.Option(help="Labelled records (JSON, JSON lines, Parquet).")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A plain text; may be repeated.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV, figures, HTML.")] = Path(
        "route"
    ),
    limit: Annotated[int | None, typer.Option(help="Use the first N records.")] = None,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Route texts or labelled records and report usage, entropies and, with labels, accuracy."""
    from micro.analysis import routing
    from micro.analysis.views import record_view, text_view
    from micro.report import Page, figure_html, table_html, token_views_html
    from micro.report.tokens import STYLE

    inputs = read_inputs(data, text or [], limit)
    model, tokenizer = load_model(folder)
    sets = {"ablate": expert_set(ablate), "keep": expert_set(keep)}
    controls: dict[str, Any] = {name: names for name, names in sets.items() if names}
    report = routing(model, tokenizer, inputs, controls=controls, seed=seed, progress=True)
    report.settings |= {"model": str(folder), "data": str(data) if data else "--text", **controls}
    report.save(output)
    figure = report.plot()
    save_figure(figure, output / report.name)
    views = [
        text_view(model, tokenizer, tokenizer(item)["input_ids"], f"text {i + 1}", **controls)
        if isinstance(item, str)
        else record_view(model, tokenizer, item, **controls)
        for i, item in enumerate(inputs[:SHOWN])
    ]
    page = Page("Routing", f"{folder} on {report.samples} samples, {report.tokens} tokens")
    page.section("Usage")
    page.html(figure_html(figure, "Share of tokens whose first choice is the expert, for each layer."))
    page.html(table_html(report.table()))
    page.section("Tokens")
    page.html(token_views_html(views), style=STYLE)
    page.write(output / "routing.html")
    if json:
        import json as format_json

        typer.echo(format_json.dumps(report.to_dict()))
    else:
        typer.echo(str(report))
        typer.echo(f"written: {output}/routing.json, .csv, .png, .svg, .html")
