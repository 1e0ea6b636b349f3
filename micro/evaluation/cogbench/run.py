"""Playing experiments: all runs of one in lockstep, one batch per question; saved one by one, so that a run resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micro.analysis.fingerprints import plain, steering_contexts
from micro.analysis.statistics import Array
from micro.errors import require
from micro.evaluation.cogbench.agents import Agent, ModelAgent, RandomAgent
from micro.evaluation.cogbench.baselines import RANDOM, Values, check_preset, human_values
from micro.evaluation.cogbench.bre import grouped, s_bre
from micro.evaluation.cogbench.experiment import Answer, Game, Query, Row
from micro.evaluation.cogbench.registry import EXPERIMENTS, chosen, experiment
from micro.evaluation.cogbench.result import CogBenchResult
from micro.evaluation.cogbench.scoring import Score, evidence, resample
from micro.files import write_text
from micro.progress import Progress

BASELINES = ("own", "published")
BASELINE_DISCOUNTING_RUNS = 1000  # one run of thirteen coin flips is no baseline
Runs = int | Mapping[str, int] | None


def run(
    model: Any,
    tokenizer: Any = None,
    *,
    experiments: str | Sequence[str] | None = None,
    preset: str = "clean",
    runs: Runs = None,
    seed: int = 0,
    batch_size: int = 32,
    controls: Mapping[str, Any] | None = None,
    baseline: str | None = None,
    baseline_runs: Runs = None,
    draws: int = 1000,
    output: str | Path | None = None,
    progress: bool = False,
) -> CogBenchResult:
    """Let a model play, and score it.

    Args:
        model: a causal language model, or an agent (anything with ``name`` and ``answer``).
        tokenizer: of the model; not needed for an agent.
        experiments: names; all seven if not given.
        preset: ``"clean"``, or ``"published"`` with the known slips of the published pipeline (strict reading of
            letters, shifted accuracy, doubled instrumental visits, published baselines).
        runs: number of runs, for all experiments or by name; default that of the protocol. Fewer runs, wider intervals.
        seed: of the environments, of unreadable replies and of the bootstrap.
        batch_size: prompts that are completed together.
        controls: steering arguments of every call of the model.
        baseline: what counts as random: ``"own"`` = the random agent plays and is scored in the same way (default of
            ``clean``), ``"published"`` = the published values (default of ``published``).
        baseline_runs: runs of the random agent; default those of the protocol, 1000 for temporal discounting.
        draws: bootstrap samples of runs.
        output: a folder; every finished experiment is saved there, and found again by a later call with the same
            settings.
        progress: show bars on stderr.

    Returns:
        A :class:`CogBenchResult`; it is also saved where ``output`` is given.

    Raises:
        ValueError: unknown names, numbers out of range, an output folder that holds a run with other settings, or
            ``output`` inside ``model.intervene``, of which a folder could not tell.
        TypeError: a model without a tokenizer; ``output`` with controls that are functions.
        MissingExtraError: without pandas or SciPy (extra ``eval``).

    Source: CogBench (Coda-Forno et al. 2024), text completion, greedy, two tokens after a forced beginning.
    """
    names = chosen(experiments)
    check_preset(preset)
    counts = _run_counts(names, runs)
    _baseline_name(baseline, preset)
    for module in ("pandas", "scipy"):
        require(module, "eval", "micro.evaluation.cogbench")
    agent = _agent(model, tokenizer, preset, batch_size, controls)
    folder = None if output is None else Path(output)
    if folder is not None and isinstance(agent, ModelAgent):
        agent.check_keepable()
    around = _around(folder)
    tables, replies = {}, {}
    for name in names:
        settings = {"agent": agent.name, "preset": preset, "runs": counts[name], "seed": seed, **around}
        saved = None if folder is None else _saved(folder, name, settings)
        if saved is None:
            saved = play(name, agent, runs=counts[name], seed=seed, preset=preset, progress=progress)
            if folder is not None:
                _save(folder, name, settings, *saved)
        tables[name], replies[name] = saved
    result = summarise(
        tables,
        preset=preset,
        baseline=baseline,
        baseline_runs=baseline_runs,
        draws=draws,
        seed=seed,
        progress=progress,
    )
    result.agent, result.replies = agent.name, replies
    result.settings |= {"runs": counts, **around}
    if folder is not None:
        result.save(folder)
    return result


def play(
    name: str, agent: Agent, *, runs: int | None = None, seed: int = 0, preset: str = "clean", progress: bool = False
) -> tuple[Any, dict[str, int]]:
    """All runs of one experiment.

    Returns:
        The table (pandas frame), and ``{"questions": ..., "unreadable": ...}``: an unreadable reply counts as a random
        choice, an unreadable confidence as 0.
    """
    pd = require("pandas", "eval", "micro.evaluation.cogbench")
    known, which = experiment(name), list(EXPERIMENTS).index(name)
    runs = _run_counts([name], runs)[name]
    check_preset(preset)
    total = None if known.questions is None else runs * known.questions
    told = f"{name}, random agent" if isinstance(agent, RandomAgent) else name
    side_by_side = max(1, int(getattr(agent, "batch_size", runs)))
    counts = {"questions": 0, "unreadable": 0}
    rows: list[Row] = []
    with Progress(told, total, unit="questions", enabled=None if progress else False) as bar:
        for start in range(0, runs, side_by_side):
            wave = range(start, min(start + side_by_side, runs))
            games = {r: known.play(r, np.random.default_rng([seed, which, r, 0]), preset) for r in wave}
            guesses = {r: np.random.default_rng([seed, which, r, 1]) for r in wave}
            found = _lockstep(name, agent, games, guesses, preset, counts, bar)
            rows += [row for r in wave for row in found[r]]
    return pd.DataFrame(rows), counts


def _lockstep(
    name: str,
    agent: Agent,
    games: Mapping[int, Game],
    guesses: Mapping[int, np.random.Generator],
    preset: str,
    counts: dict[str, int],
    bar: Progress,
) -> dict[int, list[Row]]:
    """Rows of runs that are played side by side, one batch of questions after the other."""
    waiting: dict[int, Query] = {}
    rows: dict[int, list[Row]] = {}
    for r, game in games.items():
        _step(game, None, r, waiting, rows)
    while waiting:
        asked = dict(waiting)
        replies = agent.answer(list(asked.values()), list(asked))
        if len(replies) != len(asked):
            raise ValueError(f"{name}: the agent gave {len(replies)} replies to {len(asked)} questions")
        waiting.clear()
        for (r, query), reply in zip(asked.items(), replies, strict=True):
            answer = query.read(reply, preset)
            counts["unreadable"] += answer is None
            _step(games[r], query.fallback(guesses[r]) if answer is None else answer, r, waiting, rows)
        counts["questions"] += len(asked)
        bar.advance(len(asked), note=f"{counts['unreadable']} unreadable")
    return rows


def _step(game: Game, answer: Answer | None, run: int, waiting: dict[int, Query], rows: dict[int, list[Row]]) -> None:
    try:
        waiting[run] = next(game) if answer is None else game.send(answer)
    except StopIteration as end:
        rows[run] = end.value


def summarise(
    tables: Mapping[str, Any],
    *,
    preset: str = "clean",
    baseline: str | None = None,
    baseline_runs: Runs = None,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> CogBenchResult:
    """Scores, S_BRE and bootstrap intervals (95 %, over runs) of tables that this or another engine produced.

    Args:
        tables: experiment -> frame or CSV path.
        preset: as in :func:`run`.
        baseline: as in :func:`run`.
        baseline_runs: runs of the random agent; default those of the protocol, 1000 for temporal discounting.
        draws: bootstrap samples of runs.
        seed: of the bootstrap and the random agent.
        progress: show bars of the random agent on stderr.

    The baseline is held fixed in the bootstrap. A single run has no interval.
    """
    check_preset(preset)
    names, source = chosen(list(tables)), _baseline_name(baseline, preset)
    if draws < 1:
        raise ValueError(f"cogbench: draws must be at least 1, got {draws}")
    found = {name: evidence(name, tables[name], preset) for name in names}
    scores = {name: Score(e.values(), e.details) for name, e in found.items()}
    random = RANDOM
    if source == "own":
        random = random_values(names, preset=preset, runs=baseline_runs, seed=seed + 1, progress=progress)
    human = human_values(preset)
    samples = {name: resample(e, draws if e.runs > 1 else 1, [seed, i]) for i, (name, e) in enumerate(found.items())}
    bre = s_bre(scores, human=human, random=random)
    bounds = {name: np.quantile(values, [0.025, 0.975], axis=0).T.tolist() for name, values in samples.items()}
    return CogBenchResult(
        preset=preset,
        baseline=source,
        scores={name: dict(score) for name, score in scores.items()},
        intervals={name: dict(zip(e.metrics, bounds[name], strict=True)) for name, e in found.items() if e.runs > 1},
        human=human,
        random=random,
        s_bre={"behaviour": bre.behaviour, "performance": bre.performance, "mean": bre.mean},
        s_bre_intervals=_bre_intervals(samples, found, human, random, draws),
        relative=bre.relative,
        missing=list(bre.missing),
        details={name: e.details for name, e in found.items()},
        settings={"seed": seed, "bootstrap_draws": draws, "interval": "95 % bootstrap over runs, baseline fixed"},
        tables={name: _frame(table) for name, table in tables.items()},
    )


def random_values(
    names: Sequence[str], *, preset: str = "clean", runs: Runs = None, seed: int = 0, progress: bool = False
) -> Values:
    """What the random agent scores, by group, with the same environments and scorers."""
    counts = _run_counts(names, runs)
    if runs is None and "temporal_discounting" in counts:
        counts["temporal_discounting"] = BASELINE_DISCOUNTING_RUNS
    agent = RandomAgent(seed)
    scores = {}
    for name in names:
        table, _ = play(name, agent, runs=counts[name], seed=seed, preset=preset, progress=progress)
        scores[name] = evidence(name, table, preset).values()
    return grouped(scores)


def _bre_intervals(
    samples: Mapping[str, Array], found: Mapping[str, Any], human: Values, random: Values, draws: int
) -> dict[str, list[float] | None]:
    """S_BRE of each bootstrap draw, the experiments drawn independently."""
    values: dict[str, list[float]] = {"behaviour": [], "performance": [], "mean": []}
    for d in range(draws):
        drawn = {
            name: dict(zip(found[name].metrics, samples[name][d % len(samples[name])].tolist(), strict=True))
            for name in samples
        }
        bre = s_bre(drawn, human=human, random=random)
        for key in values:
            value = getattr(bre, key)
            if value is not None:
                values[key].append(value)
    if all(e.runs == 1 for e in found.values()):
        return dict.fromkeys(values)
    return {key: np.quantile(v, [0.025, 0.975]).tolist() if v else None for key, v in values.items()}


def _agent(model: Any, tokenizer: Any, preset: str, batch_size: int, controls: Mapping[str, Any] | None) -> Agent:
    if isinstance(model, Agent):
        if controls:
            raise ValueError("cogbench: controls steer a model; an agent has none")
        return model
    if not hasattr(model, "generate") or not hasattr(model, "named_parameters"):
        raise TypeError(f"cogbench: model must be a causal language model or an agent, got {type(model).__name__}")
    return ModelAgent(model, tokenizer, batch_size=batch_size, controls=controls, trailing_space=preset == "published")


def _around(folder: Path | None) -> dict[str, Any]:
    """The blocks of ``micro.steering`` that are open around a run, if any."""
    if not (blocks := steering_contexts()):
        return {}
    return {"steering": [[name, str(value)] for name, value in blocks] if folder is None else plain(blocks)}


def _baseline_name(baseline: str | None, preset: str) -> str:
    source = baseline or ("own" if preset == "clean" else "published")
    if source not in BASELINES:
        raise ValueError(f"cogbench: baseline must be 'own' or 'published', got {baseline!r}")
    return source


def _run_counts(names: Sequence[str], runs: Runs) -> dict[str, int]:
    if isinstance(runs, Mapping):
        chosen(list(runs) or None)  # names are checked
        counts = {name: runs.get(name, experiment(name).runs) for name in names}
    else:
        counts = {name: experiment(name).runs if runs is None else runs for name in names}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"cogbench: runs of {name} must be a whole number of at least 1, got {count!r}")
    return counts


def _frame(table: Any) -> Any:
    return (
        require("pandas", "eval", "micro.evaluation.cogbench").read_csv(table)
        if isinstance(table, str | Path)
        else table
    )


def _save(folder: Path, name: str, settings: dict[str, Any], table: Any, replies: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.csv", table.to_csv(index=False))
    # Last, so that it says the table is whole.
    write_text(folder / f"{name}.json", json.dumps({"settings": settings, "replies": replies}, indent=1) + "\n")


def _saved(folder: Path, name: str, settings: dict[str, Any]) -> tuple[Any, dict[str, int]] | None:
    """The table of an earlier call; None if there is none.

    Raises:
        ValueError: it was made with other settings.
    """
    note, table = folder / f"{name}.json", folder / f"{name}.csv"
    if not note.is_file() or not table.is_file():
        return None
    content = json.loads(note.read_text(encoding="utf-8"))
    if content["settings"] != settings:
        both = {**settings, **content["settings"]}
        other = [key for key in both if content["settings"].get(key) != settings.get(key)]
        raise ValueError(
            f"{note}: made with another {' and '.join(other)}; name another output folder, or remove this file to play "
            f"{name} again"
        )
    return _frame(table), content["replies"]
