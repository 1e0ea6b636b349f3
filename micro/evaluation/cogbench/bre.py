"""S_BRE: how human the behaviour and the performance of an agent are, on a scale from random (0) to human (1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from micro.errors import choices
from micro.evaluation.cogbench.baselines import BEHAVIOUR, HUMAN, PERFORMANCE, RANDOM, Values

_KNOWN = {"behaviour": BEHAVIOUR, "performance": PERFORMANCE}


@dataclass(frozen=True)
class SBRE:
    """S_BRE of behaviour (up to ten metrics) and performance (up to six), None where no metric was given.

    ``relative``: s = |x - random| / |human - random| per group and metric; ``missing``: metrics that were not given.
    """

    behaviour: float | None
    performance: float | None
    relative: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """The mean of both, None without one of them."""
        if self.behaviour is None or self.performance is None:
            return None
        return (self.behaviour + self.performance) / 2


def relative_error(value: float, human: float, random: float) -> tuple[float, float]:
    """``s = |x - r| / |h - r|`` and the bounded relative error ``|s - 1| / max(1, s)``.

    Raises:
        ValueError: human and random values are equal, or a number is not finite.
    """
    if not np.isfinite([value, human, random]).all():
        raise ValueError(f"s_bre: expected finite numbers, got value {value}, human {human}, random {random}")
    if human == random:
        raise ValueError(
            f"s_bre: human and random value are both {human}; the scale from random to human has no length"
        )
    s = abs(value - random) / abs(human - random)
    return s, abs(s - 1) / max(1.0, s)


def grouped(scores: Mapping[str, Mapping[str, float]]) -> Values:
    """``{experiment: score}`` as ``{"behaviour": {metric: x}, "performance": {experiment: x}}``.

    Raises:
        ValueError: an unknown experiment or metric.
    """
    if set(scores) <= set(_KNOWN):
        values = {group: dict(scores.get(group, {})) for group in _KNOWN}
    else:
        values = {group: {} for group in _KNOWN}
        for name, score in scores.items():
            for metric, value in score.items():
                if metric == "performance":
                    values["performance"][name] = value
                else:
                    values["behaviour"][metric] = value
    for group, known in _KNOWN.items():
        for name in values[group]:
            if name not in known:
                raise ValueError(f"s_bre: {name!r} is not known in {group}; {choices(name, known)}")
    return values


def s_bre(scores: Mapping[str, Mapping[str, float]], *, human: Values = HUMAN, random: Values = RANDOM) -> SBRE:
    """One minus the mean bounded relative error, for behaviour and for performance.

    Args:
        scores: ``{experiment: score}`` as :func:`score` returns them, or the two groups by name,
            ``{"behaviour": {metric: x}, "performance": {experiment: x}}``. Metrics that are not given are left out of
            the mean and listed in ``missing``.
        human: values that count 1, by group; default the published ones.
        random: values that count 0; default the published ones. A clean run scores its own random agent instead.

    Raises:
        ValueError: unknown names, numbers that are not finite, human equal to random.

    Source: CogBench scores normalised as in MiCRo; the sign of x - r is lost, so that an agent as far below random as
    humans are above it scores 1.
    """
    values = grouped(scores)
    relative: dict[str, dict[str, float]] = {}
    found: dict[str, float | None] = {}
    for group in _KNOWN:
        relative[group], errors = {}, []
        for name, value in values[group].items():
            for who, known in (("human", human), ("random", random)):
                if name not in known.get(group, {}):
                    raise ValueError(f"s_bre: {who} has no value for {name!r} in {group!r}")
            relative[group][name], error = relative_error(value, human[group][name], random[group][name])
            errors.append(error)
        found[group] = 1 - float(np.mean(errors)) if errors else None
    missing = tuple(name for group, known in _KNOWN.items() for name in known if name not in values[group])
    return SBRE(found["behaviour"], found["performance"], relative, missing)
