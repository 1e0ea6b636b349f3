"""What differs between conditions, and how surely: paired over the same items, beside the published unpaired test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.ablations.published_tests import average, mcnemar, published_average, published_welch, stars
from micro.analysis.ablations.scores import Scores, ratio_error
from micro.analysis.statistics import Array, hierarchical_draws, holm, interval, permutation_p, ratio
from micro.analysis.suites import SHARE
from micro.errors import require

DRAWS = 10_000
AVERAGE = "Average"
EXACT_RECORDS = 14  # up to which all sign patterns are tried
FLIPS = 20_000
CHUNK = 1 << 22  # signs held at once

Line = dict[str, Any]
Integers = NDArray[np.int64]


def drawn_means(scores: Scores, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """Mean scores [draws, C, K] under resampling, the same resample for every condition.

    Records are drawn; where the suite names groups, groups and then records in each of them, row by row (Saravanan
    2020). Where groups do not differ, drawing at both levels counts the spread of records twice: the interval is wider
    than that over records, by up to the square root of 2.
    """
    if scores.groups is None:
        return hierarchical_draws([np.arange(len(scores.counts))], scores.weighted, draws=draws, seed=seed)
    return np.stack([_grouped_means(scores, row, draws, seed) for row in range(scores.counts.shape[1])], -1)


def _grouped_means(scores: Scores, row: int, draws: int, seed: int) -> Array:
    """[draws, C] of one row."""
    record, group, share = row_groups(scores, row)
    if not len(record):
        return np.full((draws, len(scores.conditions)), np.nan)
    sums, counts = scores.sums[:, record, row] * share, scores.counts[record, row] * share

    def means(weights: Array) -> Array:
        return ratio(weights @ sums.T, (weights @ counts)[:, None])

    return hierarchical_draws([group, record], means, draws=draws, seed=seed)


def row_groups(scores: Scores, row: int) -> tuple[Integers, Integers, Array]:
    """(record, group, share) of every membership in a row: a record of several groups counts in equal shares in each,
    one of none is a group of its own. Records without items of this row do not stand there.
    """
    assert scores.groups is not None
    present = np.flatnonzero(scores.counts[:, row] > 0).tolist()
    pairs: list[tuple[int, str | int, float]] = []
    for record in present:
        names: list[str | int] = [*scores.groups[record][row]] or [record]
        pairs += [(record, name, 1 / len(names)) for name in names]
    codes = {name: i for i, name in enumerate(dict.fromkeys(name for _, name, _ in pairs))}
    return (
        np.array([record for record, _, _ in pairs], np.int64),
        np.array([codes[name] for _, name, _ in pairs], np.int64),
        np.array([share for _, _, share in pairs], np.float64),
    )


def resampled(every: Sequence[Scores], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """For the settings of a result: ``resampled`` in words and, where groups are, their number in each row."""
    grouped = [scores for scores in every if scores.groups is not None]
    if not grouped:
        return {"resampled": "records"}
    told = "groups of records (templates), and records in them"
    if alone := [scores.traits.task for scores in every if scores.groups is None]:
        told += f"; of {', '.join(alone)} records"
    counts = {
        shown[row]: len(np.unique(row_groups(scores, row)[1]))
        for scores, shown in zip(every, names, strict=True)
        for row in scores.shown()
        if scores.groups is not None
    }
    return {"resampled": told, "groups": counts}


def paired_errors(scores: Scores) -> Array:
    """Standard errors [C,K] of the differences to the first condition, over records."""
    return ratio_error(scores.sums - scores.sums[:1], np.broadcast_to(scores.counts, scores.sums.shape))


def sign_flip_p(differences: Array, *, draws: int = FLIPS, seed: int = 0) -> Array:
    """Two-sided p of paired differences that are symmetric about 0 under the null: the signs of whole records are
    flipped (Fisher 1935; all patterns up to 14 records, random ones above). Right for any number of records.

    Args:
        differences: ``[records, ...]``, one sum per record.
        draws: random patterns.
        seed: of the patterns.

    Returns:
        float64, the shape without the first axis; 1 where all differences are 0.
    """
    flat = np.asarray(differences, dtype=np.float64).reshape(len(differences), -1)
    records = len(flat)
    observed = np.abs(flat.sum(0))
    bound = observed * (1 - 1e-12)
    exact = records <= EXACT_RECORDS
    total = 1 << records if exact else draws
    generator = np.random.default_rng(seed)
    count = np.zeros(flat.shape[1])
    step = max(1, CHUNK // max(records, flat.shape[1], 1))
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            patterns = (np.arange(start, start + size)[:, None] >> np.arange(records)) & 1
        else:
            patterns = generator.integers(0, 2, size=(size, records))
        count += (np.abs((2.0 * patterns - 1.0) @ flat) >= bound).sum(0)
    p = count / total if exact else (1 + count) / (1 + total)
    return np.asarray(p.reshape(np.shape(differences)[1:]))


def items_are_right_or_wrong(scores: Scores, row: int) -> bool:
    """Whether every record is one item of this row at most, and its score 0 or 1: what McNemar's test is for."""
    counts = scores.counts[:, row]
    return bool(np.isin(counts, (0, 1)).all() and np.isin(scores.sums[:, counts > 0, row], (0, 1)).all())


