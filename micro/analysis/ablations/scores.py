"""Scores of suites under many conditions, each computed once: kept in memory and, if wanted, on disk."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np

from micro.analysis.ablations.replayed_routes import RecordedRoutes, record_routes, replayed_routes
from micro.analysis.fingerprints import comparable, model_fingerprint, open_session, steering_contexts
from micro.analysis.groups import Groups
from micro.analysis.modes import evaluating
from micro.analysis.statistics import Array, ratio
from micro.analysis.suites import ManySuite, Suite, Traits, traits
from micro.modeling.controls import ExpertNames
from micro.progress import Progress

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

Routes = Literal["free", "replayed"]
MOST_EXPERTS = 8  # of which all sets are made: 254
GROUP = 8  # conditions that a suite gets at once; scores are kept group by group


@dataclass(frozen=True)
class Condition:
    """What is removed. ``ablate``: names of experts for all layers, or {layer: names}; ``routes``: what the tokens of
    the other experts do ("replayed": :func:`~micro.analysis.ablations.replayed_routes.replayed_routes`).
    """

    name: str
    ablate: tuple[str, ...] | Mapping[int, tuple[str, ...]] = ()
    routes: Routes = "free"

    def controls(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Steering arguments of this condition on top of those that all conditions share."""
        if not self.ablate:
            return dict(base)
        value = {l: list(s) for l, s in self.ablate.items()} if isinstance(self.ablate, Mapping) else list(self.ablate)
        return {**base, "ablate": value}


INTACT = Condition("none")


def expert_names(model: Any) -> list[str]:
    """The experts' names; a ValueError for a model without experts."""
    names = list(getattr(model.config, "expert_names", None) or [])
    if len(names) < 2:
        raise ValueError("ablation: the model has no two experts of which one could be removed")
    return names


def all_sets(experts: Sequence[str]) -> list[tuple[str, ...]]:
    """Every set of experts that leaves at least one, small ones first: 14 of four.

    Raises:
        ValueError: more than 8 experts.
    """
    if len(experts) > MOST_EXPERTS:
        raise ValueError(f'sets="all" of {len(experts)} experts would be {2 ** len(experts) - 2} sets; name the sets')
    return [group for size in range(1, len(experts)) for group in combinations(experts, size)]


def asked_conditions(model: Any, sets: Literal["all"] | Sequence[str | Sequence[str]] | None) -> list[Condition]:
    """One condition per set to remove, its experts by name and in the model's order."""
    experts = expert_names(model)
    if isinstance(sets, str):
        if sets != "all":
            raise ValueError(f'sets is {sets!r}, expected "all" or a list of sets')
        return [Condition("+".join(group), group) for group in all_sets(experts)]
    known = ExpertNames(model.config)
    groups = []
    for value in experts if sets is None else sets:
        members = sorted(set(known.many(value, "sets")))
        if not 0 < len(members) < len(experts):
            raise ValueError(f"sets: {value!r} removes {len(members)} of {len(experts)} experts; leave one, remove one")
        groups.append(tuple(experts[e] for e in members))
    return [Condition("+".join(group), group) for group in groups]


@dataclass(frozen=True)
class Scores:
    """Scores of one suite: sums [C,R,K] for C conditions, R records and K rows; counts [R,K]; groups as in
    :class:`micro.analysis.Suite`.
    """

    suite: Suite
    traits: Traits
    conditions: list[Condition]
    sums: Array
    counts: Array
    groups: Groups | None = None

    @property
    def means(self) -> Array:
        """[C,K]; NaN in a row without items."""
        return ratio(self.sums.sum(1), self.counts.sum(0))

    def weighted(self, weights: Array) -> Array:
        """Means [D,C,K] of D resamples with weights [D,R]."""
        flat = np.moveaxis(self.sums, 1, 0).reshape(len(self.counts), -1)
        sums = (weights @ flat).reshape(len(weights), *self.means.shape)
        return ratio(sums, (weights @ self.counts)[:, None])

    def errors(self) -> Array:
        """Standard errors [C,K] of the means over records (Taylor; one item a record: sd / sqrt(n))."""
        return ratio_error(self.sums, self.counts)

    def shown(self) -> list[int]:
        """Rows that have items."""
        return np.flatnonzero(self.counts.sum(0) > 0).tolist()


def row_names(every: Sequence[Scores]) -> list[list[str]]:
    """Names of the rows; with that of the task where two suites use the same one."""
    plain = [name for scores in every for name in scores.suite.names]
    if len(set(plain)) == len(plain):
        return [list(scores.suite.names) for scores in every]
    full = [[f"{scores.traits.task}: {name}" for name in scores.suite.names] for scores in every]
    if len({name for names in full for name in names}) < len(plain):
        full = [[f"{i + 1} {name}" for name in names] for i, names in enumerate(full)]
    return full


