"""``micro route``: who is routed where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from micro.cli.analysis_common import expert_set, load_model, read_inputs, save_result

SHOWN = 8  # texts drawn as coloured tokens
SENTENCES = 200  # for the similarity of experts, as published


@dataclass
class _Run:
    """What the parts of the command share."""

    model: Any
    tokenizer: Any
    output: Path
    controls: dict[str, Any]
    seed: int
    draws: int
    page: Any
    results: list[Any] = field(default_factory=list)

    def keep(self, result: Any, settings: dict[str, Any], figures: dict[str, tuple[Any, str]]) -> None:
        """Save numbers and figures, and show both on the page. figures: file name -> (figure, caption)."""
        from micro.report import figure_html, table_html

        save_result(result, self.output, settings, {name: figure for name, (figure, _) in figures.items()})
        for figure, caption in figures.values():
            self.page.html(figure_html(figure, caption))
        self.page.html(table_html(result.table()))
        self.results.append(result)


def route(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    data: Annotated[Path | None, typer.Option(help="Labelled records (JSON, JSON lines, Parquet).")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A plain text; may be repeated.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV, NPZ, figures, HTML.")] = Path(
        "route"
    ),
    limit: Annotated[int | None, typer.Option(help="Use the first N records.")] = None,
    samples: Annotated[int, typer.Option(help="Of more records than these, draw so many with seed 42.")] = 1000,
    positions: Annotated[
        str, typer.Option(help="Slots of a record: published (from the answer's header on) or answer (trained tokens).")
    ] = "published",
    group_by: Annotated[
        str | None, typer.Option(help="Field of the records whose values are compared; dataset if not given.")
    ] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another checkpoint: agreement of routing on the same tokens; repeatable.")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Compare the experts' outputs, each expert alone.")
    ] = False,
    ratings: Annotated[
        Path | None, typer.Option(help="CSV with a column 'sentence' and one per human rating: selectivity.")
    ] = None,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep.")] = None,
    draws: Annotated[int, typer.Option(help="Of each bootstrap.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of null controls.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Route texts or labelled records: usage, entropies, flow through the layers and, with labels, accuracy.

    With --against also agreement of checkpoints, with --similarity of the experts' outputs, with --ratings of routing
    and human ratings (which needs no --data).
    """
    from micro.report import Page

    inputs = [] if ratings is not None and data is None and not text else read_inputs(data, text or [], limit)
    names = _checkpoint_names([folder, *(against or [])], inputs)
    groups = _groups(inputs, group_by)
    rated = _rated(ratings)
    for other in against or []:
        if not (other / "config.json").is_file():
            raise ValueError(f"--against {other}: no model folder (it holds no config.json)")
    model, tokenizer = load_model(folder)
    sets = {"ablate": expert_set(ablate), "keep": expert_set(keep)}
    controls: dict[str, Any] = {name: names for name, names in sets.items() if names}
    run = _Run(model, tokenizer, output, controls, seed, draws, Page("Routing", str(folder)))
    given = {"model": str(folder), "data": str(data) if data else "--text", **controls}
    if inputs:
        _usage(run, inputs, groups, given, samples, positions)
    if against:
        _agreement(run, dict(zip(names, [folder, *against], strict=True)), inputs, given, samples, positions)
    if similarity:
        _similarity(run, _sentences(inputs, rated), given)
    if rated is not None:
        _selectivity(run, rated, given | {"data": str(ratings)})
    if inputs:
        _tokens(run, inputs)
    run.page.write(output / "routing.html")
    _print(run, as_json=json)


def _groups(inputs: list[Any], field_name: str | None) -> list[str] | None:
    if field_name is None:
        return None
    if not inputs or isinstance(inputs[0], str):
        raise ValueError("--group-by needs --data with labelled records")
    rows = [record.to_json() for record in inputs]
    for i, row in enumerate(rows):
        if field_name not in row:
            raise ValueError(f"--group-by: record {i} has no field {field_name!r}; it has {', '.join(map(str, row))}")
    return [str(row[field_name]) for row in rows]


def _rated(path: Path | None) -> dict[str, list[Any]] | None:
    if path is None:
        return None
    from micro.analysis.routes.selectivity_report import read_ratings

    sentences, names, values = read_ratings(path)
    return {"sentence": sentences, **{name: values[:, k].tolist() for k, name in enumerate(names)}}


