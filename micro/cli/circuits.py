"""``micro circuits``: which parts of a model do the work."""

from __future__ import annotations

import json as format_json
from pathlib import Path
from typing import Annotated, Any

import typer

from micro.cli.analysis_common import finish, load_model, read_inputs

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Patch, remove and gate parts of a model; measure self-repair."
)

Model = Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[Path, typer.Option(help="Labelled records (JSON, JSON lines, Parquet).")]
Limit = Annotated[int | None, typer.Option(help="Use the first N records.")]


@app.command()
def patch(
    folder: Model,
    pairs: Annotated[
        Path, typer.Option(help="JSON lines: clean, corrupt (equally many tokens), answer, wrong (next tokens).")
    ],
    output: Output = Path("circuits"),
    point: Annotated[str, typer.Option(help="Where: residual, heads, attention, up, units, ffn or block_output.")] = (
        "block_output"
    ),
    level: Annotated[str, typer.Option(help="layer, cell, head (point heads) or slot.")] = "cell",
    routes: Annotated[
        str, typer.Option(help="clean: both runs take the clean prompt's; free: each its own.")
    ] = "clean",
    top: Annotated[int | None, typer.Option(help="Patch only the N largest by the first-order screen.")] = None,
    json: Json = False,
) -> None:
    """Patch activations of clean prompts into corrupt ones, component by component."""
    from micro.analysis.circuits import PromptPair, patching

    rows = _lines(pairs, ("clean", "corrupt", "answer", "wrong"))
    model, tokenizer = load_model(folder)
    given: Any = {"point": point, "level": level, "routes": routes}
    prompts = [PromptPair(**row) for row in rows]
    result = patching(model, tokenizer, prompts, top=top, progress=True, **given)
    finish(result, output, {"model": str(folder), "data": str(pairs)}, as_json=json)


@app.command()
def remove(
    folder: Model,
    data: Data,
    output: Output = Path("circuits"),
    point: Annotated[str, typer.Option(help="Where: heads, attention, ffn, units, block_output ...")] = "heads",
    level: Annotated[str, typer.Option(help="layer, cell or head.")] = "head",
    how: Annotated[str, typer.Option(help="zero, mean or resample (both from the records themselves).")] = "zero",
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Loss per domain with each component removed."""
    from micro.analysis import LossSuite
    from micro.analysis.circuits import removal
    from micro.analysis.suites import label_names

    records = read_inputs(data, [], limit)
    model, tokenizer = load_model(folder)
    suite = LossSuite(records, tokenizer, names=label_names(model.config))
    given: Any = {"point": point, "level": level, "how": how}
    reference = None if how == "zero" else _reference(records, tokenizer)
    result = removal(model, suite, reference=reference, progress=True, **given)
    finish(result, output, {"model": str(folder), "data": str(data)}, as_json=json)


@app.command()
def gate(
    folder: Model,
    data: Data,
    output: Output = Path("circuits"),
    strength: Annotated[float, typer.Option(help="Absolute value of lambda.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Steps of each of the three fits.")] = 100,
    seeds: Annotated[int, typer.Option(help="Number of starts.")] = 3,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Causal head gating: which heads a task needs, which stand in its way."""
    from micro.analysis.circuits import head_gating

    records = read_inputs(data, [], limit)
    model, tokenizer = load_model(folder)
    result = head_gating(model, tokenizer, records, strength=strength, steps=steps, seeds=range(seeds), progress=True)
    finish(result, output, {"model": str(folder), "data": str(data)}, as_json=json)


@app.command()
def repair(
    folder: Model,
    prompts: Annotated[Path, typer.Option(help="JSON lines: prompt, answer (the next token).")],
    output: Output = Path("circuits"),
    json: Json = False,
) -> None:
    """Self-repair: what later layers and the routers make good when a layer's attention or FFN is removed."""
    from micro.analysis.circuits import self_repair

    rows = _lines(prompts, ("prompt", "answer"))
    model, tokenizer = load_model(folder)
    given = [(row["prompt"], row["answer"]) for row in rows]
    result = self_repair(model, tokenizer, given, progress=True)
    finish(result, output, {"model": str(folder), "data": str(prompts)}, as_json=json)


def _lines(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """Objects of a JSON lines file that have exactly these fields (more are ignored)."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = format_json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(content, dict) or (missing := [f for f in fields if f not in content]):
            lacking = missing if isinstance(content, dict) else list(fields)
            raise ValueError(f"{path}, line {number}: expected an object with {', '.join(fields)}; missing {lacking}")
        rows.append({field: content[field] for field in fields})
    if not rows:
        raise ValueError(f"{path}: no line holds anything")
    return rows


def _reference(records: list[Any], tokenizer: Any) -> Any:
    """Token ids [B,S] of the records, cut to the shortest, so that no padding is in them."""
    import torch

    from micro.analysis.batches import encoded

    rows = [row["input_ids"] for _, row in encoded(records[:64], tokenizer)]
    if not rows:
        raise ValueError("none of the records could be encoded")
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows])
