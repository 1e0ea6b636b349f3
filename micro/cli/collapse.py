"""``micro collapse``: a mixture of experts becomes one dense Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def collapse(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    rule: Annotated[str, typer.Option(help="mean, expert or weighted.")] = "mean",
    expert: Annotated[
        str | None, typer.Option(help="For rule expert: one expert, or a comma list with one per layer.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="For rule weighted: name=weight,... with the sum 1; others have 0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
) -> None:
    """Merge the experts of each layer, or take one of them, and write a dense model."""
    from micro.cli.values import numbers_by_name
    from micro.convert import collapse as merge
    from micro.convert import load, save_dense
    from micro.files import check_target
    from micro.progress import Progress

    check_target(out, overwrite)
    chosen = [part.strip() for part in expert.split(",")] if expert is not None else None
    with Progress("collapse", 2) as bar:
        model = load(folder)
        bar.advance(note="merging")
        dense = merge(
            model,
            rule,  # type: ignore[arg-type]
            expert=chosen[0] if chosen is not None and len(chosen) == 1 else chosen,
            weights=numbers_by_name(weights, "--weights"),
        )
        how = " ".join(part for part in (rule, expert, weights) if part)
        save_dense(dense, model, out, how=how, overwrite=overwrite)
        bar.advance(note=str(out))
    typer.echo(f"{sum(p.numel() for p in dense.parameters()):,} parameters; written: {out}")