def _usage(
    run: _Run, inputs: list[Any], groups: list[str] | None, given: dict[str, Any], samples: int, positions: Any
) -> None:
    from micro.analysis import routing
    from micro.analysis.routes.figures import flow_figure, groups_figure, layer_maps_figure, layers_figure

    report = routing(
        run.model,
        run.tokenizer,
        inputs,
        groups=groups,
        positions=positions,
        controls=run.controls,
        max_samples=samples,
        draws=run.draws,
        seed=run.seed,
        progress=True,
    )
    slots = f"Slots: {report.settings['positions']}. {report.samples} samples, {report.tokens} slots."
    excluded = report.settings["layers_excluded"]
    rule = f"Without layers {', '.join(map(str, excluded))}." if excluded else "Over all layers."
    what = "Share of slots whose first choice is the expert"
    figures = {
        report.name: (report.plot(), f"{what}, for each layer. {slots}"),
        "routing_layers": (layers_figure(report), f"Intervals: 95 % bootstrap over samples. {slots}"),
    }
    if report.by_group or report.by_label:
        caption = f"{what}, by group of samples and by label of answer tokens. {rule} {slots}"
        figures["routing_groups"] = (groups_figure(report), caption)
        figures["routing_maps"] = (layer_maps_figure(report), f"{what}, by layer. {slots}")
    figures["routing_flow"] = (flow_figure(report), f"How slots move through the layers. {slots}")
    run.page.section("Usage")
    run.page.text(f"Usage is not importance: only ablations say what an expert does. The summary: {rule}", quiet=True)
    run.keep(report, given, figures)


def _checkpoint_names(folders: list[Path], inputs: list[Any]) -> list[str]:
    """Names of the folders, whole paths where two are called alike."""
    if len(folders) > 1 and not inputs:
        raise ValueError("--against needs --data or --text: the tokens on which checkpoints are compared")
    names = [f.name for f in folders]
    names = [n if n and names.count(n) == 1 else str(f) for n, f in zip(names, folders, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError("--against: a checkpoint is given twice")
    return names


def _agreement(
    run: _Run, folders: dict[str, Path], inputs: list[Any], given: dict[str, Any], samples: int, positions: Any
) -> None:
    from micro.analysis import agreement

    first = next(iter(folders))
    checkpoints = {**folders, first: run.model}  # the first one is loaded already
    report = agreement(
        checkpoints,
        run.tokenizer,
        inputs,
        positions=positions,
        controls=run.controls,
        max_samples=samples,
        null_draws=20 if len(inputs) > 1 else 0,
        draws=run.draws,
        seed=run.seed,
        progress=True,
    )
    run.page.section("Agreement of checkpoints")
    caption = f"{report.samples} samples, {report.tokens} slots. Dashed: null controls."
    run.keep(
        report,
        given | {"checkpoints": {n: str(f) for n, f in folders.items()}},
        {report.name: (report.plot(), caption)},
    )


def _sentences(inputs: list[Any], rated: dict[str, list[Any]] | None) -> list[str]:
    if rated is not None:
        return rated["sentence"]
    texts = [item if isinstance(item, str) else item.messages()[-2]["content"] for item in inputs]
    return [t for t in texts if t.strip()][:SENTENCES]


def _similarity(run: _Run, sentences: list[str], given: dict[str, Any]) -> None:
    from micro.analysis import similarity

    report = similarity(run.model, run.tokenizer, sentences, draws=run.draws, seed=run.seed, progress=True)
    run.page.section("Similarity of the experts' outputs")
    caption = f"Each expert runs the whole model alone. {report.sentences} sentences, {report.tokens} tokens."
    run.keep(report, given, {report.name: (report.plot(), caption)})


def _selectivity(run: _Run, rated: dict[str, list[Any]], given: dict[str, Any]) -> None:
    from micro.analysis import selectivity

    report = selectivity(
        run.model, run.tokenizer, rated, controls=run.controls, draws=run.draws, seed=run.seed, progress=True
    )
    run.page.section("Selectivity against human ratings")
    caption = f"{len(report.sentences)} sentences. Star: p at most 0.05 after Holm's correction over all pairs."
    run.keep(report, given, {report.name: (report.plot(), caption)})


def _tokens(run: _Run, inputs: list[Any]) -> None:
    from micro.report import token_views_html
    from micro.report.tokens import STYLE

    run.page.section("Tokens")
    run.page.html(token_views_html(list(_views(run, inputs[:SHOWN]))), style=STYLE)


def _views(run: _Run, inputs: list[Any]) -> Iterator[Any]:
    from micro.analysis.routes.views import record_view, text_view

    for i, item in enumerate(inputs):
        if isinstance(item, str):
            ids = run.tokenizer(item)["input_ids"]
            yield text_view(run.model, run.tokenizer, ids, f"text {i + 1}", **run.controls)
        else:
            yield record_view(run.model, run.tokenizer, item, **run.controls)


def _print(run: _Run, *, as_json: bool) -> None:
    if as_json:
        import json

        first, *others = run.results
        typer.echo(json.dumps(first.to_dict() | {result.name: result.to_dict() for result in others}))
        return
    for result in run.results:
        typer.echo(str(result))
    names = ", ".join(f"{result.name}.json" for result in run.results)
    typer.echo(f"written: {run.output}/ ({names} with .csv, .png and .svg; routing.html)")
