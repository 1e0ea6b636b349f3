"""Alignment of feature sets with responses: scores, intervals, nulls, contrasts and the self-test, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from micro.analysis.alignment.ceiling import Ceiling
from micro.analysis.alignment.cka import shuffled_grams, unit_gram, uses_unbiased
from micro.analysis.alignment.contrasts import check_pairs, group_contrasts, network_table
from micro.analysis.alignment.features import FeatureSet, feature_sets
from micro.analysis.alignment.resampling import block_orders, block_weights, blocks_of, resampled_scores
from micro.analysis.alignment.responses import Responses
from micro.analysis.alignment.result import AlignmentResult
from micro.analysis.alignment.ridge import LAMBDAS, Encoder, Rows, contiguous_folds, matrix
from micro.analysis.alignment.rsa import has_rdm, shuffled_triangles, triangle
from micro.analysis.alignment.selftest import Target, ranking, targets
from micro.analysis.statistics import Array, interval, permutation_p
from micro.progress import track

METRICS = ("ridge", "rsa", "topological_rsa", "cka")
NULL_POWER = 0.5  # shuffled blocks hold about √n rows
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Options:
    """Settings of :func:`align`, as documented there."""

    metrics: tuple[str, ...] | None = None
    folds: int = 5
    inner_folds: int = 5
    lambdas: tuple[float, ...] = LAMBDAS
    permutations: int = 99
    draws: int = 1000
    rank_quantiles: tuple[float, float] = (0.2, 0.8)
    unbiased_cka: bool | None = None
    self_test_reliability: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        metrics = METRICS if self.metrics is None else self.metrics
        if set(metrics) - set(METRICS) or "ridge" not in metrics:
            raise ValueError(f"metrics must hold ridge and may hold {', '.join(METRICS[1:])}; got {self.metrics}")
        if self.permutations < 1 or self.draws < 1:
            raise ValueError("permutations and draws must be at least 1: a score ships with its null and its interval")

    def resolved(self, y: Array, sets: Sequence[FeatureSet]) -> Options:
        """With all metrics that the data allow if none were chosen, and one estimator of CKA for all sets."""
        missing = [name for name, x in (("responses", y), *((s.name, s.values) for s in sets)) if not has_rdm(x)]
        metrics = self.metrics or (("ridge", "cka") if missing else METRICS)
        if missing and len({"rsa", "topological_rsa"} & set(metrics)):
            raise ValueError(f"metrics: no RSA of {missing[0]!r}: it has one column, or a stimulus without variance")
        widest = max(s.values.shape[1] for s in sets)
        unbiased = uses_unbiased(len(y), widest) if self.unbiased_cka is None else self.unbiased_cka
        return replace(self, metrics=metrics, unbiased_cka=unbiased)


@dataclass
class _Data:
    """The responses that are scored, and everything that all feature sets share."""

    y: Array  # [n, included]
    ceiling: Ceiling | None
    kept: Array  # bool [v]
    networks: list[str]  # names in order of appearance
    members: Array  # bool [networks, included]
    groups: Any
    folds: list[Rows]
    weights: Array  # [draws, n]
    orders: list[Rows]
    excluded: dict[str, int]

    def summaries(self, r: Array) -> Array:
        """``[D,v]`` -> ``[D, 2 + networks]``: median, median over the ceiling (NaN without), median per network."""
        columns = [np.median(r, axis=1)]
        columns.append(np.full(len(r), np.nan) if self.ceiling is None else np.median(self.normalised(r), axis=1))
        columns += [np.median(r[:, member], axis=1) for member in self.members]
        return np.stack(columns, 1)

    def normalised(self, r: Array) -> Array:
        assert self.ceiling is not None
        result: Array = r / np.sqrt(self.ceiling.reliability[self.kept])
        return result


@dataclass
class Scored:
    """One feature set: its entry in the result, and what contrasts and networks need: ``[..., 2 + networks]``."""

    features: FeatureSet
    entry: dict[str, Any]
    point: Array  # [2 + networks]
    draws: Array
    by_fold: Array
    r: Array  # [included]
    null: Array  # [permutations]
    self_test: dict[str, Array] = field(default_factory=dict)  # metric -> score per target


def align(
    features: Sequence[FeatureSet] | Mapping[str, ArrayLike],
    responses: Responses | ArrayLike,
    *,
    controls: Mapping[str, Sequence[ArrayLike]] | None = None,
    contrasts: Sequence[tuple[str, str]] | None = None,
    progress: bool = False,
    **options: Any,
) -> AlignmentResult:
    """How well each feature set accounts for measured responses, with intervals, nulls, contrasts and a self-test.

    Args:
        features: name -> ``[n,d]``, or :class:`FeatureSet` objects (``pooled_activations(...).sets()``).
        responses: :class:`Responses`, or an array ``[n,v]``.
        controls: set -> other features ``[n,d]`` of the same size (random units): is the set better than those?
        contrasts: pairs of names of sets or groups to compare; None: all pairs of experts of the first model, and the
            same expert of different models. A group is the mean over the layers of one expert of one model.
        progress: show a bar on stderr.
        **options: ``metrics`` ("ridge" and any of "rsa", "topological_rsa", "cka"; all that the columns allow),
            ``folds`` (5), ``inner_folds`` (5), ``lambdas`` (1e-3 .. 1e6), ``permutations`` (99: shuffled blocks of
            responses, refitted with the penalties chosen for the real ones), ``draws`` (1000: bootstrap over blocks of
            stimuli), ``rank_quantiles`` (0.2, 0.8: clipping of the topological RSA), ``unbiased_cka`` (None: where
            n < 10 d of the widest set), ``self_test_reliability`` (None: the median ρ' of the data, or 0.5),
            ``seed``, ``device``.

    Returns:
        An :class:`AlignmentResult`; ``self_test`` in it says whether each metric would have found a known layer.

    Raises:
        ValueError: arguments that do not fit each other, or no voxel with a reliability above 0.05.
        TypeError: an unknown option.

    Source: model.md 9.10; encoding scores as in Schrimpf et al. 2021, self-test after Han, Poggio and Cheung 2023.
    """
    settings = Options(**options)
    sets = feature_sets(features)
    known = responses if isinstance(responses, Responses) else Responses(np.asarray(responses))
    data = _prepare(known, len(sets[0].values), settings)
    settings = settings.resolved(data.y, sets)
    check_pairs(sets, contrasts)
    extra = {
        name: [matrix(values, f"controls[{name!r}]") for values in given] for name, given in (controls or {}).items()
    }
    _check_controls(extra, sets)
    reliability = _typical(data) if settings.self_test_reliability is None else settings.self_test_reliability
    aims = targets(sets, reliability=reliability, seed=settings.seed)
    tests = _SelfTests(aims, settings)
    work = track(sets, "alignment", unit="sets", enabled=progress)
    scored = [_score(entry, data, settings, tests) for entry in work]
    best = np.max([s.null for s in scored], axis=0)
    for one in scored:
        one.entry["p_family"] = float(permutation_p(one.entry["score"], best))
    return AlignmentResult(
        stimuli=len(data.y),
        voxels_included=data.y.shape[1],
        voxels_excluded=data.excluded,
        ceiling=None if data.ceiling is None else float(np.median(np.sqrt(data.ceiling.reliability[data.kept]))),
        sets=[s.entry for s in scored],
        self_test=_self_test(scored, aims, settings),
        contrasts=group_contrasts(scored, contrasts),
        networks=network_table(scored, data.networks, data.members.sum(1).astype(int).tolist()),
        random_units=_controls(extra, scored, data, settings),
        settings=_settings(known, data, settings, reliability),
        voxels={s.features.name: s.r for s in scored},
    )


def _prepare(responses: Responses, stimuli: int, options: Options) -> _Data:
    n, v = responses.values.shape
    if n != stimuli:
        raise ValueError(f"responses are to {n} stimuli, features of {stimuli}: they must be the same, in one order")
    folds = contiguous_folds(n, options.folds, responses.groups)
    ceiling = responses.ceiling(seed=options.seed)
    spread = np.array([np.ptp(responses.values[rows], axis=0) for rows in folds])
    varies = (spread > 1e-12 * np.abs(responses.values).max(0)).all(0)
    reliable = np.ones(v, dtype=bool) if ceiling is None else ceiling.included
    kept = varies & reliable
    excluded = {"without variance": int((~varies).sum()), "reliability <= 0.05": int((varies & ~reliable).sum())}
    if not kept.any():
        raise ValueError(f"no voxel of {v} is left: " + ", ".join(f"{n} {why}" for why, n in excluded.items()))
    names = [] if responses.networks is None else np.array(responses.networks)[kept].tolist()
    networks = list(dict.fromkeys(names))
    (shuffled,) = blocks_of([np.arange(n)], responses.groups, power=NULL_POWER)
    return _Data(
        y=responses.values[:, kept],
        ceiling=ceiling,
        kept=kept,
        networks=networks,
        members=np.array(networks)[:, None] == np.array(names)[None, :],
        groups=responses.groups,
        folds=folds,
        weights=block_weights(blocks_of(folds, responses.groups), n, options.draws, options.seed),
        orders=list(block_orders([shuffled], options.permutations, options.seed)),
        excluded=excluded,
    )


def _typical(data: _Data) -> float:
    return 0.5 if data.ceiling is None else float(np.median(data.ceiling.reliability[data.kept]))


class _SelfTests:
    """The simulated responses, and what RSA and CKA need of them, made once."""

    def __init__(self, aims: Sequence[Target], options: Options) -> None:
        self.aims = aims
        self.columns = np.concatenate([aim.responses for aim in aims], 1)
        self.ends = np.cumsum([aim.responses.shape[1] for aim in aims])
        self.triangles: dict[str, list[Array]] = {
            metric: [triangle(aim.responses, *_clip(metric, options)) for aim in aims]
            for metric in ("rsa", "topological_rsa")
            if metric in (options.metrics or ())
        }

    def medians(self, r: Array) -> Array:
        """Median r over the simulated voxels of each target."""
        return np.array([np.median(part) for part in np.split(r, self.ends[:-1])])


def _clip(metric: str, options: Options) -> tuple[float, float]:
    return options.rank_quantiles if metric == "topological_rsa" else (0.0, 1.0)


def _encoder(values: ArrayLike, data: _Data, options: Options) -> Encoder:
    return Encoder(
        values,
        folds=options.folds,
        inner_folds=options.inner_folds,
        lambdas=options.lambdas,
        groups=data.groups,
        device=options.device,
    )


def _score(features: FeatureSet, data: _Data, options: Options, tests: _SelfTests) -> Scored:
    encoder = _encoder(features.values, data, options)
    voxels = data.y.shape[1]
    both = encoder.score(np.concatenate([data.y, tests.columns], 1))  # one eigendecomposition for both
    r = both.r[:voxels]
    point = data.summaries(r[None])[0]
    by_fold = data.summaries(both.by_fold[:, :voxels])
    draws = resampled_scores(both.predictions[:, :voxels], data.y, data.folds, data.weights, data.summaries)
    null = np.array([np.median(encoder.refit(data.y[order], both.lambdas[:, :voxels])) for order in data.orders])
    low, high = interval(draws)
    entry: dict[str, Any] = {
        "name": features.name,
        "model": features.model,
        "layer": features.layer,
        "expert": features.expert,
        "width": features.values.shape[1],
        "score": float(point[0]),
        "interval": [float(low[0]), float(high[0])],
        "quantiles": np.quantile(r, QUANTILES).tolist(),
        "normalised": None if data.ceiling is None else float(point[1]),
        "normalised_interval": None if data.ceiling is None else [float(low[1]), float(high[1])],
        "null_mean": float(null.mean()),
        "null_95": float(np.quantile(null, 0.95)),
        "p": float(permutation_p(point[0], null)),
        "lambdas": {f"{value:g}": int((both.lambdas[:, :voxels] == value).sum()) for value in options.lambdas},
    }
    scored = Scored(features, entry, point, draws, by_fold, r, null, {"ridge": tests.medians(both.r[voxels:])})
    for metric in ("rsa", "topological_rsa"):
        if metric in (options.metrics or ()):
            _similarity(metric, scored, data, options, tests)
    if "cka" in (options.metrics or ()):
        _kernel(scored, data, options, tests)
    return scored


def _similarity(metric: str, scored: Scored, data: _Data, options: Options, tests: _SelfTests) -> None:
    clip = _clip(metric, options)
    own, other = triangle(scored.features.values, *clip), triangle(data.y, *clip)
    null = shuffled_triangles(own, other, data.orders)
    scored.entry[metric] = _with_null(float(own @ other), null)
    scored.self_test[metric] = np.array([own @ aim for aim in tests.triangles[metric]])


def _kernel(scored: Scored, data: _Data, options: Options, tests: _SelfTests) -> None:
    unbiased = bool(options.unbiased_cka)
    own = unit_gram(scored.features.values, scored.features.name, unbiased)
    other = unit_gram(data.y, "responses", unbiased)
    null = shuffled_grams(own, other, data.orders)
    scored.entry["cka"] = _with_null(float(np.vdot(own, other)), null) | {"unbiased": unbiased}
    grams = (unit_gram(aim.responses, "self-test", unbiased) for aim in tests.aims)
    scored.self_test["cka"] = np.array([np.vdot(own, gram) for gram in grams])


def _with_null(value: float, null: Array) -> dict[str, Any]:
    return {"value": value, "null_95": float(np.quantile(null, 0.95)), "p": float(permutation_p(value, null))}


def _self_test(scored: Sequence[Scored], aims: Sequence[Target], options: Options) -> dict[str, list[dict[str, Any]]]:
    names = [s.features.name for s in scored]
    tables = {metric: np.stack([s.self_test[metric] for s in scored], 1) for metric in options.metrics or ()}
    return {metric: ranking(names, aims, table) for metric, table in tables.items()}


def _check_controls(controls: Mapping[str, Sequence[Array]], sets: Sequence[FeatureSet]) -> None:
    unknown = sorted(set(controls) - {entry.name for entry in sets})
    if unknown:
        raise ValueError(f"controls: no feature set is named {', '.join(unknown)}")
    for name, given in controls.items():
        if not given or any(len(values) != len(sets[0].values) for values in given):
            raise ValueError(f"controls[{name!r}]: give at least one array with {len(sets[0].values)} stimuli")


def _controls(
    controls: Mapping[str, Sequence[Array]], scored: Sequence[Scored], data: _Data, options: Options
) -> list[dict[str, Any]]:
    """Each set that has controls, beside the scores of those."""
    out = []
    by_name = {s.features.name: s for s in scored}
    for name, others in controls.items():
        null = [float(np.median(_encoder(values, data, options).score(data.y).r)) for values in others]
        score = by_name[name].entry["score"]
        out.append({"set": name, "score": score, "null": null, "p": float(permutation_p(score, np.array(null)))})
    return out


def _settings(responses: Responses, data: _Data, options: Options, reliability: float) -> dict[str, Any]:
    return {
        "responses": responses.source,
        "folds": options.folds,
        "inner_folds": options.inner_folds,
        "lambdas": list(options.lambdas),
        "permutations": options.permutations,
        "draws": options.draws,
        "interval": "95 %, contiguous blocks of held-out stimuli resampled, predictions as they are; not over subjects",
        "contrasts": "corrected t over folds, 95 % (Nadeau and Bengio 2003)",
        "null": "contiguous blocks of responses shuffled, penalties as chosen for the real ones",
        "family": "all sets; p from the highest score of any set under each shuffling (Westfall and Young 1993)",
        "unbiased_cka": options.unbiased_cka,
        "rank_quantiles": list(options.rank_quantiles),
        "self_test_reliability": reliability,
        "seed": options.seed,
    }