def claim_lines(every: Sequence[Scores], names: Sequence[Sequence[str]], *, draws: int, seed: int) -> list[Line]:
    """One line per row and condition but the first, and those of the average; Holm's correction over all of them.

    Args:
        every: scores of each suite; the first condition is the intact model.
        names: shown names of the rows of each suite.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Lines with the keys of :meth:`AblationReport.tests`; None where a number is not defined.
    """
    lines: list[Line] = []
    for scores, shown in zip(every, names, strict=True):
        drawn = drawn_means(scores, draws=draws, seed=seed)
        errors, paired = scores.errors(), paired_errors(scores)
        flips = sign_flip_p(np.moveaxis(scores.sums - scores.sums[:1], 0, 1), seed=seed)
        for row in scores.shown():
            for c in range(1, len(scores.conditions)):
                line = _line(scores, row, c, shown[row], errors[:, row], paired[:, row])
                lines.append(line | _tested(scores, row, c, drawn[:, c, row] - drawn[:, 0, row], float(flips[c, row])))
    lines += _average_lines(every)
    for line, p in zip(lines, holm([line["p"] for line in lines]), strict=True) if lines else ():
        line["p_holm"] = float(p)
    return [{key: None if value != value else value for key, value in line.items()} for line in lines]  # NaN


def _line(scores: Scores, row: int, c: int, name: str, errors: Array, paired: Array) -> Line:
    """A line without interval and paired test."""
    about, means = scores.traits, scores.means[:, row]
    factor, present = about.factor, scores.counts[:, row] > 0
    line = {
        "task": name, "ablated": scores.conditions[c].name, "unit": "points" if about.unit == SHARE else about.unit,
        "records": int(present.sum()), "items": int(scores.counts[:, row].sum()),
        "intact": float(means[0] * factor), "score": float(means[c] * factor),
        "intact_se": float(errors[0] * factor), "score_se": float(errors[c] * factor),
        "change": float((means[c] - means[0]) * factor), "se": float(paired[c] * factor),
    }  # fmt: skip
    return line | _published(means[c], errors[c], means[0], errors[0], float(present.sum()), factor)


def _tested(scores: Scores, row: int, c: int, drawn: Array, flipped: float) -> Line:
    """Interval and paired tests, from differences [draws] of resamples and the p of sign flips."""
    rise, factor = scores.means[c, row] - scores.means[0, row], scores.traits.factor
    low, high = interval(drawn * factor)
    test, p = "sign flips", flipped
    if items_are_right_or_wrong(scores, row):
        present = scores.counts[:, row] > 0
        test, p = "exact McNemar", mcnemar(scores.sums[0, present, row], scores.sums[c, present, row])
    bootstrap = float(permutation_p(rise, drawn - rise, alternative="two-sided"))
    return {"low": float(low), "high": float(high), "test": test, "p": p, "p_bootstrap": bootstrap}


def _published(score: float, se: float, intact: float, intact_se: float, n: float, factor: float) -> Line:
    """The published columns: records stand for its items."""
    if n < 2:
        return dict.fromkeys(("published_se", "published_t", "published_df", "published_p"), float("nan")) | {
            "published_stars": ""
        }
    welch = published_welch(score, se, n, intact, intact_se, n)
    return {
        "published_se": float(welch.se) * factor,
        "published_t": float(welch.t),
        "published_df": float(welch.df),
        "published_p": float(welch.p),
        "published_stars": stars(float(welch.p)),
    }


def _average_lines(every: Sequence[Scores]) -> list[Line]:
    """The mean over tasks whose score is a share, all items of a task pooled; tasks are independent, so errors add up
    as squares.
    """
    tasks = [_pooled(scores) for scores in every if scores.traits.unit == SHARE]
    if len(tasks) < 2:
        return []
    made = []
    for c in range(1, len(tasks[0].conditions)):
        some = [_line(task, 0, c, "", task.errors()[:, 0], paired_errors(task)[:, 0]) for task in tasks]
        made.append(_average_line(tasks[0].conditions[c].name, some))
    return made


