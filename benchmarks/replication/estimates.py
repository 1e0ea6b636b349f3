"""From the runs' files to arrays, and the replication's statistics under weights: what verdict.py decides on.

An observation is one held-out item in one seed. Weights ``[D,S,I]`` say how often each is drawn in each of D draws;
with weights of one a statistic is the estimate. Seeds and templates are crossed: all seeds see the same templates, so a
draw of templates is shared by all seeds (``hierarchical_draws(crossed=True)``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import hierarchical_draws, interval, ratio
from micro.experts import NAMES

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
DOMAINS = len(NAMES)
RELABELLINGS = tuple(permutations(range(DOMAINS)))  # all 24; the first is the identity


@dataclass
class Table:
    """The runs of one arm: seeds in order, item values [S,I]. All runs share items."""

    arm: str
    seeds: list[int]
    domain: NDArray[np.int64]  # [I]
    template: list[str]  # [I]
    tokens: Array  # [I]
    loss: dict[str, Array]  # condition -> sums in nats [S,I]
    routed: Array | None  # [S,I,L,E] tokens by first choice
    matching: Array | None  # [S,domain,L,E]
    localizers: dict[str, Array]  # network -> share of the selected units [S,E]
    routes: list[dict[str, Any]]  # of each seed, {} where none were kept

    def of(self, seeds: Sequence[int]) -> Table:
        """The same with some of the seeds, in that order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Table(
            self.arm,
            list(seeds),
            self.domain,
            self.template,
            self.tokens,
            {name: values[rows] for name, values in self.loss.items()},
            _rows(self.routed, rows),
            _rows(self.matching, rows),
            {name: values[rows] for name, values in self.localizers.items()},
            [self.routes[row] for row in rows],
        )


def _rows(values: Array | None, rows: list[int]) -> Array | None:
    return None if values is None else values[rows]


def read_runs(folder: Path, setup: str) -> dict[str, Table]:
    """Arm -> table of all runs of a setup that stand in `folder`.

    Raises:
        ValueError: runs of different plans, or with different items.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{setup}-*.json"))]
    return tables([run for run in runs if run["setup"] == setup])


def tables(runs: Sequence[dict[str, Any]]) -> dict[str, Table]:
    """The same from the files' contents."""
    if len({run["plan"] for run in runs}) > 1:
        raise ValueError("the runs belong to different plans; keep one plan's files in a folder")
    if len({json.dumps(run["items"], sort_keys=True) for run in runs}) > 1:
        raise ValueError("the runs were measured on different items")
    found = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        items = own[0]["items"]
        found[arm] = Table(
            arm,
            [run["seed"] for run in own],
            np.array(items["domain"]),
            list(items["template"]),
            np.array(items["tokens"], dtype=np.float64),
            {name: np.array([run["loss"][name] for run in own]) for name in own[0]["loss"]},
            _stacked(own, "routed"),
            _stacked(own, "matching"),
            {
                name: np.array([_shares(run["localizers"][name]["counts"]) for run in own])
                for name in own[0].get("localizers", {})
            },
            [run.get("routes", {}) for run in own],
        )
    return found


def _stacked(runs: Sequence[dict[str, Any]], name: str) -> Array | None:
    return np.array([run[name] for run in runs], dtype=np.float64) if name in runs[0] else None


def _shares(counts: list[list[int]]) -> Array:
    total: Array = np.array(counts, dtype=np.float64).sum(0)
    return total / max(1.0, total.sum())


@dataclass
class Estimate:
    """A statistic with its 95 % interval; arrays shaped like the statistic. draws: [D, ...]."""

    value: Array
    low: Array
    high: Array
    draws: Array


def estimate(
    statistic: Statistic, seeds: int, template: Sequence[str], domain: NDArray[np.int64], *, draws: int, seed: int = 0
) -> Estimate:
    """A statistic of weights [D,S,I] with its hierarchical bootstrap: seeds, templates within their domain, items."""
    items = len(template)
    levels = [
        np.repeat(np.arange(seeds), items),
        np.tile(np.unique(np.array(template), return_inverse=True)[1], seeds),
        np.tile(np.arange(items), seeds),
    ]

    def shaped(weights: Array) -> Array:
        return statistic(weights.reshape(len(weights), seeds, items))

    drawn = hierarchical_draws(levels, shaped, strata=np.tile(domain, seeds), crossed=True, draws=draws, seed=seed)
    low, high = interval(drawn)
    return Estimate(statistic(np.ones((1, seeds, items)))[0], low, high, drawn)


