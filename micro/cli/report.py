"""``micro report``: join saved results into one page, and into a model's card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds results of other commands (searched recursively).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; FOLDER/report.html if not given.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "MiCRo report",
    card: Annotated[
        Path | None,
        typer.Option(help="Model folder: write routing and evaluation into the card (README.md) of that model, too."),
    ] = None,
) -> None:
    """Join every saved result below FOLDER on one self-contained page with figures, tables, settings and seeds."""
    from micro.report import build_report, update_card

    page, found = build_report(folder, title)
    target = output or folder / "report.html"
    page.write(target)
    typer.echo(f"written: {target} ({len(found)} result{'s' if len(found) != 1 else ''})")
    for path, why in found.unread.items():
        typer.echo(f"not shown: {found.place(path)}: {why}", err=True)
    if card is not None:
        typer.echo(f"written: {update_card(card, found)}")