def _pooled(scores: Scores) -> Scores:
    """All rows of a task as one, without a row that repeats the others (``joint`` of the suite)."""
    joint = getattr(scores.suite, "joint", None)
    rows = [k for k in range(scores.counts.shape[1]) if k != joint]
    sums, counts = scores.sums[..., rows].sum(-1, keepdims=True), scores.counts[:, rows].sum(-1, keepdims=True)
    return replace(scores, sums=sums, counts=counts, groups=None)  # errors only: nothing is drawn


def _average_line(ablated: str, some: Sequence[Line]) -> Line:
    n = [line["records"] for line in some]
    ours = {
        name: average([x[name] for x in some], [x[error] for x in some], n)
        for name, error in (("intact", "intact_se"), ("score", "score_se"), ("change", "se"))
    }
    change, se = ours["change"].mean, ours["change"].se
    normal = require("scipy.stats", "eval", "the average's test").norm
    p = float(2 * normal.sf(abs(change) / se)) if se > 0 else float("nan") if change else 1.0
    old, new = (
        published_average([x[name] for x in some], [x[error] for x in some], n)
        for name, error in (("intact", "intact_se"), ("score", "score_se"))
    )
    line = {
        "task": AVERAGE, "ablated": ablated, "unit": "points", "records": int(ours["score"].n),
        "items": sum(x["items"] for x in some), "intact": ours["intact"].mean, "score": ours["score"].mean,
        "intact_se": ours["intact"].se, "score_se": ours["score"].se, "change": change, "se": se,
        "low": change - 1.959964 * se, "high": change + 1.959964 * se, "test": "z of the mean", "p": p,
        "p_bootstrap": float("nan"),
    }  # fmt: skip
    return line | _published(new.mean, new.se, old.mean, old.se, new.n, 1.0)


def best_lines(
    choose: Sequence[Scores],
    report: Sequence[Scores],
    names: Sequence[Sequence[str]],
    candidates: Sequence[int],
    *,
    chosen_on: str,
    draws: int,
    seed: int,
) -> list[Line]:
    """For each row the condition with the best score on ``choose``, and what it gives on ``report``.

    Args:
        choose: scores that decide, suite by suite.
        report: scores that are reported; the same object where the choice is optimistic.
        names: shown names of the rows of each suite.
        candidates: conditions that may be chosen.
        chosen_on: what ``choose`` is, in words.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Lines with task, best, chosen_on, optimistic, unit, intact, score, change, low, high.
    """
    lines: list[Line] = []
    for deciding, scores, shown in zip(choose, report, names, strict=True):
        drawn = drawn_means(scores, draws=draws, seed=seed)
        factor = scores.traits.factor
        for row in sorted({*scores.shown()} & {*deciding.shown()}):
            worth = scores.traits.sign * deciding.means[list(candidates), row]
            c = candidates[int(np.argmax(worth))]
            means = scores.means[:, row] * factor
            low, high = interval((drawn[:, c, row] - drawn[:, 0, row]) * factor)
            lines.append(
                {
                    "task": shown[row],
                    "best": scores.conditions[c].name,
                    "chosen_on": chosen_on,
                    "optimistic": deciding is scores,
                    "unit": "points" if scores.traits.unit == SHARE else scores.traits.unit,
                    "intact": float(means[0]),
                    "score": float(means[c]),
                    "change": float(means[c] - means[0]),
                    "low": float(low),
                    "high": float(high),
                }
            )
    return lines


def split_records(scores: Scores, share: float, seed: int) -> tuple[Scores, Scores]:
    """(validation, test): ``share`` of the records, drawn at random, and the others.

    Raises:
        ValueError: a part would have no record.
    """
    records = len(scores.counts)
    order = np.random.default_rng(seed).permutation(records)
    cut = round(records * share)
    if not 0 < share < 1 or cut in (0, records):
        raise ValueError(
            f"validation: a share must lie between 0 and 1 and leave records on both sides, got {share} of {records}"
        )
    parts = [np.sort(order[:cut]), np.sort(order[cut:])]
    first, second = (_some_records(scores, part) for part in parts)
    return first, second


def _some_records(scores: Scores, part: Integers) -> Scores:
    groups = None if scores.groups is None else [scores.groups[record] for record in part.tolist()]
    return replace(scores, sums=scores.sums[:, part], counts=scores.counts[part], groups=groups)
