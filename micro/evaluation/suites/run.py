"""One command for all offline suites: items, scores per condition, intervals; what is done is kept and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from micro.analysis.ablations.scores import expert_names
from micro.analysis.fingerprints import comparable, model_fingerprint, open_session, steering_contexts
from micro.analysis.statistics import Array, binomial_interval, bootstrap, ratio
from micro.errors import MissingExtraError, choices, require
from micro.evaluation.candidates import split_controls
from micro.evaluation.suites import arithmetic, facts, grammar, gym, reasoning, syntaxgym, theory_of_mind, wordnet
from micro.evaluation.suites.choice import ChoiceSuite, OfflineSuite
from micro.evaluation.suites.items import SPLITS, draw_records
from micro.evaluation.suites.result import ALL, SuitesResult
from micro.files import write_text

# Task -> where its items come from, in the order of the domains in figures.
TASKS: dict[str, ModuleType] = {
    "syntaxgym": syntaxgym,
    "grammar": grammar,
    "arithmetic": arithmetic,
    "logic": reasoning,
    "reasoning_gym": gym,
    "theory_of_mind": theory_of_mind,
    "facts": facts,
    "wordnet": wordnet,
}
_PER_BYTE = ("facts", "wordnet")  # their candidates differ in length
_JOINT = {"theory_of_mind": "both twins right"}


def make(
    task: str,
    tokenizer: Any,
    *,
    items: int | None = 60,
    split: str = "test",
    seed: int = 0,
    normalization: str | None = None,
    chat: bool = False,
    max_tokens: int = 2048,
) -> OfflineSuite:
    """One suite, as :func:`micro.analysis.ablation` and other analyses take it.

    Args:
        task: a key of :data:`TASKS`.
        tokenizer: of the model.
        items: records (theory of mind: stories with their twins), over all templates; fewer where there are no more.
            SyntaxGym takes the first ones of each of its suites, evenly. None: 60, and all of SyntaxGym.
        split: "train" or "test": items of templates that the other one does not have. SyntaxGym has "test" only.
        seed: of the items.
        normalization: "sum", "tokens" or "bytes"; default "sum", for facts and wordnet "bytes". SyntaxGym has none.
        chat: put prompts into the chat template. SyntaxGym has none.
        max_tokens: slots per batch.

    Raises:
        ValueError: an unknown task or split.
        MissingExtraError, FileNotFoundError: what the task needs is not on this machine.
    """
    if task not in TASKS:
        raise ValueError(f"suites: unknown task {task!r}; {choices(task, TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"suites: split must be 'train' or 'test', got {split!r}")
    if items is not None and items < 1:
        raise ValueError(f"suites: items must be at least 1, got {items}")
    module = TASKS[task]
    if task == "syntaxgym":
        if split != "test":
            raise ValueError("suites: syntaxgym has no training split")
        return syntaxgym.SyntaxGym(tokenizer, items=items, max_tokens=max_tokens)
    return ChoiceSuite(
        task,
        draw_records(module.draws(split), items or 60, task=task, split=split, seed=seed),
        tokenizer,
        domain=module.DOMAIN,
        normalization=normalization or ("bytes" if task in _PER_BYTE else "sum"),
        joint=_JOINT.get(task),
        chat=chat,
        max_tokens=max_tokens,
        settings={"version": module.VERSION, "split": split, "seed": seed},
    )


def run(
    model: Any,
    tokenizer: Any,
    *,
    tasks: str | Sequence[str] | None = None,
    items: int | None = 60,
    split: str = "test",
    seed: int = 0,
    ablate: bool | Sequence[str | Sequence[str]] = False,
    controls: Mapping[str, Any] | None = None,
    normalization: str | None = None,
    chat: bool = False,
    draws: int = 2000,
    max_tokens: int = 2048,
    output: str | Path | None = None,
    progress: bool = False,
) -> SuitesResult:
    """Score a model on the offline suites.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer.
        tasks: names; all whose data are on this machine if not given (the result tells which were left out).
        items: see :func:`make`.
        split: see :func:`make`.
        seed: of items and bootstrap.
        ablate: also with each expert removed, or with each of these sets.
        controls: steering arguments of every condition.
        normalization: see :func:`make`.
        chat: see :func:`make`.
        draws: of the bootstrap.
        max_tokens: slots per batch.
        output: a folder; every finished task and condition is kept there, and found again by a later call with the
            same model, items and steering.
        progress: show bars on stderr.

    Returns:
        A :class:`SuitesResult`; it is also saved where ``output`` is given. Not comparable with published benchmarks.

    Raises:
        ValueError: unknown names or numbers out of range.
        MissingExtraError, FileNotFoundError: a task was named whose data are not on this machine.
    """
    require("scipy.stats", "eval", "the intervals of the suites")  # before hours of scoring
    if draws < 1:
        raise ValueError(f"suites: draws must be at least 1, got {draws}")
    split_controls(model.config, controls or {})
    options = {"items": items, "split": split, "seed": seed, "normalization": normalization, "chat": chat}
    suites, missing = _suites(tasks, tokenizer, {**options, "max_tokens": max_tokens})
    conditions = _conditions(model, ablate, controls or {})
    kept = _Kept(None if output is None else Path(output) / "parts", model)
    result = SuitesResult(
        conditions=list(conditions),
        rows=[],
        tasks={suite.task: {**suite.settings, "fingerprint": suite.fingerprint} for suite in suites},
        missing=missing,
        settings={
            **options,
            "controls": {name: str(value) for name, value in (controls or {}).items()},
            "bootstrap_draws": draws,
            "interval": "95 %; rows say whether exact binomial or bootstrap over records",
            "change_interval": "95 % bootstrap over records, paired between conditions",
        },
    )
    for suite in suites:
        found = {
            name: kept(suite, given, _told(suite.task, name), progress=progress) for name, given in conditions.items()
        }
        result.outcomes[suite.task] = found
        result.rows += summarise(suite, list(found.values()), draws=draws, seed=seed)
    if output is not None:
        result.save(output)
    return result


def _suites(
    tasks: str | Sequence[str] | None, tokenizer: Any, options: Mapping[str, Any]
) -> tuple[list[OfflineSuite], dict[str, str]]:
    """The suites, and what is missing for those that nobody asked for by name."""
    if tasks is not None:
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        if not names:
            raise ValueError("suites: give at least one task")
        return [make(name, tokenizer, **options) for name in dict.fromkeys(names)], {}
    suites: list[OfflineSuite] = []
    missing = {}
    for name in TASKS:
        if name == "syntaxgym" and options["split"] != "test":
            continue
        try:
            suites.append(make(name, tokenizer, **options))
        except (MissingExtraError, FileNotFoundError) as error:
            missing[name] = str(error)
    return suites, missing


def _conditions(
    model: Any, ablate: bool | Sequence[str | Sequence[str]], controls: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Name -> controls; the first removes nothing."""
    found: dict[str, dict[str, Any]] = {"none": dict(controls)}
    if ablate is False:
        return found
    if {"ablate", "keep"} & set(controls):
        raise ValueError("suites: with ablate=..., controls may not hold ablate or keep")
    for chosen in expert_names(model) if ablate is True else ablate:
        experts = [chosen] if isinstance(chosen, str) else list(chosen)
        given = {**controls, "ablate": experts}
        split_controls(model.config, given)
        found["+".join(experts)] = given
    return found


