"""Which of two is better aligned: experts, models, and experts by networks of the brain; on the same stimuli."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from micro.analysis.statistics import Array, holm, interval
from micro.errors import require

if TYPE_CHECKING:
    from micro.analysis.alignment.features import FeatureSet
    from micro.analysis.alignment.run import Scored


def default_pairs(sets: Sequence[FeatureSet]) -> list[tuple[str, str]]:
    """All pairs of experts of the first model, and the same expert (or the residual stream) of different models."""
    first = sets[0].model
    groups = list(dict.fromkeys((s.model, s.expert) for s in sets))
    names = {(s.model, s.expert): s.group for s in sets}
    return [
        (names[a], names[b])
        for a, b in combinations(groups, 2)
        if (a[0] == b[0] == first and None not in (a[1], b[1])) or (a[0] != b[0] and a[1] == b[1])
    ]


def check_pairs(sets: Sequence[FeatureSet], pairs: Sequence[tuple[str, str]] | None) -> None:
    """Refuse pairs that name neither a set nor a group, before any work is done for them.

    Raises:
        ValueError: the message lists what there is.
    """
    known = list(dict.fromkeys([*(s.group for s in sets), *(s.name for s in sets)]))
    for name in (name for pair in pairs or [] for name in pair):
        if name not in known:
            raise ValueError(f"contrasts: {name!r} is neither a set nor a group; there are {', '.join(known)}")


def group_contrasts(scored: Sequence[Scored], pairs: Sequence[tuple[str, str]] | None) -> list[dict[str, Any]]:
    """Difference of the scores of two sets or groups (mean over layers) with a 95 % interval and a two-sided p.

    Both sides are scored on the same folds, and the t test over the folds' differences is corrected for the training
    data that folds share: variance times 1/k + 1/(k - 1) instead of 1/k. Resampling the predicted stimuli would be too
    sure of itself here, because another training part would give other predictions. Holm's correction takes all
    contrasts as one family.

    Source: Nadeau and Bengio 2003, corrected resampled t test.
    """
    places = _places(scored)
    out: list[dict[str, Any]] = []
    for first, second in default_pairs([s.features for s in scored]) if pairs is None else pairs:
        a, b = (np.mean([scored[i].by_fold[:, 0] for i in places[name]], axis=0) for name in (first, second))
        difference, interval, p = corrected_t(a - b)
        out.append({"first": first, "second": second, "difference": difference, "interval": interval, "p": p})
    for row, adjusted in zip(out, holm([row["p"] for row in out]) if out else [], strict=True):
        row["p_holm"] = float(adjusted)
    return out


def corrected_t(differences: Array, level: float = 0.95) -> tuple[float, list[float], float]:
    """Mean of the folds' differences ``[k]``, its interval and two-sided p; see :func:`group_contrasts`."""
    t = require("scipy.stats", "eval", "contrasts").t
    k = len(differences)
    mean = float(differences.mean())
    error = float(np.sqrt((1 / k + 1 / (k - 1)) * differences.var(ddof=1)))
    reach = float(t.ppf((1 + level) / 2, k - 1)) * error
    if error == 0:
        return mean, [mean, mean], 1.0 if mean == 0 else 0.0
    return mean, [mean - reach, mean + reach], float(2 * t.sf(abs(mean) / error, k - 1))


def network_table(scored: Sequence[Scored], networks: Sequence[str], voxels: Sequence[int]) -> list[dict[str, Any]]:
    """Score of each group (mean over layers) in each network of voxels, with 95 % intervals."""
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(scored):
        groups.setdefault(one.features.group, []).append(i)
    out = []
    for group, members in groups.items():
        for k, (network, count) in enumerate(zip(networks, voxels, strict=True)):
            score, draws = _mean(scored, members, 2 + k)
            low, high = interval(draws)
            features = scored[members[0]].features
            entry = {"group": group, "model": features.model, "expert": features.expert, "network": network}
            out.append({**entry, "voxels": count, "score": score, "interval": [float(low), float(high)]})
    return out


def _places(scored: Sequence[Scored]) -> dict[str, list[int]]:
    """Indices by name of a set, and by name of a group where no set has it."""
    places: dict[str, list[int]] = {}
    for i, one in enumerate(scored):
        places.setdefault(one.features.group, []).append(i)
    return places | {one.features.name: [i] for i, one in enumerate(scored)}


def _mean(scored: Sequence[Scored], members: Sequence[int], column: int) -> tuple[float, Array]:
    point = float(np.mean([scored[i].point[column] for i in members]))
    result: Array = np.mean([scored[i].draws[:, column] for i in members], axis=0)
    return point, result
