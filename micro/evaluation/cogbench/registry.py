"""The seven experiments by name."""

from __future__ import annotations

from collections.abc import Sequence

from micro.errors import choices
from micro.evaluation.cogbench.balloon import Balloon
from micro.evaluation.cogbench.experiment import Experiment
from micro.evaluation.cogbench.horizon import Horizon
from micro.evaluation.cogbench.instrumental import Instrumental
from micro.evaluation.cogbench.probabilistic_reasoning import ProbabilisticReasoning
from micro.evaluation.cogbench.restless_bandit import RestlessBandit
from micro.evaluation.cogbench.temporal_discounting import TemporalDiscounting
from micro.evaluation.cogbench.two_step import TwoStep

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        ProbabilisticReasoning(),
        Horizon(),
        RestlessBandit(),
        Instrumental(),
        TwoStep(),
        TemporalDiscounting(),
        Balloon(),
    )
}


def experiment(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"cogbench: no experiment is called {name!r}; {choices(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def chosen(names: str | Sequence[str] | None) -> list[str]:
    """Names in the order given; None = all seven."""
    wanted = list(EXPERIMENTS) if names is None else [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise ValueError(f"cogbench: experiments is empty; name some of {', '.join(EXPERIMENTS)}")
    for name in wanted:
        experiment(name)
    return list(dict.fromkeys(wanted))