def _told(task: str, condition: str) -> str:
    return task if condition == "none" else f"{task} without {condition}"


class _Kept:
    """Outcomes of finished tasks and conditions, in files of a folder."""

    def __init__(self, folder: Path | None, model: Any) -> None:
        self.folder, self.model = folder, model
        if folder is not None and open_session(model) is not None:
            raise ValueError("suites.run: outcomes cannot be kept in a folder inside model.intervene; give no output")
        self._model = "" if folder is None else model_fingerprint(model)

    def __call__(
        self, suite: OfflineSuite, controls: Mapping[str, Any], told: str, *, progress: bool
    ) -> list[dict[str, Any]]:
        shown = told if progress else False
        if self.folder is None:
            return suite.outcomes(self.model, controls, progress=shown)
        key = [self._model, suite.fingerprint, comparable(controls), comparable(steering_contexts())]
        path = self.folder / f"{suite.task}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
        if path.is_file():
            content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["outcomes"]
            return content
        outcomes = suite.outcomes(self.model, controls, progress=shown)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"told": told, "outcomes": outcomes}, ensure_ascii=False) + "\n")
        return outcomes


def summarise(
    suite: OfflineSuite, outcomes: Sequence[Sequence[Mapping[str, Any]]], *, draws: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of :class:`SuitesResult`: scores of each condition with intervals, the mean over rows last.

    Scores of items that are right or wrong, one per record, have exact binomial intervals
    (:func:`micro.analysis.statistics.binomial_interval`). Those of a mean over rows p_k with bounds l_k, u_k are
    p - d(l), p + d(u) with d(l)^2 = sum (w_k (p_k - l_k))^2 (Zou and Donner 2008); where rows share records, d(l) is
    the sum itself, which holds under any dependence. Other scores, and all changes, are bootstrapped over records.

    Args:
        suite: what was asked.
        outcomes: of each condition, the first without ablation.
        draws: of the bootstrap over records, the same draws for all conditions.
        seed: of the bootstrap.
    """
    tables = [suite.tally(some) for some in outcomes]
    sums, counts = np.stack([s for s, _ in tables]), tables[0][1]
    plain = [k for k in range(len(suite.names)) if k != suite.joint]

    def scores(weights: Array) -> Array:
        """[conditions, rows + 1, 2]: score, and change against the first condition."""
        means = ratio(np.einsum("crk,r->ck", sums, weights), weights @ counts)
        means = np.concatenate([means, np.nanmean(means[:, plain], axis=1, keepdims=True)], 1)
        return np.stack([means, means - means[:1]], -1)

    everything = scores(np.ones(suite.records))
    low, high = bootstrap(suite.records, scores, draws=draws, seed=seed)
    bounds = np.stack([low, high], -1)  # [conditions, rows + 1, score or change, 2]
    exact = _exact_bounds(sums, counts, plain)
    known = ~np.isnan(exact)
    bounds[:, :, 0][known] = exact[known]
    by_rule = {rule: [*values, float(np.mean([values[k] for k in plain]))] for rule, values in suite.rules().items()}
    chance = [*suite.chance, float(np.mean([suite.chance[k] for k in plain]))]
    rows = []
    for k, name in enumerate([*suite.names, ALL]):
        rule = max(by_rule, key=lambda r: by_rule[r][k]) if by_rule else None
        rows.append(
            {
                "task": suite.task,
                "domain": suite.domain,
                "row": name,
                "items": int(counts[:, k].sum() if k < len(suite.names) else counts[:, plain].sum()),
                "chance": chance[k],
                "rule": rule,
                "rule_score": None if rule is None else by_rule[rule][k],
                "score": everything[:, k, 0].tolist(),
                "interval": bounds[:, k, 0].tolist(),
                "interval_by": "binomial" if known[:, k].all() else "bootstrap",
                "change": everything[:, k, 1].tolist(),
                "change_interval": bounds[:, k, 1].tolist(),
            }
        )
    return rows


def _exact_bounds(sums: Array, counts: Array, plain: Sequence[int]) -> Array:
    """Binomial bounds [conditions, rows + 1, 2] of sums [conditions, records, rows]; NaN where items are no independent
    trials. The last row is the mean over the rows ``plain``.
    """
    trials = (counts <= 1).all(0) & ((sums == 0) | (sums == 1)).all((0, 1))
    right, items = sums.sum(1), counts.sum(0)
    bounds = np.where(trials[:, None], np.stack(binomial_interval(right, items), -1), np.nan)
    share, own = ratio(right, items)[:, plain], bounds[:, plain]
    reach = np.abs(own - share[..., None]) / len(plain)  # below and above, of each row
    together = (counts[:, plain] > 0).sum(1).max() > 1
    reach = reach.sum(1) if together else np.sqrt((reach**2).sum(1))
    mean = share.mean(1)
    return np.concatenate([bounds, np.stack([mean - reach[:, 0], mean + reach[:, 1]], -1)[:, None]], 1)
