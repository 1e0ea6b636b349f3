"""Playing experiments: runs of one in lockstep, one batch per question; saved batch by batch, so that a run resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from micro.analysis.fingerprints import comparable, steering_contexts
from micro.analysis.statistics import Array
from micro.errors import require
from micro.evaluation.cogbench.agents import Agent, ModelAgent, RandomAgent
from micro.evaluation.cogbench.baselines import RANDOM, Values, check_preset, human_values
from micro.evaluation.cogbench.bre import grouped, s_bre
from micro.evaluation.cogbench.experiment import Answer, Game, Query, Row
from micro.evaluation.cogbench.kept import Kept
from micro.evaluation.cogbench.registry import EXPERIMENTS, chosen, experiment
from micro.evaluation.cogbench.result import CogBenchResult
from micro.evaluation.cogbench.scoring import Score, evidence, resample
from micro.evaluation.cogbench.step_by_step import REASONING_TOKENS, VARIANTS, reasoned
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
    step_by_step: bool = False,
    reasoning_tokens: int | None = None,
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
        step_by_step: the model reasons before it answers (:mod:`micro.evaluation.cogbench.step_by_step`); the random
            agent of the baseline has nothing to think about.
        reasoning_tokens: length of such a reply, its final answer included; default 350. An agent has its own length
            (``max_new_tokens`` of :class:`ModelAgent`).
        output: a folder; every finished experiment is saved there, and of the one under way every batch of runs; both
            are found again by a later call with the same settings.
        progress: show bars on stderr.

    Returns:
        A :class:`CogBenchResult`; it is also saved where ``output`` is given.

    Raises:
        ValueError: unknown names, numbers out of range, ``reasoning_tokens`` without ``step_by_step`` or for an agent,
            an output folder that holds a run with other settings, or ``output`` inside ``model.intervene``, of which a
            folder could not tell.
        TypeError: a model without a tokenizer; ``output`` with controls that are functions.
        MissingExtraError: without pandas or SciPy (extra ``eval``).

    Source: CogBench (Coda-Forno et al. 2024), text completion, greedy, two tokens after a forced beginning; step by
    step 350 tokens, of which the final answer is read.
    """
    names = chosen(experiments)
    check_preset(preset)
    _check_reasoning_tokens(reasoning_tokens, step_by_step, model)
    counts = _run_counts(names, runs)
    _baseline_name(baseline, preset)
    for module in ("pandas", "scipy"):
        require(module, "eval", "micro.evaluation.cogbench")
    options = {"batch_size": batch_size, "max_new_tokens": reasoning_tokens}
    agent = _agent(model, tokenizer, preset, controls, options)
    folder = None if output is None else Path(output)
    if folder is not None and isinstance(agent, ModelAgent):
        agent.check_keepable()
    around = _variant(step_by_step, agent) | _around(folder)
    tables, replies = {}, {}
    for name in names:
        settings = {"agent": agent.name, "preset": preset, "runs": counts[name], "seed": seed, **around}
        kept = None if folder is None else Kept(folder, name, settings)
        saved = None if kept is None else kept.table()
        if saved is None:
            saved = play(
                name,
                agent,
                runs=counts[name],
                seed=seed,
                preset=preset,
                step_by_step=step_by_step,
                kept=kept,
                progress=progress,
            )
            if kept is not None:
                kept.save(*saved)
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
    result.agent, result.replies, result.variant = agent.name, replies, VARIANTS[step_by_step]
    result.settings |= {"runs": counts, **around}
    if folder is not None:
        result.save(folder)
    return result


