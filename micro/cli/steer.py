"""``micro steer``: what steering does, which cells a behaviour calls on, and where routing comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from micro.cli.analysis_common import finish, load_model, read_inputs

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Tasks under steering sets and graded bias; resonance of cells; attribution of routing.",
)

Model = Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")]
Limit = Annotated[int | None, typer.Option(help="Use the first N records or texts.")]
Seed = Annotated[int, typer.Option(help="Of all random draws.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Positions = Annotated[str, typer.Option(help="predicting (slots that predict an answer token) or all.")]


@app.command()
def matrix(
    folder: Model,
    data: Annotated[Path, typer.Option(help="Held-out labelled records (JSON, JSON lines, Parquet).")],
    output: Output = Path("steer"),
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=EXPERT,...: a set and the experts that it ablates; may be repeated."),
    ] = None,
    random_sets: Annotated[int, typer.Option(help="Controls: random experts in every layer, as many as a set.")] = 20,
    curves: Annotated[bool, typer.Option("--curves", help="Graded bias on each expert, too.")] = False,
    bias: Annotated[str, typer.Option(help="Values of the bias for --curves, in nats.")] = "-8,-4,-2,-1,0,1,2,4,8",
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Answer this under each set, too.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For --prompt.")] = 64,
    limit: Limit = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Change of each domain's log-likelihood under each steering set, with intervals, tests and random sets.

    Scores are kept in OUTPUT/scores: a run that was stopped goes on from there.
    """
    from micro import analysis
    from micro.analysis.ablations.scores import ScoreStore
    from micro.analysis.steering.bias import bias_curves
    from micro.analysis.steering.matrix import steered_outputs, steering_matrix
    from micro.analysis.suites import label_names

    values, chosen = _numbers(bias), _sets(sets)
    records = read_inputs(data, [], limit)
    model, tokenizer = load_model(folder)
    suite = analysis.LossSuite(records, tokenizer, names=label_names(model.config))
    store = ScoreStore(output / "scores")
    report = steering_matrix(
        model, suite, chosen, random_sets=random_sets, seed=seed, store=store, progress=True
    )  # fmt: skip
    if curves:
        report.curves = bias_curves(model, tokenizer, records, values=values, seed=seed, store=store, progress=True)
    if prompts:
        report.outputs = steered_outputs(
            model, tokenizer, prompts, chosen, max_new_tokens=max_new_tokens, progress=True
        )  # fmt: skip
    answers = "\n".join(f"{name}: {text}" for line in report.outputs for name, text in line.items())
    finish(report, output, {"model": str(folder), "data": str(data)}, as_json=json, note=answers)


@app.command()
def cells(
    folder: Model,
    a: Annotated[Path, typer.Option(help="Prompts that elicit the behaviour: records, or .txt with one text a line.")],
    b: Annotated[Path, typer.Option(help="Control prompts, in the same form.")],
    output: Output = Path("steer"),
    top: Annotated[int, typer.Option(min=0, help="Suppress the N strongest cells together; 0 = not.")] = 3,
    switch: Annotated[str, typer.Option(help="Try every cell: suppress, force, both or none.")] = "suppress",
    draws: Annotated[int, typer.Option(min=0, help="Random sets of cells beside the strongest.")] = 19,
    positions: Positions = "predicting",
    limit: Limit = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Which cells prompts A use more than prompts B, and what switching single cells does to both.

    Scores are kept in OUTPUT/scores: a run that was stopped goes on from there.
    """
    from micro.analysis.ablations.scores import ScoreStore
    from micro.analysis.steering.resonance import tunable_cells

    known: dict[str, tuple[str, ...]] = {
        "suppress": ("suppress",), "force": ("force",), "both": ("suppress", "force"), "none": (),
    }  # fmt: skip
    if switch not in known:
        raise ValueError(f"--switch is {switch!r}, expected one of {', '.join(known)}")
    inputs = [_inputs(path, limit) for path in (a, b)]
    model, tokenizer = load_model(folder)
    report = tunable_cells(
        model,
        tokenizer,
        *inputs,
        top=top,
        switches=known[switch],
        draws=draws,
        positions=positions,
        seed=seed,
        store=ScoreStore(output / "scores"),
        progress=True,
    )
    finish(report, output, {"model": str(folder), "a": str(a), "b": str(b)}, as_json=json)


@app.command()
def router(
    folder: Model,
    data: Annotated[Path | None, typer.Option(help="Records, or .txt with one text a line.")] = None,
    texts: Annotated[list[str] | None, typer.Option("--text", help="A text; may be repeated.")] = None,
    output: Output = Path("steer"),
    positions: Positions = "predicting",
    shifts: Annotated[int, typer.Option(min=0, help="Draws of the null of promotions.")] = 199,
    token_limit: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 4096,
    limit: Limit = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Split the router's logits into what embedding, attention and experts of earlier layers wrote."""
    from micro.analysis.steering.attribution import attribution

    if (data is None) == (not texts):
        raise ValueError("give either --data FILE or one or more --text")
    inputs = (texts or [])[:limit] if data is None else _inputs(data, limit)
    model, tokenizer = load_model(folder)
    report = attribution(
        model, tokenizer, inputs, positions=positions, shifts=shifts, token_limit=token_limit, seed=seed, progress=True
    )
    about = {"model": str(folder), "data": str(data or "texts of the command line")}
    finish(report, output, about, as_json=json)


def _inputs(path: Path, limit: int | None) -> list[Any]:
    """Texts of a .txt file, one a line, or records."""
    if path.suffix != ".txt":
        return read_inputs(path, [], limit)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: holds no text")
    return lines[:limit]


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--bias: {text!r} must be numbers with commas between them, as in -2,0,2") from None


def _sets(values: list[str] | None) -> dict[str, list[str]] | None:
    """``logic=social,world`` as {"logic": ["social", "world"]}."""
    if not values:
        return None
    found: dict[str, list[str]] = {}
    for value in values:
        name, equals, experts = value.partition("=")
        members = [part.strip() for part in experts.split(",") if part.strip()]
        if not equals or not name.strip() or not members or name.strip() in found:
            raise ValueError(f"--set: {value!r} must be NAME=EXPERT,EXPERT with another NAME each time")
        found[name.strip()] = members
    return found
