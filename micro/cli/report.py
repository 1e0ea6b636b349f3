"""``micro report``: join saved results into one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds results of other commands (searched recursively).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; FOLDER/report.html if not given.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "MiCRo report",
) -> None:
    """Draw every routing.json, ablation.json and metrics.jsonl below FOLDER on one self-contained page."""
    from micro.analysis import AblationReport, RoutingReport
    from micro.analysis.figures import loss_figure
    from micro.report import Page, figure_html, table_html

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    page, found = Page(title, str(folder)), 0
    kinds: list[tuple[str, Any, str]] = [
        ("routing.json", RoutingReport, "Routing"),
        ("ablation.json", AblationReport, "Ablation"),
    ]
    for file, kind, heading in kinds:
        for path in sorted(folder.rglob(file)):
            result = kind.load(path)
            found += 1
            page.section(f"{heading}: {path.parent.relative_to(folder)}")
            page.html(figure_html(result.plot(), f"{path.relative_to(folder)}; settings {json.dumps(result.settings)}"))
            page.html(table_html(result.table()))
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines:
            found += 1
            page.section(f"Training: {path.parent.relative_to(folder)}")
            page.html(figure_html(loss_figure(lines), f"Loss, {path.relative_to(folder)}"))
    if not found:
        raise ValueError(
            f"{folder}: no routing.json, ablation.json or metrics.jsonl below it; "
            "run micro route, ablate or train first"
        )
    target = output or folder / "report.html"
    page.write(target)
    typer.echo(f"written: {target} ({found} results)")
