"""Reading times: what a word's surprisal adds to its length, its frequency and the spill-over of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from micro.analysis.alignment.result import ReadingTimesResult
from micro.analysis.alignment.ridge import Rows, contiguous_folds
from micro.analysis.batches import batches, text_row, token_losses
from micro.analysis.modes import evaluating
from micro.analysis.statistics import Array, interval, label_codes, permutation_p
from micro.errors import require
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd

    from micro.modeling import MiCRoForCausalLM

COLUMNS = ("sentence", "word", "time")


def word_surprisal(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    *,
    controls: Mapping[str, Any] | None = None,
    max_tokens: int = 2048,
    progress: bool = False,
) -> list[Array]:
    """Surprisal of every word in nats, ``-log P(word | words before it in its sentence)``.

    Words are joined by single spaces; the space in front belongs to its word, and the tokens of a word are summed. A
    token without anything before it (no beginning-of-sequence token) has no surprisal: its word is NaN.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer, a fast one (offsets are needed).
        sentences: words of each sentence.
        controls: steering arguments of the forward passes: surprisal without an expert, say.
        max_tokens: slots per batch.
        progress: show a bar on stderr.

    Returns:
        One float64 array per sentence, as long as its words.

    Raises:
        ValueError: an empty sentence or word, or a tokenizer without offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("word_surprisal needs a fast tokenizer, which tells the characters of a token")
    out, rows, owners = [], [], []
    for i, words in enumerate(sentences):
        if not len(words) or not all(word.strip() for word in words):
            raise ValueError(f"sentences: number {i} is empty or holds an empty word")
        out.append(np.zeros(len(words)))
        encoded = tokenizer(" ".join(words), return_offsets_mapping=True)
        owners.append(_owners(words, encoded["offset_mapping"]))
        rows.append((i, text_row(encoded["input_ids"])))
    work = list(batches(rows, tokenizer, max_tokens=max_tokens))
    with evaluating(model):
        for numbers, batch in track(work, "surprisal", unit="batches", enabled=progress):
            losses = token_losses(model, batch, **(controls or {})).double().numpy()
            for row, i in enumerate(numbers):
                for slot, word in enumerate(owners[i]):
                    if word is not None:
                        out[i][word] += losses[row, slot - 1] if slot else np.nan
    return out