def play(
    name: str,
    agent: Agent,
    *,
    runs: int | None = None,
    seed: int = 0,
    preset: str = "clean",
    step_by_step: bool = False,
    kept: Kept | None = None,
    progress: bool = False,
) -> tuple[Any, dict[str, int]]:
    """All runs of one experiment; ``step_by_step``: with room to reason before the answer; ``kept``: where runs that
    were played side by side are found again.

    Returns:
        The table (pandas frame), and ``{"questions": ..., "unreadable": ...}``: an unreadable reply counts as a random
        choice, an unreadable confidence as 0.
    """
    pd = require("pandas", "eval", "micro.evaluation.cogbench")
    known, which = experiment(name), list(EXPERIMENTS).index(name)
    runs = _run_counts([name], runs)[name]
    check_preset(preset)
    if isinstance(agent, RandomAgent):
        agent.begin(which)
    total = None if known.questions is None else runs * known.questions
    told = f"{name}, random agent" if isinstance(agent, RandomAgent) else name
    side_by_side = max(1, int(getattr(agent, "batch_size", runs)))
    counts = {"questions": 0, "unreadable": 0}
    rows: list[Row] = []
    with Progress(told, total, unit="questions", enabled=None if progress else False) as bar:
        for start in range(0, runs, side_by_side):
            wave = range(start, min(start + side_by_side, runs))
            if kept is not None and (part := kept.part(wave)) is not None:
                rows += part[0]
                counts = {key: counts[key] + part[1][key] for key in counts}
                bar.advance(part[1]["questions"], note="played before")
                continue
            before = dict(counts)
            games = {r: known.play(r, np.random.default_rng([seed, which, r, 0]), preset) for r in wave}
            guesses = {r: np.random.default_rng([seed, which, r, 1]) for r in wave}
            found = _lockstep(name, agent, games, guesses, preset, reasoned if step_by_step else None, counts, bar)
            played = [row for r in wave for row in found[r]]
            rows += played
            if kept is not None and len(wave) < runs:
                kept.save_part(wave, played, {key: counts[key] - before[key] for key in counts})
    return pd.DataFrame(rows), counts


def _lockstep(
    name: str,
    agent: Agent,
    games: Mapping[int, Game],
    guesses: Mapping[int, np.random.Generator],
    preset: str,
    put: Callable[[Query], Query] | None,
    counts: dict[str, int],
    bar: Progress,
) -> dict[int, list[Row]]:
    """Rows of runs that are played side by side, one batch of questions after the other."""
    waiting: dict[int, Query] = {}
    rows: dict[int, list[Row]] = {}
    for r, game in games.items():
        _step(game, None, r, waiting, rows)
    while waiting:
        asked = {r: query if put is None else put(query) for r, query in waiting.items()}
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


def _agent(
    model: Any, tokenizer: Any, preset: str, controls: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Agent:
    if isinstance(model, Agent):
        if controls:
            raise ValueError("cogbench: controls steer a model; an agent has none")
        return model
    if not hasattr(model, "generate") or not hasattr(model, "named_parameters"):
        raise TypeError(f"cogbench: model must be a causal language model or an agent, got {type(model).__name__}")
    return ModelAgent(model, tokenizer, controls=controls, trailing_space=preset == "published", **options)


def _variant(step_by_step: bool, agent: Agent) -> dict[str, Any]:
    """What tells the variant from the direct one, which kept tables do not name."""
    if not step_by_step:
        return {}
    if not isinstance(agent, ModelAgent):
        return {"variant": VARIANTS[1]}
    length = REASONING_TOKENS if agent.max_new_tokens is None else agent.max_new_tokens
    return {"variant": VARIANTS[1], "reasoning_tokens": length}


def _check_reasoning_tokens(reasoning_tokens: int | None, step_by_step: bool, model: Any) -> None:
    """Raises ValueError for a length that is no length, or that nothing would follow."""
    if reasoning_tokens is None:
        return
    if reasoning_tokens < 1:
        raise ValueError(f"cogbench: reasoning_tokens must be at least 1, got {reasoning_tokens}")
    if not step_by_step:
        raise ValueError(
            "cogbench: reasoning_tokens is the length of replies that reason; give step_by_step (--step-by-step) as "
            "well, or leave it out"
        )
    if isinstance(model, Agent):
        raise ValueError(
            "cogbench: reasoning_tokens is for a model, an agent has its own length; leave it out, or make the agent "
            "with ModelAgent(..., max_new_tokens=...)"
        )


def _around(folder: Path | None) -> dict[str, Any]:
    """The blocks of ``micro.steering`` that are open around a run, if any."""
    if not (blocks := steering_contexts()):
        return {}
    return {"steering": [[name, str(value)] for name, value in blocks] if folder is None else comparable(blocks)}


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
