"""``micro deltas``: what experts learned, as weights: compared, added, merged, cut to low rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from micro.cli.analysis_common import expert_set, finish

if TYPE_CHECKING:
    from micro.deltas import Merged

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Differences of experts from the model they were cloned from: compare, combine, merge, compress.",
)

Model = Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")]
Base = Annotated[
    str | None,
    typer.Option(help="What the experts were cloned from: folder or hub id, dense or upcycled; else their mean."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")]
Out = Annotated[Path, typer.Argument(help="Model folder to write.")]
Experts = Annotated[str | None, typer.Option(help="Comma list of experts; all if not given.")]
Layers = Annotated[str | None, typer.Option(help="Comma list of layers; all if not given.")]
Matrices = Annotated[str | None, typer.Option(help="Comma list of tensors (q_proj, up_proj, ...); all if not given.")]
Scale = Annotated[float, typer.Option(help="Times the merged delta; 0 gives the base.")]
Shared = Annotated[float, typer.Option(help="Weights outside the experts: 1 = the mixture's, 0 = the base's.")]
Into = Annotated[str | None, typer.Option(help="Write a mixture with the result as this expert, not a dense model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def compare(
    folder: Model,
    base: Base = None,
    output: Output = Path("deltas"),
    layers: Layers = None,
    matrices: Matrices = None,
    interference: Annotated[bool, typer.Option("--interference", help="Singular interference, too (slow).")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Singular vectors per expert for --interference.")] = None,
    seed: Annotated[int, typer.Option(help="Of random directions.")] = 0,
    json: Json = False,
) -> None:
    """How far each expert went from the base, in which layers and tensors, and in how different directions."""
    from micro import deltas as md

    source = md.ExpertDeltas(folder, base)
    chosen: Any = {"layers": _layers(layers), "matrices": expert_set(matrices), "progress": True}
    reports: list[Any] = [md.compare(source, **chosen)]
    if interference:
        reports.append(md.interference(source, rank=rank, seed=seed, **chosen))
    finish(reports, output, as_json=json)


@app.command()
def combine(
    folder: Model,
    out: Out,
    coefficients: Annotated[str, typer.Option(help="NAME=NUMBER,...: times each expert's delta; -1 forgets.")],
    base: Base = None,
    scale: Scale = 1.0,
    shared: Shared = 1.0,
    into: Into = None,
    overwrite: Overwrite = False,
) -> None:
    """Base + scale * (sum of the experts' deltas times their coefficients)."""
    from micro import deltas as md
    from micro.cli.values import numbers_by_name

    numbers: Any = numbers_by_name(coefficients, "--coefficients")
    if not numbers:
        raise ValueError("--coefficients is empty; give NAME=NUMBER,... as in logic=1,social=-0.5")
    merged = md.combine(md.ExpertDeltas(folder, base), numbers, scale=scale, shared=shared)
    _write(merged, out, into, overwrite)


@app.command()
def ties(
    folder: Model,
    out: Out,
    base: Base = None,
    experts: Experts = None,
    density: Annotated[float, typer.Option(help="Share of each delta's entries that is kept.")] = 0.2,
    trim: Annotated[str, typer.Option(help="model: over all of an expert's tensors; tensor: in each.")] = "model",
    scale: Scale = 1.0,
    shared: Shared = 1.0,
    into: Into = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge experts by TIES: trim, elect signs, average what agrees."""
    from micro import deltas as md
    from micro.files import check_target

    check_target(out, overwrite)
    merged = md.ties(
        md.ExpertDeltas(folder, base),
        expert_set(experts),
        density=density,
        trim=trim,
        scale=scale,
        shared=shared,
        progress=True,
    )
    _write(merged, out, into, overwrite)


@app.command()
def decorrelate(
    folder: Model,
    out: Out,
    base: Base = None,
    experts: Experts = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Singular vectors per expert.")] = None,
    scale: Scale = 1.0,
    shared: Shared = 1.0,
    into: Into = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge experts by task singular vectors that were made orthogonal."""
    from micro import deltas as md

    source = md.ExpertDeltas(folder, base)
    merged = md.decorrelated(source, expert_set(experts), rank=rank, scale=scale, shared=shared)
    _write(merged, out, into, overwrite)


@app.command()
def compress(
    folder: Model,
    out: Annotated[Path | None, typer.Argument(help="Mixture to write; none: report only.")] = None,
    base: Base = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the full rank that is kept.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="The rank itself.")] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Write base and factors; `micro deltas expand` makes the mixture again.")
    ] = False,
    output: Output = Path("deltas"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Experts as base + delta of low rank: sizes, errors, and the mixture itself."""
    from micro import deltas as md
    from micro.files import check_target

    if out is not None:
        check_target(out, overwrite)
    elif compact:
        raise ValueError("--compact writes a folder; name it")
    low = md.LowRank(md.ExpertDeltas(folder, base), fraction=fraction, rank=rank)
    report = low.report(progress=True)
    size = f"weights of base and factors: {report.size:.2f} times one dense model's matrices"
    finish(report, output, as_json=json, note=size)
    if out is not None:
        if compact:
            path = md.save_compact(low, out, overwrite=overwrite, progress=True)
        else:
            path = low.save(out, overwrite=overwrite, progress=True)
        typer.echo(f"written: {path}", err=json)


@app.command()
def expand(
    folder: Annotated[Path, typer.Argument(help="Folder written by `micro deltas compress --compact`.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Make a mixture with full matrices of base and factors."""
    from micro.convert import save
    from micro.deltas import load_compact
    from micro.files import check_target

    check_target(out, overwrite)
    save(load_compact(folder), out, overwrite=overwrite)
    typer.echo(f"written: {out}")


def _layers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers: {text!r} must be layer numbers with commas between them") from None


def _write(merged: Merged, out: Path, into: str | None, overwrite: bool) -> None:
    if into is None:
        path = merged.save_dense(out, overwrite=overwrite, progress=True)
    else:
        path = merged.save_into(into, out, overwrite=overwrite, progress=True)
    typer.echo(f"{merged.how}\nwritten: {path}")
