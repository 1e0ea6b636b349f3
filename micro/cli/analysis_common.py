"""What the analysis commands share: their model, the records or texts to run on, and how they end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from micro.analysis.result import Result


def load_model(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder of ours or an official one."""
    from transformers import AutoTokenizer

    import micro

    model = micro.load(folder)
    try:
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: no tokenizer in this folder; copy tokenizer.json, tokenizer_config.json and "
            "chat_template.jinja of the backbone there"
        ) from error


def read_inputs(data: Path | None, texts: list[str], limit: int | None) -> list[Any]:
    """Records of a file, or the texts of the command line.

    Raises:
        ValueError: neither or both are given.
    """
    if (data is None) == (not texts):
        raise ValueError("give either --data FILE (labelled records) or one or more --text")
    if data is None:
        return texts[:limit]
    from micro.data import load_records

    return load_records(data)[:limit]


def expert_set(value: str | None) -> list[str] | None:
    """A comma list of experts, as sets are written on the command line."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def finish(
    results: Result | Sequence[Result],
    output: Path,
    about: Mapping[str, Any] | None = None,
    *,
    as_json: bool = False,
    note: str = "",
    beside: str = "",
) -> None:
    """How an analysis command ends: files and figures of its results, their tables, and where all of it stands.

    Args:
        results: one, printed as its own JSON; or several, printed as an object of them by name.
        output: the folder.
        about: what the command was called with, for the settings of each result.
        as_json: print JSON and nothing else.
        note: a line behind the tables.
        beside: what else was written.
    """
    several = results if isinstance(results, Sequence) else [results]
    for result in several:
        save_result(result, output, about)
    if as_json:
        by_name = {result.name: result.to_dict() for result in several}
        typer.echo(json.dumps(by_name if isinstance(results, Sequence) else by_name[results.name]))
        return
    for result in several:
        typer.echo(f"\n{result.name}\n{result}" if len(several) > 1 else str(result))
    if note:
        typer.echo(note)
    names = " and ".join(f"{result.name}.json, .csv, .png, .svg" for result in several)
    typer.echo(f"written: {output}/{names}" + (f"; {beside}" if beside else ""))


def save_result(
    result: Result, output: Path, about: Mapping[str, Any] | None = None, figures: Mapping[str, Figure] | None = None
) -> None:
    """Save a result and its figures, which are file names -> figures; by default the one that it draws itself."""
    result.settings |= about or {}
    result.save(output)
    for name, figure in ({result.name: result.plot()} if figures is None else figures).items():
        save_figure(figure, output / name)


def save_figure(figure: Figure, path: Path) -> None:
    """PNG and SVG of a figure beside the numbers."""
    for suffix in (".png", ".svg"):
        beside = path.with_name(f".{path.name}{suffix}.part")
        figure.savefig(beside, format=suffix[1:], dpi=150)
        beside.replace(path.with_suffix(suffix))
