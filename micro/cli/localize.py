"""``micro localize``: which units answer to language, to cognitive demand, to other minds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from micro.cli.analysis_common import finish, load_model, read_inputs


def localize(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    localizer: Annotated[
        str,
        typer.Option(
            help="language, multiple_demand, theory_of_mind, or a file or folder of stimuli: CSV with the columns text "
            "and condition, JSON with the lists positive and negative, or positive.txt and negative.txt."
        ),
    ] = "language",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for JSON, CSV, arrays, figures; localize/NAME if not given."),
    ] = None,
    unit: Annotated[
        str, typer.Option(help="block_output, up, units, ffn, attention, heads or residual.")
    ] = "block_output",
    percent: Annotated[float, typer.Option(help="Share of all units to select.")] = 10.0,
    units: Annotated[int | None, typer.Option(help="Number of units to select, instead of --percent.")] = None,
    band: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range", help="A control: as many units at random between two percentiles of t; 0 0: the lowest."
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Tokens that are not routed to an expert: all (it runs on them), routed, zero.")
    ] = "all",
    pooling: Annotated[str | None, typer.Option(help="last or mean; the localizer's own if not given.")] = None,
    ranking: Annotated[str, typer.Option(help="global, or layer: the top of each layer.")] = "global",
    q: Annotated[float, typer.Option("--fdr", help="Level of the false discovery rate.")] = 0.05,
    permutations: Annotated[int, typer.Option(help="Shuffled labels for the specificity check; 0: none.")] = 200,
    distractors: Annotated[bool, typer.Option("--distractors", help="Also run the matched distractors.")] = False,
    lesion_data: Annotated[
        Path | None, typer.Option(help="Labelled records: silence the units and measure the loss per domain.")
    ] = None,
    lesion_text: Annotated[list[str] | None, typer.Option(help="The same on a text; may be repeated.")] = None,
    lesion_masks: Annotated[int, typer.Option(help="Random masks beside the lesion; 99 or more give a p value.")] = 20,
    matched: Annotated[
        bool, typer.Option("--matched", help="Random masks as large as the lesion in every cell.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use the first N records of --lesion-data.")] = None,
    seed: Annotated[int, typer.Option(help="Of permutations, random masks and intervals.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Select the units that a localizer's stimuli tell apart, count them per expert and layer, and lesion them."""
    from micro import analysis
    from micro.analysis.localizers import find_stimuli

    stimuli = find_stimuli(localizer)
    texts = read_inputs(lesion_data, lesion_text or [], limit) if lesion_data or lesion_text else []
    out = output or Path("localize") / stimuli.name
    model, tokenizer = load_model(folder)
    result = analysis.localize(
        model,
        tokenizer,
        stimuli,
        unit,
        percent,
        units=units,
        range=band,
        mode=mode,
        pooling=pooling,
        ranking=ranking,
        q=q,
        permutations=permutations,
        distractors=distractors,
        seed=seed,
        progress=True,
    )
    results: list[analysis.LocalizerResult | analysis.LesionResult] = [result]
    if texts:
        harm = analysis.lesion(
            model, tokenizer, texts, result, draws=lesion_masks, matched=matched, seed=seed, progress=True
        )
        harm.settings |= {"data": str(lesion_data or "--lesion-text"), "localizer": stimuli.name}
        results.append(harm)
    finish(results, out, {"model": str(folder)}, as_json=json, beside="the arrays are in localizer.npz")
