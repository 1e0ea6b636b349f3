"""Which layers carry what an expert is worth: Shapley values of its cells, from sampled orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.ablations.scores import INTACT, Condition, Scores, ScoreStore, expert_names, row_names, score
from micro.analysis.ablations.shapley import SampledShapley, sampled_shapley
from micro.analysis.result import Result
from micro.analysis.statistics import Array
from micro.analysis.suites import SHARE, Suite
from micro.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM


@dataclass
class CellShapleyReport(Result):
    """Shapley value of every cell of the given experts, per row, with the standard error over orders.

    Worth is the score, its sign turned where lower is better, in nats or points. The values of one expert sum to what
    it is worth where all others stay: intact less ablated everywhere (``whole``).
    """

    name: ClassVar[str] = "cell_shapley"

    experts: list[str]
    rows: list[str]
    values: list[list[list[float]]]  # [rows][L][experts]
    error: list[list[list[float]]]
    whole: list[list[float]]  # [rows][experts]
    units: list[str]
    records: int
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per row, expert and layer: value, standard error."""
        import pandas as pd

        lines = [
            {
                "task": row, "expert": expert, "layer": l, "unit": self.units[r], "value": self.values[r][l][e],
                "se": self.error[r][l][e],
            }
            for r, row in enumerate(self.rows)
            for e, expert in enumerate(self.experts)
            for l in range(len(self.values[r]))
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        """One panel per row: value by layer, a line per expert, the band is two standard errors."""
        from micro.analysis.ablations.figures import cell_shapley_figure

        return cell_shapley_figure(self)


def cell_shapley(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    experts: Sequence[str] | None = None,
    *,
    orders: int = 20,
    antithetic: bool = True,
    truncate: float = 0.0,
    controls: Mapping[str, Any] | None = None,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> CellShapleyReport:
    """Shapley values of an expert's cells: the players are its L cells, all other experts stay.

    A coalition is the set of layers in which the expert is there, so every layer keeps an expert and every coalition
    has a score. Players that are cells of all experts at once would leave layers without any.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several small tasks (:func:`~micro.analysis.few_per_domain`).
        experts: whose cells; all experts if not given.
        orders: sampled orders of the layers per expert; each costs up to L - 1 conditions. Rounded up to an even number
            with ``antithetic``.
        antithetic: every order is followed by its reverse.
        truncate: an order ends when the worth of every row is this close to that of the intact model (nats, or points).
        controls: other steering arguments, the same in every condition.
        seed: of the orders.
        store: where scores are kept; give one with a folder for a run that may be interrupted.
        progress: show a bar on stderr.

    Returns:
        A :class:`CellShapleyReport`.

    Raises:
        ValueError: fewer than two orders (antithetic: two pairs), or an unknown expert.

    Source: capabilities.md 8; Castro et al. (2009); Ghorbani and Zou (2019, 2020).
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    known, layers = expert_names(model), int(model.config.num_hidden_layers)
    chosen = list(known if experts is None else experts)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"cell_shapley: unknown expert {unknown[0]!r}; known are {', '.join(known)}")
    if orders < (least := 4 if antithetic else 2):
        raise ValueError(
            f"cell_shapley: orders is {orders}, expected at least {least}: one alone has no standard error"
        )
    store = ScoreStore() if store is None else store
    about = store.about(model, several)

    def scores(condition: Condition) -> list[Scores]:
        return score(model, several, [condition], controls=controls, store=store, about=about)

    intact = scores(INTACT)
    found: list[SampledShapley] = []
    with Progress("cell shapley", len(chosen) * orders, unit="orders", enabled=progress) as bar:
        for i, name in enumerate(chosen):

            def worth(present: frozenset[int], name: str = name) -> Array:
                removed = {l: (name,) for l in range(layers) if l not in present}
                if len(removed) == layers:
                    return _worth(scores(Condition(name, (name,))))  # the same key as an ablation's
                return _worth(scores(Condition(f"{name}, some layers", removed)) if removed else intact)

            def done(walked: int, i: int = i, name: str = name) -> None:
                bar.update(i * orders + min(walked, orders), note=name)

            found.append(
                sampled_shapley(
                    worth,
                    layers,
                    permutations=orders,
                    antithetic=antithetic,
                    truncate=truncate,
                    seed=seed,
                    progress=done,
                )
            )
    names = [shown[row] for one, shown in zip(intact, row_names(intact), strict=True) for row in one.shown()]
    full = _worth(intact)
    return CellShapleyReport(
        chosen,
        names,
        np.stack([one.values for one in found], -1).transpose(1, 0, 2).tolist(),
        np.stack([one.se for one in found], -1).transpose(1, 0, 2).tolist(),
        np.stack([full - _worth(scores(Condition(name, (name,)))) for name in chosen], -1).tolist(),
        [_unit(one) for one in intact for _ in one.shown()],
        sum(suite.records for suite in several),
        {
            "orders": found[0].permutations, "antithetic": antithetic, "truncate": truncate, "seed": seed,
            "coalitions": {name: one.evaluations for name, one in zip(chosen, found, strict=True)},
            "error": "standard error over orders" + (" (pairs of an order and its reverse)" if antithetic else ""),
            "controls": {name: str(value) for name, value in (controls or {}).items()},
        },
    )  # fmt: skip


def _worth(every: Sequence[Scores]) -> Array:
    """Of the only condition, all rows of all suites, [K]; more is better."""
    parts = [one.traits.sign * one.traits.factor * one.means[0, one.shown()] for one in every]
    return np.concatenate(parts)


def _unit(scores: Scores) -> str:
    return "points" if scores.traits.unit == SHARE else scores.traits.unit