def seeds_estimate(values: Array, *, draws: int, seed: int = 0) -> Estimate:
    """Mean over seeds of values [S, ...] with a bootstrap over seeds alone."""
    flat = values.reshape(len(values), -1)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), size=draws) / len(flat)
    drawn = (weights @ flat).reshape(draws, *values.shape[1:])
    low, high = interval(drawn)
    return Estimate(values.mean(0), low, high, drawn)


def difference(first: Statistic, second: Statistic) -> Statistic:
    """first - second, under the same draws."""
    return lambda w: first(w) - second(w)


def domain_means(weights: Array, sums: Array, counts: Array, domain: NDArray[np.int64]) -> Array:
    """Weighted sum over weighted count of each domain's items: weights [D,S,I], sums [S,I] -> [D,domain], or sums
    [C,S,I] of several conditions -> [D,C,domain]. counts, domain: [I].
    """
    draws, seeds, items = weights.shape
    flat = weights.reshape(draws, seeds * items)
    of_domain = (domain[:, None] == np.arange(DOMAINS)).astype(np.float64)  # [I,domain]
    conditions = sums.reshape(-1, seeds, items)
    spread = (conditions[..., None] * of_domain).reshape(len(conditions), seeds * items, DOMAINS)
    numerator = flat @ spread.transpose(1, 0, 2).reshape(seeds * items, -1)
    denominator = flat @ np.tile(counts[:, None] * of_domain, (seeds, 1))
    found = ratio(numerator.reshape(draws, -1, DOMAINS), denominator[:, None])
    return found if sums.ndim == 3 else found[:, 0]


# ---- specialisation --------------------------------------------------------------------------------------------------


def best_relabelling(counts: Array) -> tuple[int, ...]:
    """The expert that stands for each domain, of all 24 ways: most right tokens [domain,L,E], balanced over domains."""
    shares = ratio(counts.sum(1), counts.sum((1, 2))[:, None])  # [domain,E]
    return max(RELABELLINGS, key=lambda order: float(sum(shares[d, e] for d, e in enumerate(order))))


def right_tokens(table: Table, *, matched: bool) -> Array:
    """Tokens routed to the expert of their label, mean over layers, [S,I]. matched: experts are first matched to labels
    on training answers, seed by seed.
    """
    assert table.routed is not None
    found = np.zeros(table.routed.shape[:2])
    for s in range(len(table.seeds)):
        assert table.matching is not None
        order = best_relabelling(table.matching[s]) if matched else RELABELLINGS[0]
        experts = np.array(order)[table.domain]
        found[s] = np.take_along_axis(table.routed[s].mean(1), experts[:, None], 1)[:, 0]
    return found


def accuracy(table: Table, *, matched: bool) -> Statistic:
    """Routing accuracy, balanced over domains and mean over layers."""
    right = right_tokens(table, matched=matched)
    return lambda w: domain_means(w, right, table.tokens, table.domain).mean(-1)


# ---- ablation --------------------------------------------------------------------------------------------------------


def rises(weights: Array, table: Table) -> Array:
    """Relative loss rise [D,domain,expert] when an expert is ablated: (loss without it - loss) / loss."""
    sums = np.stack([table.loss["none"], *(table.loss[f"without {name}"] for name in NAMES)])
    means = domain_means(weights, sums, table.tokens, table.domain)  # [D,condition,domain]
    return (means[:, 1:] / means[:, :1] - 1).swapaxes(-1, -2)


def index(rise: Array, order: Sequence[int] = RELABELLINGS[0]) -> Array:
    """[..., domain, expert] -> mean over domains of [rise when its expert is ablated - mean over the other experts].

    order[d] is the expert that counts as domain d's own. By columns (for each expert: its own domain against the other
    domains) the mean is the same number, since both are trace/4 - (sum of the rest)/12; their parts differ, see
    :func:`contrasts`.
    """
    own = np.sum([rise[..., d, e] for d, e in enumerate(order)], axis=0)
    return (own - (rise.sum((-2, -1)) - own) / (DOMAINS - 1)) / DOMAINS


def contrasts(rise: Array) -> Array:
    """[..., domain, expert] -> [..., 8]: each row's own cell against the row's others, then each column's."""
    own = np.diagonal(rise, axis1=-2, axis2=-1)
    rows = own - (rise.sum(-1) - own) / (DOMAINS - 1)
    columns = own - (rise.sum(-2) - own) / (DOMAINS - 1)
    return np.concatenate([rows, columns], -1)