def _owners(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """Index of the word of each token; None for special tokens."""
    text = " ".join(words)
    word_of = np.repeat(np.arange(len(words)), [len(word) + 1 for word in words])
    owners: list[int | None] = []
    for begin, end in offsets:
        # A space that is a token of its own begins the next word.
        inside = [c for c in range(begin, end) if not text[c].isspace()] or [end]
        owners.append(int(word_of[inside[0]]) if begin < end and inside[0] < len(text) else None)
    return owners


def reading_times(
    table: pd.DataFrame | str | Path,
    surprisals: Mapping[str, ArrayLike],
    *,
    spillover: int = 1,
    surprisal_spillover: bool = False,
    log_time: bool = False,
    folds: int = 5,
    permutations: int = 99,
    draws: int = 2000,
    seed: int = 0,
) -> ReadingTimesResult:
    """Gain in log-likelihood per word when surprisal is added to length, log frequency and their spill-over.

    Ordinary least squares with Gaussian errors; the same words enter all models.

    Args:
        table: frame or CSV file in reading order with columns ``sentence``, ``word``, ``time`` (per word; empty where
            it was skipped) and ``frequency`` (above 0, any unit) or ``log_frequency``.
        surprisals: name -> one number per row of the table, nats; NaN where it is unknown.
        spillover: words before that count, by their length and frequency.
        surprisal_spillover: the surprisals of those words enter together with the word's own.
        log_time: model the logarithm of the times.
        folds: of the held-out gain; contiguous blocks of sentences.
        permutations: shufflings of surprisal over words, for the null of the held-out gain.
        draws: bootstrap draws over sentences.
        seed: of both.

    Returns:
        A :class:`ReadingTimesResult`; contrasts compare the first surprisal with each other one.

    Raises:
        ValueError: missing columns, lengths that differ, impossible numbers, or too few words.

    Source: Smith and Levy 2013; gain per word as in Goodkind and Bicknell 2018.
    """
    frame = read_table(table)
    baseline, names = _baseline(frame, spillover)
    added = {
        name: _added(frame, values, name, spillover if surprisal_spillover else 0)
        for name, values in surprisals.items()
    }
    if not added:
        raise ValueError("surprisals: give at least one")
    time = frame["time"].to_numpy(dtype=np.float64)
    kept, left_out = _kept(time, baseline, added)
    x, y = baseline[kept], np.log(time[kept]) if log_time else time[kept]
    sentence = frame["sentence"].to_numpy()[kept]
    parts = contiguous_folds(len(y), folds, label_codes(sentence))
    order = np.random.default_rng(seed)
    shuffles = [order.permutation(len(y)) for _ in range(permutations)]
    weights = _sentence_weights(sentence, draws, seed)
    base = _held_out(x, y, parts)
    models, gains = [], {}
    for name, extra in added.items():
        extra = extra[kept]
        gains[name] = _held_out(np.concatenate([x, extra], 1), y, parts) - base
        null = [_held_out(np.concatenate([x, extra[s]], 1), y, parts).mean() - base.mean() for s in shuffles]
        models.append(_model(name, x, extra, y, gains[name], np.array(null), weights))
    return ReadingTimesResult(
        words=len(y),
        sentences=len(np.unique(sentence)),
        left_out=left_out,
        predictors=names,
        models=models,
        contrasts=_contrasts(gains, weights),
        settings={
            "spillover": spillover,
            "surprisal_spillover": surprisal_spillover,
            "log_time": log_time,
            "folds": folds,
            "permutations": permutations,
            "draws": draws,
            "seed": seed,
            "unit": "nats per word",
        },
    )


def read_table(table: pd.DataFrame | str | Path) -> pd.DataFrame:
    """The table of :func:`reading_times`, checked, with a column ``log_frequency``.

    Raises:
        ValueError: as there.
    """
    pandas = require("pandas", "eval", "reading times")
    frame = pandas.read_csv(table) if isinstance(table, str | Path) else table.reset_index(drop=True)
    missing = [name for name in COLUMNS if name not in frame]
    if missing or not {"frequency", "log_frequency"} & set(frame):
        raise ValueError(
            f"the table needs columns {', '.join(COLUMNS)} and frequency or log_frequency; it has {', '.join(frame)}"
        )
    sentences = frame["sentence"].to_numpy()
    if len(np.unique(sentences)) != 1 + int((sentences[1:] != sentences[:-1]).sum()):
        raise ValueError("column 'sentence': the words of a sentence must stand together, in reading order")
    if not bool((frame["time"].dropna() > 0).all()):
        raise ValueError("column 'time': times must be above 0, or empty where a word was skipped")
    if "log_frequency" not in frame:
        if not bool((frame["frequency"] > 0).all()):
            raise ValueError("column 'frequency': must be above 0; smooth the counts of words that never occur")
        frame = frame.assign(log_frequency=np.log(frame["frequency"].to_numpy(dtype=np.float64)))
    return frame


def _baseline(frame: pd.DataFrame, spillover: int) -> tuple[Array, list[str]]:
    """Length and log frequency of the word and of those before it in its sentence ``[rows, 2 (1 + spillover)]``."""
    own = np.stack(
        [np.array([len(str(word)) for word in frame["word"]], dtype=np.float64),
         frame["log_frequency"].to_numpy(dtype=np.float64)], 1)  # fmt: skip
    columns, names = [own], ["length", "log frequency"]
    for back in range(1, spillover + 1):
        columns.append(_before(own, frame["sentence"].to_numpy(), back))
        names += [f"length {back} before", f"log frequency {back} before"]
    return np.concatenate(columns, 1), names


def _before(values: Array, sentence: Any, back: int) -> Array:
    """The values of the word ``back`` places before, NaN at the start of a sentence."""
    out = np.full_like(values, np.nan)
    same = sentence[back:] == sentence[:-back]
    out[back:][same] = values[:-back][same]
    return out


def _added(frame: pd.DataFrame, values: ArrayLike, name: str, spillover: int) -> Array:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (len(frame),):
        raise ValueError(f"surprisals[{name!r}]: {len(frame)} words need one number each, got {list(column.shape)}")
    columns = [column[:, None]]
    columns += [_before(columns[0], frame["sentence"].to_numpy(), back) for back in range(1, spillover + 1)]
    return np.concatenate(columns, 1)


def _kept(time: Array, baseline: Array, added: Mapping[str, Array]) -> tuple[Any, dict[str, int]]:
    """Rows that every model can use, and how many others there are, by the first reason that holds."""
    reasons = {
        "without a time": np.isnan(time),
        "at the start of a sentence": np.isnan(baseline).any(1),
        "without surprisal": np.any([~np.isfinite(extra).all(1) for extra in added.values()], axis=0),
    }
    lost = np.zeros(len(time), dtype=bool)
    left_out = {}
    for reason, rows in reasons.items():
        left_out[reason] = int((rows & ~lost).sum())
        lost |= rows
    needed = 3 * (baseline.shape[1] + 2)
    if (~lost).sum() < needed:
        raise ValueError(
            f"{int((~lost).sum())} of {len(time)} words are left, at least {needed} are needed: {left_out}"
        )
    return ~lost, left_out


def _held_out(x: Array, y: Array, folds: Sequence[Rows]) -> Array:
    """Log density of every word ``[n]`` under a regression fitted without its fold; variance by maximum likelihood."""
    design = np.concatenate([np.ones((len(y), 1)), x], 1)
    out = np.empty(len(y))
    for rows in folds:
        train = np.delete(np.arange(len(y)), rows)
        weights = np.linalg.lstsq(design[train], y[train], rcond=None)[0]
        variance = float(np.mean((y[train] - design[train] @ weights) ** 2))
        errors = y[rows] - design[rows] @ weights
        out[rows] = -0.5 * (np.log(2 * np.pi * variance) + errors**2 / variance)
    return out


def _model(name: str, x: Array, extra: Array, y: Array, gain: Array, null: Array, weights: Array) -> dict[str, Any]:
    api = require("statsmodels.api", "eval", "reading times")
    small = api.OLS(y, api.add_constant(x)).fit()
    large = api.OLS(y, api.add_constant(np.concatenate([x, extra], 1))).fit()
    f, p, _ = large.compare_f_test(small)
    low, high = interval(weights @ gain / weights.sum(1))
    first = 1 + x.shape[1]
    return {
        "name": name,
        "gain": float(large.llf - small.llf) / len(y),
        "gain_held_out": float(gain.mean()),
        "interval": [float(low), float(high)],
        "null_95": float(np.quantile(null, 0.95)),
        "null_mean": float(null.mean()),
        "p": float(permutation_p(gain.mean(), null)),
        "coefficient": float(large.params[first]),
        "standard_error": float(large.bse[first]),
        "f": float(f),
        "f_p": float(p),
    }


def _contrasts(gains: Mapping[str, Array], weights: Array) -> list[dict[str, Any]]:
    first, *rest = gains
    out = []
    for other in rest:
        difference = gains[first] - gains[other]
        drawn = weights @ difference / weights.sum(1)
        low, high = interval(drawn)
        mean = float(difference.mean())
        out.append(
            {
                "first": first,
                "second": other,
                "difference": mean,
                "interval": [float(low), float(high)],
                "p": float(permutation_p(mean, drawn - mean, alternative="two-sided")),
            }
        )
    return out


def _sentence_weights(sentence: Any, draws: int, seed: int) -> Array:
    """How often each word is drawn when whole sentences are, ``[draws, n]``."""
    codes = label_codes(sentence)
    count = int(codes.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return drawn[:, codes].astype(np.float64)