def ratio_error(sums: Array, counts: Array) -> Array:
    """Standard error [..., K] of sum(sums) / sum(counts), records [..., R, K] being drawn at random (Cochran 1977).

    Records without items do not count. NaN for fewer than two records.
    """
    means = ratio(sums.sum(-2), counts.sum(-2))
    residual = np.where(counts > 0, sums - means[..., None, :] * counts, 0.0)
    n = (counts > 0).sum(-2).astype(np.float64)
    return np.sqrt(ratio(n * (residual**2).sum(-2), n - 1)) / np.where(n > 0, counts.sum(-2), np.nan)


class ScoreStore:
    """Scores by model, suite and condition; what is there is not computed again.

    Args:
        folder: where scores are also written, one file per condition, beside and renamed; made if needed. A run that
            was stopped goes on from there. The scores of any number of models and suites may share it.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[str, tuple[Array, Array]] = {}
        self._alive: list[object] = []  # objects whose id() is part of a key

    def about(self, model: Any, suites: Sequence[Suite]) -> list[list[str]]:
        """Of a model and each suite; the first part of :meth:`key`. Reads every parameter of the model."""
        return [[self._model(model), self._suite(suite)] for suite in suites]

    def key(self, about: list[str], controls: Mapping[str, Any], routes: Routes) -> str:
        """Of everything that decides the scores."""
        content = json.dumps([about, comparable(controls), routes], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def get(self, key: str) -> tuple[Array, Array] | None:
        """(sums, counts) of a key, from memory or disk."""
        path = self._path(key)
        if key not in self._kept and path is not None and path.exists():
            try:
                with np.load(path, allow_pickle=False) as data:
                    self._kept[key] = (data["sums"], data["counts"])
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                raise ValueError(f"{path}: no scores written by this program ({error}); remove the file") from error
        return self._kept.get(key)

    def put(self, key: str, scores: tuple[Array, Array]) -> None:
        """Keep scores."""
        self._kept[key] = scores
        if (path := self._path(key)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, sums=scores[0], counts=scores[1])
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        beside.write_bytes(buffer.getvalue())
        beside.replace(path)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.npz"

    def _identity(self, thing: object) -> str:
        if not any(one is thing for one in self._alive):
            self._alive.append(thing)  # its id must not be given to another object
        return f"{type(thing).__name__} {id(thing)}"

    def _model(self, model: Any) -> str:
        own = model_fingerprint(model) if hasattr(model, "named_parameters") else self._identity(model)
        session = open_session(model)
        if session is not None and self.folder is not None:
            raise ValueError(
                "scores are kept on disk by what the model is, and model.intervene changes what it does: close the "
                "block, or keep no folder"
            )
        around = [comparable(steering_contexts()), None if session is None else self._identity(session)]
        return f"{own} {json.dumps(around)}"

    def _suite(self, suite: Suite) -> str:
        fingerprint = getattr(suite, "fingerprint", None)
        if fingerprint is None and self.folder is not None:
            raise ValueError(
                f"the suite {traits(suite).task!r} has no .fingerprint (a string that changes with its items), so its "
                "scores cannot be kept on disk; give it one, or keep no folder"
            )
        return str(fingerprint) if fingerprint is not None else self._identity(suite)


def score(
    model: MiCRoForCausalLM,
    suites: Sequence[Suite],
    conditions: Sequence[Condition],
    *,
    controls: Mapping[str, Any] | None = None,
    store: ScoreStore | None = None,
    about: Sequence[list[str]] | None = None,
    what: str = "ablation",
    progress: bool = False,
) -> list[Scores]:
    """Scores of every suite under every condition; those that the store has are taken from it.

    Args:
        model: a MiCRo model.
        suites: tasks.
        conditions: what is removed.
        controls: steering arguments that all conditions share.
        store: where scores are kept; a new one in memory if None.
        about: :meth:`ScoreStore.about`, for callers that score the same model many times.
        what: shown with the progress.
        progress: show a bar on stderr, and before it what is to be done and how long one condition takes.

    Returns:
        One :class:`Scores` per suite, conditions in the order given.

    Raises:
        ValueError: a suite's counts depend on the condition, or as for the model's steering arguments.
    """
    store = ScoreStore() if store is None else store
    base = dict(controls or {})
    if clash := [name for name in ("ablate", "keep", "replay") if base.get(name) is not None]:
        raise ValueError(f"controls: {clash[0]} is what the conditions set; give it as a set to remove")
    about = store.about(model, suites) if about is None else about
    keys = [[store.key(of, c.controls(base), c.routes) for c in conditions] for of in about]
    wanted = [(s, c) for s, row in enumerate(keys) for c, key in enumerate(row) if store.get(key) is None]
    with evaluating(model), Progress(what, len(wanted), unit="conditions", enabled=progress) as bar:
        if progress and len(wanted) < sum(map(len, keys)):
            bar.say(f"{what}: {sum(map(len, keys)) - len(wanted)} conditions were scored before")
        start, done, runner = time.monotonic(), 0, _Runner(model, base)
        for s, group in _groups(wanted, suites, conditions):
            made = runner.scores(suites[s], [conditions[c] for c in group])
            for c, scores in zip(group, made, strict=True):
                _check_shapes(suites[s], conditions[c], scores)
                store.put(keys[s][c], scores)
            if not done and len(wanted) > len(group):
                left = (time.monotonic() - start) / len(group) * (len(wanted) - len(group))
                bar.say(f"{what}: {len(wanted)} conditions to score, about {left:.0f} s")
            done += len(group)
            bar.advance(len(group), note=conditions[group[-1]].name)
    return [
        _collected(model, suite, list(conditions), [store.get(k) for k in keys[s]]) for s, suite in enumerate(suites)
    ]


def _groups(
    wanted: Sequence[tuple[int, int]], suites: Sequence[Suite], conditions: Sequence[Condition]
) -> Iterator[tuple[int, list[int]]]:
    """(suite, conditions) that are scored together: where the suite can, and routes are free."""
    for s in dict.fromkeys(s for s, _ in wanted):
        own = [c for suite, c in wanted if suite == s]
        several = isinstance(suites[s], ManySuite)
        free = [c for c in own if conditions[c].routes == "free"]
        size = GROUP if several else 1
        yield from ((s, free[i : i + size]) for i in range(0, len(free), size))
        yield from ((s, [c]) for c in own if conditions[c].routes != "free")


class _Runner:
    """Scores groups of conditions; the routes of the intact model are recorded once per suite."""

    def __init__(self, model: MiCRoForCausalLM, base: Mapping[str, Any]) -> None:
        self.model, self.base = model, base
        self._routes: tuple[Suite, RecordedRoutes] | None = None

    def scores(self, suite: Suite, conditions: Sequence[Condition]) -> list[tuple[Array, Array]]:
        """Of conditions with one kind of routes."""
        given = [condition.controls(self.base) for condition in conditions]
        if conditions[0].routes == "free":
            if len(given) > 1 and isinstance(suite, ManySuite):
                return suite.score_many(self.model, given)
            return [suite.score(self.model, one) for one in given]
        routes, made = self._recorded(suite), []
        for one in given:
            with replayed_routes(self.model, routes):
                made.append(suite.score(self.model, one))
        return made

    def _recorded(self, suite: Suite) -> RecordedRoutes:
        if self._routes is None or self._routes[0] is not suite:
            self._routes = None  # two suites' routes need not exist at once
            with record_routes(self.model) as routes:
                suite.score(self.model, self.base)
            self._routes = (suite, routes)
        return self._routes[1]


def _check_shapes(suite: Suite, condition: Condition, scores: tuple[Array, Array]) -> None:
    got, shape = [list(np.shape(part)) for part in scores], [suite.records, len(suite.names)]
    if got != [shape, shape]:
        raise ValueError(
            f"suite {traits(suite).task!r}: score() gave arrays of shapes {got} under {condition.name!r}, expected "
            f"sums and counts [records, rows] = {shape}"
        )


def _collected(
    model: Any, suite: Suite, conditions: list[Condition], scores: Sequence[tuple[Array, Array] | None]
) -> Scores:
    known = [one for one in scores if one is not None]
    counts = np.asarray(known[0][1], dtype=np.float64)
    about = traits(suite, model)
    for condition, (_, own) in zip(conditions, known, strict=True):
        if not np.array_equal(own, counts):
            raise ValueError(
                f"suite {about.task!r}: the number of items differs between {conditions[0].name!r} and "
                f"{condition.name!r}; paired differences need the same items (count a missing answer as wrong)"
            )
    sums = np.stack([np.asarray(s, dtype=np.float64) for s, _ in known])
    return Scores(suite, about, conditions, sums, counts, _named_groups(suite, about.task))


def _named_groups(suite: Suite, task: str) -> Groups | None:
    groups: Groups | None = getattr(suite, "groups", None)
    if groups is not None and [len(record) for record in groups] != [len(suite.names)] * suite.records:
        raise ValueError(
            f"suite {task!r}: groups must hold names for each of {suite.records} records and {len(suite.names)} rows"
        )
    return groups
