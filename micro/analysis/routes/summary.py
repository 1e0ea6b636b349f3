"""From counts per sample to the numbers of a routing report, with bootstrap intervals over samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.result import plain
from micro.analysis.routes.counting import counted_layers, entropy
from micro.analysis.routes.passes import SampleCounts
from micro.analysis.statistics import Array, hierarchical_bootstrap, ratio

MOST_RELABELLINGS = 720


def sample_shares(counts: SampleCounts, k: int) -> Array:
    """Share of each expert in each layer of the samples with counted slots, [N',L,E]; K != 1: mean probability."""
    present = counts.tokens > 0
    return ratio(counts.usage if k == 1 else counts.mass, counts.tokens[:, None, None])[present]


def usage_numbers(counts: SampleCounts, k: int, draws: int, seed: int) -> dict[str, Any]:
    """All fields of a report that need no labels."""
    shares = sample_shares(counts, k)
    kept = counted_layers(shares.shape[1])
    numbers = _Numbers(counts, shares, kept)
    low, high = hierarchical_bootstrap([np.arange(len(shares))], numbers, draws=draws, seed=seed)
    value, below, above = (numbers.parts(v) for v in (numbers(np.ones((1, len(shares))))[0], low, high))
    tokens = counts.tokens.sum()
    pooled = counts.usage.sum(0) / tokens
    out: dict[str, Any] = {
        "samples": len(shares),
        "tokens": int(tokens),
        "layers_counted": kept,
        "load_share": plain(counts.load.sum(0) / counts.load.sum((0, 2))[:, None]),
        "transitions": plain(counts.transitions / tokens),
        "together": plain(counts.together / tokens),
        "together_chance": plain(pooled @ pooled.T),
    }
    for name in value:
        if name != "mutual_information":
            out[name] = plain(value[name])
        out[f"{name}_interval"] = plain(np.stack([below[name], above[name]], -1))
    return out


def groups_of(counts: SampleCounts, groups: Sequence[str], k: int, draws: int, seed: int) -> list[dict[str, Any]]:
    """Usage of each group of samples over the counted layers, groups in alphabetical order."""
    shares = sample_shares(counts, k)
    present = counts.tokens > 0
    names, tokens = np.asarray(groups)[present], counts.tokens[present]
    return [_group(str(n), shares[names == n], tokens[names == n], draws, seed) for n in np.unique(names)]


class _Numbers:
    """All numbers with an interval, as one vector per draw: weights [D,N] -> [D,n]."""

    def __init__(self, counts: SampleCounts, shares: Array, kept: list[int]) -> None:
        present: NDArray[np.bool_] = counts.tokens > 0
        self.layers, self.experts = shares.shape[1:]
        self.kept = kept
        self.tokens = counts.tokens[present]
        self.shares, self.entropies, self.mass, self.load = (
            table.reshape(len(shares), -1)
            for table in (shares, counts.entropies[present], counts.mass[present], counts.load[present])
        )

    def __call__(self, weights: Array) -> Array:
        shape = (len(weights), self.layers, self.experts)
        by_layer = (weights @ self.shares / weights.sum(1, keepdims=True)).reshape(shape)
        tokens = weights @ self.tokens
        decision = weights @ self.entropies / tokens[:, None]
        usage = entropy((weights @ self.mass).reshape(shape) / tokens[:, None, None])
        load = (weights @ self.load).reshape(shape)
        variation = load.std(-1) / load.mean(-1)
        return np.concatenate(
            [
                by_layer[:, self.kept].mean(1),
                by_layer.reshape(len(weights), -1),
                decision,
                usage,
                usage - decision,
                variation,
            ],
            1,
        )

    def parts(self, vector: Array) -> dict[str, Array]:
        l, e = self.layers, self.experts
        ends = np.cumsum([e, l * e, l, l, l, l])
        usage, by_layer, *rest = np.split(vector, ends[:-1])
        names = ("decision_entropy", "usage_entropy", "mutual_information", "load_variation")
        return {"usage": usage, "usage_by_layer": by_layer.reshape(l, e), **dict(zip(names, rest, strict=True))}


def _group(name: str, shares: Array, tokens: Array, draws: int, seed: int) -> dict[str, Any]:
    """Usage of a group of samples. shares: [N,L,E]."""
    usage = shares[:, counted_layers(shares.shape[1])].mean(1)
    low, high = hierarchical_bootstrap(
        [np.arange(len(usage))], lambda w: w @ usage / w.sum(1, keepdims=True), draws=draws, seed=seed
    )
    return {
        "name": name,
        "samples": len(shares),
        "tokens": int(tokens.sum()),
        "usage": plain(usage.mean(0)),
        "interval": plain(np.stack([low, high], -1)),
        "by_layer": plain(shares.mean(0)),
    }


def _balanced(confusion: Array) -> Array:
    """[..., label, E] counts -> share on the diagonal, averaged over labels that occur."""
    hits = ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))
    known = ~np.isnan(hits)
    return ratio(np.where(known, hits, 0.0).sum(-1), known.sum(-1))


def accuracy_numbers(counts: SampleCounts, experts: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    """The fields of a report that compare labels and routes."""
    confusion = counts.confusion
    total = confusion.sum(0)  # [L,label,E]
    layers, number = total.shape[:2]
    flat = confusion.reshape(len(confusion), -1)
    kept = counted_layers(layers)

    def numbers(weights: Array) -> Array:
        drawn = (weights @ flat).reshape(-1, *total.shape)
        by_layer = _balanced(drawn)
        counted = drawn[:, kept].sum(1)
        by_label = ratio(counted, counted.sum(-1, keepdims=True))
        return np.concatenate([by_layer.mean(1, keepdims=True), by_layer, by_label.reshape(len(weights), -1)], 1)

    low, high = hierarchical_bootstrap([np.arange(len(flat))], numbers, draws=draws, seed=seed)
    value = numbers(np.ones((1, len(flat))))[0]
    interval = np.stack([low, high], -1)
    tokens = total[0].sum(-1).astype(int).tolist()
    by_label, spread = value[layers + 1 :].reshape(number, number), interval[layers + 1 :].reshape(number, number, 2)
    return {
        "labelled_tokens": tokens,
        "confusion": np.nan_to_num(ratio(total, total.sum(-1, keepdims=True))).tolist(),
        "accuracy": plain(value[0]),
        "accuracy_interval": plain(interval[0]),
        "accuracy_by_layer": plain(value[1 : layers + 1]),
        "accuracy_by_layer_interval": plain(interval[1 : layers + 1]),
        "relabelling_p": _relabelling_p(total),
        "by_label": [
            {
                "name": experts[label],
                "samples": int((confusion[:, 0, label].sum(-1) > 0).sum()),
                "tokens": tokens[label],
                "usage": plain(by_label[label]),
                "interval": plain(spread[label]),
                "by_layer": plain(ratio(total[:, label], total[:, label].sum(-1, keepdims=True))),
            }
            for label in range(number)
            if tokens[label]
        ],
    }


def _relabelling_p(total: Array) -> float | None:
    """Share of all assignments of experts to labels, the true one included, with an accuracy at least as high."""
    experts = total.shape[-1]
    if factorial(experts) > MOST_RELABELLINGS:
        return None
    shares = np.nan_to_num(ratio(total, total.sum(-1, keepdims=True))).mean(0)  # [label,E]
    scores = [sum(shares[label, e] for label, e in enumerate(order)) for order in permutations(range(experts))]
    return float(np.mean([score >= scores[0] - 1e-12 for score in scores]))
