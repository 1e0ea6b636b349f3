"""Would the metric find the right layer? Responses made of a known layer's noisy units must rank that layer first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from micro.analysis.alignment.features import FeatureSet
from micro.analysis.statistics import Array

UNITS = 32  # simulated voxels per target
TARGETS = 12  # at most


@dataclass(frozen=True)
class Target:
    """Simulated responses ``[n,units]`` of one feature set."""

    index: int
    responses: Array


def targets(sets: Sequence[FeatureSet], *, reliability: float, seed: int) -> list[Target]:
    """Noisy unit responses of up to twelve sets, evenly spread over the list.

    A unit drawn at random is standardised and gets Gaussian noise, so that its reliability (share of variance that is
    signal) is ``reliability``.

    Raises:
        ValueError: the reliability does not lie in (0, 1].
    """
    if not 0 < reliability <= 1:
        raise ValueError(f"the self-test's reliability must lie in (0, 1], got {reliability}")
    generator = np.random.default_rng(seed)
    wanted = np.unique(np.linspace(0, len(sets) - 1, min(TARGETS, len(sets))).round().astype(int))
    out = []
    for index in wanted:
        values = sets[index].values
        alive = np.flatnonzero(values.std(0) > 1e-12 * np.abs(values).max(0))
        if not len(alive):
            raise ValueError(f"features {sets[index].name!r} do not vary over stimuli")
        units = values[:, generator.permutation(alive)[:UNITS]]
        signal = (units - units.mean(0)) / units.std(0)
        noise = generator.standard_normal(signal.shape) * np.sqrt(1 / reliability - 1)
        out.append(Target(int(index), signal + noise))
    return out


def ranking(names: Sequence[str], aims: Sequence[Target], scores: Array) -> list[dict[str, Any]]:
    """Per target its rank among all sets under one metric, from scores ``[targets, sets]``.

    A set that ties with the target counts as ahead of it: a metric that cannot tell two sets apart has not found one.
    """
    out = []
    for aim, row in zip(aims, scores, strict=True):
        own = row[aim.index]
        others = np.delete(row, aim.index)
        rank = 1 + int((others >= own).sum()) if np.isfinite(own) else len(row)
        best = int(np.nanargmax(row)) if np.isfinite(row).any() else aim.index
        out.append(
            {
                "target": names[aim.index],
                "rank": rank,
                "own": float(own),
                "next": float(others.max()) if len(others) else None,
                "first": names[best],
            }
        )
    return out
