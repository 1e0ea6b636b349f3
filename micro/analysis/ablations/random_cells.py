"""Is it this expert, or would any cells do? Ablated sets against as many random cells of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from micro.analysis.ablations.scores import (
    INTACT,
    Condition,
    Scores,
    ScoreStore,
    asked_conditions,
    expert_names,
    row_names,
    score,
)
from micro.analysis.ablations.statistics import DRAWS, Line, drawn_means
from micro.analysis.statistics import interval, permutation_p
from micro.analysis.suites import SHARE, Suite

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

RANDOM_DRAWS = 20


def check_draws(draws: int) -> None:
    """Raises ValueError for a control of fewer than 20 draws (0 = none)."""
    if draws != 0 and draws < RANDOM_DRAWS:
        raise ValueError(f"random_draws: a control needs at least {RANDOM_DRAWS} draws (0 = none), got {draws}")


def random_cells(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    sets: Literal["all"] | Sequence[str | Sequence[str]] | None = None,
    *,
    draws: int = RANDOM_DRAWS,
    bootstrap_draws: int = DRAWS,
    controls: Mapping[str, Any] | None = None,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> list[Line]:
    """Control of the ablation of experts by random cells: in every layer as many experts as the set removes, drawn anew
    in each from all experts, the tested ones included.

    So for a set of s of E experts a share s/E of the random cells is on average its own, and harm that these cells
    alone do, adding up over layers, shows as an ``excess`` of 1 - s/E of itself: 0.75 for one of four experts.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several tasks.
        sets: what is removed, as in :func:`~micro.analysis.ablation`; each expert alone if not given.
        draws: random sets for each number of experts, at least 20.
        bootstrap_draws: of the interval.
        controls: other steering arguments, the same in every condition.
        seed: of the draws and of the bootstrap.
        store: where scores are kept.
        progress: show a bar on stderr.

    Returns:
        One line per row and set: ``harm`` of removing it everywhere (above 0 = worse; nats or points), mean, lowest and
        highest harm of the random sets; ``excess`` = harm - random_mean (less than the harm, see above) with its 95 %
        interval low..high, records (or groups of them, :class:`~micro.analysis.Suite`) and random sets being resampled
        at once; and ``p`` = ``(1 + sets that harm at least as much) / (1 + draws)``.

    Raises:
        ValueError: fewer than 20 draws, or as for an ablation.

    Source: model.md 9.3 (size-matched random-cell ablation); both resampled: Owen (2007), crossed factors.
    """
    if draws < RANDOM_DRAWS:
        raise ValueError(f"random_cells: a control needs at least {RANDOM_DRAWS} draws, got {draws}")
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    asked = asked_conditions(model, sets)
    random = _random_sets(model, sorted({len(condition.ablate) for condition in asked}), draws, seed)
    conditions = [INTACT, *asked, *(condition for some in random.values() for condition in some)]
    every = score(model, several, conditions, controls=controls, store=store, what="random cells", progress=progress)
    places = {
        size: slice(1 + len(asked) + i * draws, 1 + len(asked) + (i + 1) * draws) for i, size in enumerate(random)
    }
    lines: list[Line] = []
    for scores, names in zip(every, row_names(every), strict=True):
        lines += _lines(scores, names, [places[len(condition.ablate)] for condition in asked], bootstrap_draws, seed)
    return lines


def _random_sets(model: Any, sizes: Sequence[int], draws: int, seed: int) -> dict[int, list[Condition]]:
    """Number of experts -> conditions that remove so many of every layer, drawn anew in each layer."""
    experts, layers = expert_names(model), int(model.config.num_hidden_layers)
    found = {}
    for size in sizes:
        generator = np.random.default_rng([seed, size])
        orders = generator.permuted(np.tile(np.arange(len(experts)), (draws * layers, 1)), axis=1)
        chosen = np.sort(orders[:, :size], axis=1).reshape(draws, layers, size).tolist()
        found[size] = [
            Condition(f"random {size}.{i}", {l: tuple(experts[e] for e in some) for l, some in enumerate(row)})
            for i, row in enumerate(chosen)
        ]
    return found


def _lines(scores: Scores, names: Sequence[str], places: Sequence[slice], draws: int, seed: int) -> list[Line]:
    """places: of the random sets that belong to condition 1, 2, ..."""
    about = scores.traits
    scale = about.sign * about.factor
    harm = scale * (scores.means[:1] - scores.means)  # [C,K]
    drawn = drawn_means(scores, draws=draws, seed=seed)
    drawn = scale * (drawn[:, :1] - drawn)  # [draws,C,K]
    generator = np.random.default_rng([seed, 1])
    lines: list[Line] = []
    for c, place in enumerate(places, start=1):
        count = place.stop - place.start
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws) / count
        low, high = interval(drawn[:, c] - np.einsum("ds,dsk->dk", weights, drawn[:, place]))
        for row in scores.shown():
            null = harm[place, row]
            lines.append(
                {
                    "task": names[row], "ablated": scores.conditions[c].name,
                    "unit": "points" if about.unit == SHARE else about.unit, "harm": float(harm[c, row]),
                    "random_mean": float(null.mean()), "random_low": float(null.min()),
                    "random_high": float(null.max()), "excess": float(harm[c, row] - null.mean()),
                    "low": float(low[row]), "high": float(high[row]),
                    "p": float(permutation_p(harm[c, row], null)), "draws": count,
                }
            )  # fmt: skip
    return lines
