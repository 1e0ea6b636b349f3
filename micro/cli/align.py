"""``micro align``: how well features of a model account for responses of brains and readers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from micro.cli.analysis_common import expert_set, finish, load_model

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Alignment with brains and readers: responses, reading-times."
)

RANDOM_MASKS = 19


@app.command("responses")
def responses(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    texts: Annotated[Path, typer.Option(help="Stimuli: a text file, one per line, in the order of the responses.")],
    data: Annotated[
        Path,
        typer.Option(
            "--responses",
            help="NPZ with responses [stimuli, voxels] or repetitions [repetitions, stimuli, voxels] and, as wanted, "
            "reliability, networks, groups; NPY; or CSV with one column per voxel.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")] = Path("align"),
    point: Annotated[
        str, typer.Option(help="residual, block_output, units, ffn, attention, heads or up.")
    ] = "residual",
    layers: Annotated[str | None, typer.Option(help="Comma list; all if not given.")] = None,
    experts: Annotated[str | None, typer.Option(help="Comma list, at points with experts; all if not given.")] = None,
    pooling: Annotated[str, typer.Option(help="mean over the tokens of a text, or its last token.")] = "mean",
    tokens: Annotated[
        str, typer.Option(help="Tokens of other experts: all (the expert runs on them too) or zero.")
    ] = "all",
    mask: Annotated[
        Path | None,
        typer.Option(help="Result of `micro localize` at the same point: its units against random ones of each cell."),
    ] = None,
    compare: Annotated[list[Path] | None, typer.Option(help="Another model folder; may be repeated.")] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Also a model of the same shape with fresh random weights.")
    ] = False,
    folds: Annotated[int, typer.Option(help="Contiguous blocks of stimuli that are held out in turn.")] = 5,
    permutations: Annotated[int, typer.Option(help="Shuffled responses for the null.")] = 99,
    draws: Annotated[int, typer.Option(help="Bootstrap draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of splits, draws, shuffles and the self-test.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Encoding score, RSA and CKA of layers and experts with measured responses; intervals, nulls, self-test."""
    from micro.analysis.alignment import align, load_responses, matched_masks, pooled_activations

    stimuli, measured = _lines(texts), load_responses(data)
    if len(stimuli) != len(measured.values):
        raise ValueError(f"{texts} holds {len(stimuli)} lines and {data} {len(measured.values)} stimuli")
    options: dict[str, Any] = {"point": point, "experts": expert_set(experts), "pooling": pooling, "tokens": tokens}
    options["layers"] = None if layers is None else [int(part) for part in layers.split(",")]
    model, tokenizer = load_model(folder)
    pooled = pooled_activations(model, tokenizer, stimuli, name="model", progress=True, **options)
    sets, controls = pooled.sets(), {}
    if mask is not None:
        chosen = _mask(mask, pooled, model, point)
        sets.append(pooled.masked(chosen, "localized units"))
        random = [pooled.masked(m, "random").values for m in matched_masks(chosen, RANDOM_MASKS, seed=seed)]
        controls["localized units"] = random
    if untrained:
        fresh = _untrained(model, seed)
        sets += pooled_activations(fresh, tokenizer, stimuli, name="untrained", progress=True, **options).sets()
    for path in compare or []:
        other, own = load_model(path)
        name = path.name if path.name not in {entry.model for entry in sets} else str(path)
        sets += pooled_activations(other, own, stimuli, name=name, progress=True, **options).sets()
    result = align(
        sets, measured, controls=controls, folds=folds, permutations=permutations, draws=draws, seed=seed, progress=True
    )
    about = {"model": str(folder), "texts": str(texts), **options, "mask": mask and str(mask)}
    finish(result, output, about, as_json=json)


@app.command("reading-times")
def reading_times_command(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    table: Annotated[
        Path,
        typer.Option(help="CSV in reading order: sentence, word, time, and frequency or log_frequency."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")] = Path("align"),
    ablate: Annotated[
        list[str] | None, typer.Option(help="Comma list of experts: also the surprisal without them; may be repeated.")
    ] = None,
    spillover: Annotated[int, typer.Option(help="Words before that count.")] = 1,
    log_time: Annotated[bool, typer.Option("--log-time", help="Model the logarithm of the times.")] = False,
    permutations: Annotated[int, typer.Option(help="Shuffled surprisals for the null.")] = 99,
    seed: Annotated[int, typer.Option(help="Of shuffles and intervals.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """What surprisal adds to length, frequency and spill-over in the log-likelihood of reading times."""
    import numpy as np

    from micro.analysis.alignment import reading_times, word_surprisal
    from micro.analysis.alignment.reading_times import read_table

    frame = read_table(table)
    sentences = [part["word"].astype(str).tolist() for _, part in frame.groupby("sentence", sort=False)]
    model, tokenizer = load_model(folder)
    conditions: dict[str, dict[str, Any]] = {"intact": {}}
    conditions |= {f"without {value}": {"ablate": expert_set(value)} for value in ablate or []}
    surprisals = {
        name: np.concatenate(word_surprisal(model, tokenizer, sentences, controls=controls, progress=True))
        for name, controls in conditions.items()
    }
    result = reading_times(
        frame, surprisals, spillover=spillover, log_time=log_time, permutations=permutations, seed=seed
    )
    finish(result, output, {"model": str(folder), "table": str(table)}, as_json=json)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    empty = [i for i, line in enumerate(lines, 1) if not line.strip()]
    if not lines or empty:
        raise ValueError(f"{path}: line {empty[0] if empty else 1} is empty; every line is one stimulus")
    return lines


def _mask(path: Path, pooled: Any, model: Any, point: str) -> Any:
    """The units of a localizer's result, for the layers and experts that were read."""
    from micro.analysis import LocalizerResult

    result = LocalizerResult.load(path)
    if result.mask is None:
        raise ValueError(f"{path}: the arrays of this result are missing (an NPZ file beside the JSON)")
    if result.unit != point:
        raise ValueError(f"{path}: these units were localized at {result.unit!r}; give --point {result.unit}")
    names = list(model.config.expert_names or ())
    experts = [0 if expert is None else names.index(expert) for expert in pooled.experts]
    return result.mask[pooled.layers][:, experts]


def _untrained(model: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(model)(model.config).to(model.dtype)
