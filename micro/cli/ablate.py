"""``micro ablate``: what it costs to lose an expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from micro.cli.analysis_common import expert_set, finish, load_model, read_inputs, save_figure

if TYPE_CHECKING:
    from micro.analysis import AblationReport
    from micro.analysis.result import Result


def ablate(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    data: Annotated[
        Path | None, typer.Option(help="Labelled records (JSON, JSON lines, Parquet): loss per domain.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma list of offline suites (micro evaluate suites), beside --data or alone.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and figures.")] = Path("ablate"),
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Comma list of experts to remove together; may be repeated.")
    ] = None,
    all_sets: Annotated[
        str | None, typer.Option("--sets", metavar="all", help='"all": every set that leaves an expert.')
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="Where the best ablation is chosen: a share of the records (0.5, say), or a file of other records "
            "for --data while --tasks take their training templates (train: no --data)."
        ),
    ] = None,
    shapley: Annotated[
        bool, typer.Option("--shapley", help="Exact Shapley values and interactions of the experts, too.")
    ] = False,
    replayed: Annotated[
        bool, typer.Option("--replayed", help="With the routes of the intact model, too: what routing compensates.")
    ] = False,
    cells: Annotated[
        bool, typer.Option("--cells", help="Every cell (layer, expert) alone, too, against random cells.")
    ] = False,
    cell_orders: Annotated[
        int, typer.Option(min=0, help="Shapley values of cells, too: sampled orders of layers per expert (20, say).")
    ] = 0,
    cell_records: Annotated[
        int, typer.Option(min=1, help="Records per domain or task for --cells and --cell-orders.")
    ] = 20,
    random_cells: Annotated[
        bool, typer.Option("--random-cells", help="Each ablated set against as many random cells of every layer, too.")
    ] = False,
    random_draws: Annotated[
        int, typer.Option(help="Random sets for --random-cells and --cells, at least 20; 0 = none.")
    ] = 20,
    limit: Annotated[int | None, typer.Option(help="Use the first N records.")] = None,
    seed: Annotated[int, typer.Option(help="Of bootstrap, splits, random cells.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the reports as JSON.")] = False,
) -> None:
    """Loss per domain and score per task with experts ablated, with paired intervals and tests.

    Intervals resample records; where they name their templates (meta "templates" or "group"), templates and records in
    them. Scores are kept in OUTPUT/scores: a run that was stopped goes on from there, and --shapley, --replayed,
    --cells, --cell-orders and --random-cells can be added later.
    """
    from micro import analysis
    from micro.analysis.suites import label_names

    if all_sets not in (None, "all"):
        raise ValueError(f'--sets is {all_sets!r}, expected "all"; name single sets with --set')
    if all_sets and sets:
        raise ValueError('give --sets all or --set, not both: "all" holds every set')
    if data is None and tasks is None:
        raise ValueError("give --data FILE (labelled records), --tasks NAMES (offline suites), or both")
    model, tokenizer = load_model(folder)
    asked = _Asked(data, expert_set(tasks) or [], limit, tokenizer, label_names(model.config), seed)
    removed: Any = "all" if all_sets else [expert_set(value) or [] for value in sets] if sets else None
    shared: dict[str, Any] = {"store": analysis.ScoreStore(output / "scores"), "seed": seed, "progress": True}
    suites = asked.suites()
    whole = analysis.ablation(
        model,
        suites,
        removed,
        validation=asked.validation(validation),
        random_draws=random_draws if random_cells else 0,
        **shared,
    )
    reports: list[Result] = [whole]
    if shapley:
        reports.append(analysis.expert_shapley(model, suites, **shared))
    if replayed:
        reports.append(analysis.routing_compensation(model, suites, removed, **shared))
    few = asked.suites(most=cell_records) if cells or cell_orders else []
    if cells:
        reports.append(analysis.cell_map(model, few, random_draws=random_draws, **shared))
    if cell_orders:
        reports.append(analysis.cell_shapley(model, few, orders=cell_orders, **shared))
    output.mkdir(parents=True, exist_ok=True)
    save_figure(whole.plot("bars"), output / "ablation_bars")
    about = {"model": str(folder), "data": data and str(data), "tasks": tasks}
    beside = "tables ablation_*.csv; ablation_bars.png, .svg"
    finish(reports, output, about, as_json=json, note=_claims(whole), beside=beside)


@dataclass
class _Asked:
    """What the command line asks to be scored, as suites."""

    data: Path | None
    tasks: list[str]
    limit: int | None
    tokenizer: Any
    names: list[str] | None
    seed: int

    def suites(self, most: int | None = None) -> list[Any]:
        """All suites; with at most so many records per domain or task."""
        from micro.analysis import few_per_domain

        made: list[Any] = []
        if self.data is not None:
            records = read_inputs(self.data, [], self.limit)
            made.append(self._losses(records if most is None else few_per_domain(records, most)))
        return made + self._offline("test", most)

    def validation(self, value: str | None) -> Any:
        """A share of the records, or suites over other records and templates."""
        if value is None:
            return None
        try:
            return float(value)
        except ValueError:
            if self.data is None and value != "train":
                raise ValueError(
                    f"--validation is {value!r}; without --data give a share (0.5, say) or train"
                ) from None
            other = [] if self.data is None else [self._losses(read_inputs(Path(value), [], None))]
            return other + self._offline("train", None)

    def _losses(self, records: list[Any]) -> Any:
        from micro.analysis import LossSuite

        return LossSuite(records, self.tokenizer, names=self.names)

    def _offline(self, split: str, most: int | None) -> list[Any]:
        if not self.tasks:
            return []
        from micro.evaluation.suites import make

        return [make(task, self.tokenizer, items=most or 60, split=split, seed=self.seed) for task in self.tasks]


def _claims(report: AblationReport) -> str:
    """The tables of tests, what each of their numbers resamples, and the verdicts."""
    columns = ["task", "ablated", "change", "low", "high", "test", "p", "p_holm", "published_p", "published_stars"]
    parts = [
        "\n" + frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")
        for frame in (report.tests()[columns], report.best_table(), report.random_table())
        if len(frame)
    ]
    parts.append(
        f"intervals: {report.settings['interval']} over {report.settings['resampled']}; p and p_holm: the named test, "
        "over records; published_p: unpaired t, over records"
    )
    if report.random:
        parts.append(
            "excess: interval over the same and over random sets, p over random sets alone; random cells may be the "
            "set's own (1 in 4 for one of four experts), so a true harm shows as less of itself (0.75)"
        )
    parts += [
        f"{row}: own expert's ablation is {'' if worst else 'not '}the worst of its row"
        for row, worst in report.own_domain_is_worst.items()
    ]
    return "\n".join(parts)
