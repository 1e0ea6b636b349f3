"""``micro evaluate``: suites of tasks for a model, one sub-command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Suites of tasks: CogBench, offline suites, lm-evaluation-harness.",
)


@app.callback()
def _suites() -> None:
    """CogBench, offline suites, lm-evaluation-harness."""


@app.command()
def cogbench(
    model: Annotated[str, typer.Argument(help='Model folder, ours or in the official layout; "random": chance.')],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for tables, JSON and figures; a run there is continued.")
    ] = Path("cogbench"),
    experiments: Annotated[str | None, typer.Option(help="Comma list; default: all seven.")] = None,
    preset: Annotated[
        str, typer.Option(help="clean, or published: with the known slips of the published one.")
    ] = "clean",
    baseline: Annotated[
        str | None, typer.Option(help="What counts as random: own, published; default: by preset.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Runs of each experiment; default: those of the protocol.")] = None,
    step_by_step: Annotated[
        bool, typer.Option("--step-by-step", help="The model reasons first; its final answer counts.")
    ] = False,
    reasoning_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply for --step-by-step; default: 350.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts that are completed together.")] = 32,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep.")] = None,
    seed: Annotated[int, typer.Option(help="Of environments, random agent and bootstrap.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Seven experiments of cognitive psychology; S_BRE says how human behaviour and performance are."""
    from micro.cli.analysis_common import expert_set, load_model, save_figure
    from micro.evaluation import cogbench as suite

    given = {"ablate": expert_set(ablate), "keep": expert_set(keep)}
    player, tokenizer = (suite.RandomAgent(seed), None) if model == "random" else load_model(Path(model))
    result = suite.run(
        player,
        tokenizer,
        experiments=expert_set(experiments),
        preset=preset,
        runs=runs,
        seed=seed,
        batch_size=batch_size,
        controls={name: value for name, value in given.items() if value is not None},
        baseline=baseline,
        step_by_step=step_by_step,
        reasoning_tokens=reasoning_tokens,
        output=output,
        progress=True,
    )
    result.settings["model"] = model
    result.save(output)
    save_figure(result.plot(), output / result.name)
    if json:
        import json as format_json

        typer.echo(format_json.dumps(result.to_dict()))
        return
    typer.echo(str(result))
    typer.echo(f"written: {output}/cogbench.json, .csv, .png, .svg; one table per experiment")


@app.command()
def suites(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for JSON, CSV, items and figures; a run there is continued.")
    ] = Path("suites"),
    tasks: Annotated[str | None, typer.Option(help="Comma list; default: all whose data are at hand.")] = None,
    items: Annotated[int, typer.Option(help="Records of each task; 0 = 60, and all of SyntaxGym.")] = 60,
    split: Annotated[str, typer.Option(help="test, or train: items of other templates.")] = "test",
    ablations: Annotated[bool, typer.Option("--ablations", help="Also with each expert ablated.")] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Also with this comma list of experts ablated; may be repeated.")
    ] = None,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate in all runs.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep in all runs.")] = None,
    bias: Annotated[str | None, typer.Option(help="Added to router logits: logic=1.5,social=-2.")] = None,
    force: Annotated[str | None, typer.Option(help="Expert for every token.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Default: the model's.")] = None,
    normalization: Annotated[
        str | None, typer.Option(help="Of log-likelihoods: sum, tokens, bytes; default: by task.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of items and bootstrap.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Slots per batch.")] = 2048,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Forced choices per domain from own items; not comparable with published benchmarks."""
    from micro.cli.analysis_common import expert_set, load_model, save_figure
    from micro.evaluation import suites as offline

    if ablations and sets:
        raise ValueError("give --ablations (each expert) or --set, not both")
    model, tokenizer = load_model(folder)
    result = offline.run(
        model,
        tokenizer,
        tasks=expert_set(tasks),
        items=items or None,
        split=split,
        seed=seed,
        ablate=ablations or [expert_set(value) or [] for value in sets or []] or False,
        controls=_controls(ablate, keep, bias, force, experts_per_token),
        normalization=normalization,
        chat=chat,
        max_tokens=max_tokens,
        output=output,
        progress=True,
    )
    result.settings["model"] = str(folder)
    result.save(output)
    save_figure(result.plot(), output / result.name)
    if json:
        import json as format_json

        typer.echo(format_json.dumps(result.to_dict()))
        return
    typer.echo(str(result))
    typer.echo(f"written: {output}/suites.json, .csv, .png, .svg; suites_items.jsonl")


@app.command()
def harness(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    tasks: Annotated[str, typer.Option(help="Comma list of tasks or groups of lm-evaluation-harness.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")] = Path("harness"),
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples per prompt; default: the task's.")] = None,
    limit: Annotated[float | None, typer.Option(help="First items of each task; a share where below 1.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts as conversations.")
    ] = False,
    system_instruction: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep.")] = None,
    bias: Annotated[str | None, typer.Option(help="Added to router logits: logic=1.5,social=-2.")] = None,
    force: Annotated[str | None, typer.Option(help="Expert for every token.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Default: the model's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers that are generated together.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Slots per batch of candidates.")] = 2048,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and answer; default: the model's.")] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Keep the harness' log of each item.")] = False,
    seed: Annotated[int, typer.Option(help="Of worked examples, sampling and bootstrap.")] = 1234,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Tasks of lm-evaluation-harness, under steering; their data must be at hand."""
    from micro.cli.analysis_common import expert_set, load_model, save_figure
    from micro.evaluation import harness as evaluation

    model, tokenizer = load_model(folder)
    result = evaluation.run(
        model,
        tokenizer,
        tasks=expert_set(tasks) or [],
        include_path=include_path,
        controls=_controls(ablate, keep, bias, force, experts_per_token),
        num_fewshot=num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        log_samples=log_samples,
        seed=seed,
        progress=True,
        batch_size=batch_size,
        max_tokens=max_tokens,
        max_length=max_length,
    )
    result.settings["model"] = str(folder)
    result.save(output)
    save_figure(result.plot(), output / result.name)
    if json:
        import json as format_json

        typer.echo(format_json.dumps(result.to_dict()))
        return
    typer.echo(str(result))
    typer.echo(f"written: {output}/harness.json, .csv, .png, .svg")


def _controls(
    ablate: str | None, keep: str | None, bias: str | None, force: str | None, experts_per_token: int | None
) -> dict[str, Any]:
    """Steering arguments as the command line writes them, without those that were not given."""
    from micro.cli.analysis_common import expert_set
    from micro.cli.values import numbers_by_name

    given = {
        "ablate": expert_set(ablate),
        "keep": expert_set(keep),
        "bias": numbers_by_name(bias, "--bias"),
        "force": force,
        "experts_per_token": experts_per_token,
    }
    return {name: value for name, value in given.items() if value is not None}