def relabelling_p(rise: Array) -> float:
    """Exact p of the index of one table [domain, expert]: share of the 24 relabellings of the experts that reach it."""
    values = np.array([float(index(rise, order)) for order in RELABELLINGS])
    return float((values >= values[0] - 1e-12).mean())


def matched_index(table: Table) -> Statistic:
    """The index when each seed's experts are first matched to the labels on training answers (the control)."""
    orders = [best_relabelling(counts) for counts in table.matching] if table.matching is not None else []
    loss = dict(table.loss)
    for domain, name in enumerate(NAMES):
        loss[f"without {name}"] = np.stack(
            [table.loss[f"without {NAMES[order[domain]]}"][s] for s, order in enumerate(orders)]
        )
    relabelled = Table(**{**table.__dict__, "loss": loss})
    return lambda w: index(rises(w, relabelled))


# ---- steering --------------------------------------------------------------------------------------------------------


def gains(weights: Array, table: Table, targets: Sequence[str]) -> Array:
    """Change of each domain's log-likelihood in nats per token under each steering set, [D,domain,target]."""
    sums = np.stack([table.loss["none"], *(table.loss[f"towards {name}"] for name in targets)])
    means = domain_means(weights, sums, table.tokens, table.domain)
    return (means[:, :1] - means[:, 1:]).swapaxes(-1, -2)


def steering_contrasts(gain: Array, targets: Sequence[str]) -> Array:
    """[..., domain, target] -> [..., target]: gain of a domain steered to it - mean gain when steered elsewhere."""
    found = []
    for column, name in enumerate(targets):
        row = gain[..., NAMES.index(name), :]
        own = row[..., column]
        found.append(own - (row.sum(-1) - own) / (len(targets) - 1))
    return np.stack(found, -1)


# ---- localizers ------------------------------------------------------------------------------------------------------


def share_contrast(shares: Array, expert: int) -> Array:
    """[S,E] -> [S]: share of one expert - mean share of the others."""
    own = shares[:, expert]
    return own - (shares.sum(-1) - own) / (shares.shape[-1] - 1)


# ---- stability -------------------------------------------------------------------------------------------------------


def kept(table: Table) -> tuple[list[str], NDArray[np.int64]]:
    """(template, domain) of the items whose routes were kept."""
    items = table.routes[0]["items"]
    return [table.template[i] for i in items], table.domain[items]


def agreement_counts(table: Table, first: str, second: str) -> Array:
    """How often each pair of choices occurs in two snapshots, [S, kept items, L, E, E]."""
    experts = len(NAMES)
    found = []
    for routes in table.routes:
        owner = np.repeat(np.arange(len(routes["items"])), routes["tokens"])
        a, b = (_digits(routes["snapshots"][name]) for name in (first, second))
        counts = np.zeros((len(routes["items"]), len(a), experts, experts))
        for layer in range(len(a)):
            np.add.at(counts, (owner, layer, a[layer], b[layer]), 1)
        found.append(counts)
    return np.stack(found)


def _digits(rows: Sequence[str]) -> NDArray[np.int64]:
    return np.array([[int(digit) for digit in row] for row in rows])


def kappa(counts: Array) -> Array:
    """Cohen's kappa of pair counts [..., E, E]; NaN where both snapshots send everything to one and the same expert."""
    total = counts.sum((-2, -1))
    agreed = ratio(np.trace(counts, axis1=-2, axis2=-1), total)
    chance = ratio((counts.sum(-1) * counts.sum(-2)).sum(-1), total**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1 - 1e-12, (agreed - chance) / (1 - chance), np.nan)


def mean_kappa(counts: Array) -> Statistic:
    """Kappa of each seed and layer, mean over seeds and over the layers where it is defined. counts: [S,I,L,E,E]."""

    def statistic(weights: Array) -> Array:
        found = np.stack([kappa(np.tensordot(weights[:, s], counts[s], (1, 0))) for s in range(len(counts))], 1)
        share = ~np.isnan(found) * weights.sum(-1)[..., None]  # [D,S,L]: layers without a kappa count for nothing
        return ratio((np.nan_to_num(found) * share).sum((-2, -1)), share.sum((-2, -1)))

    return statistic


# ---- loss ------------------------------------------------------------------------------------------------------------


def mean_loss(table: Table, condition: str = "none") -> Statistic:
    """Held-out loss in nats per token, mean of the four domains."""
    return lambda w: domain_means(w, table.loss[condition], table.tokens, table.domain).mean(-1)
