"""``micro convert``: official checkpoints to ours and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="micro or official.")] = "micro",
    revision: Annotated[str, typer.Option(help="Official classes to write for: r1 or r2.")] = "r1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
) -> None:
    """Write a model in our format, or with the config and run file that the official classes need."""
    from micro.convert import convert as write
    from micro.files import check_target
    from micro.progress import Progress

    check_target(out, overwrite)
    with Progress("convert", 1) as bar:
        write(folder, out, to=to, revision=revision, overwrite=overwrite)  # type: ignore[arg-type]
        bar.advance()
    typer.echo(f"written: {out}")
