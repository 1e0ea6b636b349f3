"""From a model and a pair of stimulus sets to the units that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.localizers.nulls import NullTests, null_tests, shuffled
from micro.analysis.localizers.result import LocalizerResult
from micro.analysis.localizers.statistics import LocalizerTest, Mask, Moments, compare, localizer_mask, wanted_units
from micro.analysis.localizers.stimuli import Stimuli, find_stimuli
from micro.analysis.localizers.units import MOST_BYTES, UnitReader, tokenized
from micro.analysis.statistics import Array, interval
from micro.errors import choices
from micro.experts import default_names

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

RANKINGS = ("global", "layer")


@dataclass(frozen=True)
class Selection:
    """Which units of a test are selected."""

    percent: float | None
    units: int | None
    range: tuple[float, float] | None
    ranking: str
    q: float
    significant_only: bool
    seed: int

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise ValueError(f"localize: ranking {self.ranking!r}: {choices(str(self.ranking), RANKINGS)}")
        if not 0 < self.q < 1:
            raise ValueError(f"localize: q must lie between 0 and 1, got {self.q}")
        if self.significant_only and self.range is not None:
            raise ValueError("localize: a random band has no significant units; leave range or significant_only out")

    def ranked(self, t: Any) -> Mask:
        """[L,E,W] -> bool [L,E,W], over all units, or within each layer."""
        options: dict[str, Any] = {"percent": self.percent, "units": self.units, "range": self.range}
        if self.ranking == "global":
            return localizer_mask(t, seed=self.seed, **options)
        return np.stack([localizer_mask(t[i], seed=self.seed + i, **options) for i in range(len(t))])

    def mask(self, test: LocalizerTest) -> Mask:
        mask = self.ranked(test.t)
        return mask & (test.t > 0) & (test.q <= self.q) if self.significant_only else mask


@dataclass(frozen=True)
class _Activations:
    """Both sides of one contrast: the test, stimuli that counted [2][L,E], and all values [n,L,E,W] if kept."""

    test: LocalizerTest
    used: tuple[Array, Array]
    values: NDArray[Any] | None


def localize(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    localizer: str | Stimuli = "language",
    unit: str = "block_output",
    percent: float | None = 10,
    *,
    units: int | None = None,
    range: tuple[float, float] | None = None,
    mode: str = "all",
    pooling: str | None = None,
    absolute: bool = True,
    ranking: str = "global",
    q: float = 0.05,
    significant_only: bool = False,
    permutations: int = 200,
    distractors: bool = False,
    random_draws: int = 1000,
    controls: dict[str, Any] | None = None,
    max_bytes: int = MOST_BYTES,
    seed: int = 0,
    progress: bool = False,
) -> LocalizerResult:
    """Find the units of a model that answer to what a localizer contrasts, and say in which experts they are.

    Each unit gives one number per stimulus (its activation, pooled over tokens; padding never counts); Welch's t of its
    absolute value between the two sets ranks all units of all layers and experts together, and the top ``percent`` are
    selected (:func:`localizer_test`, :func:`localizer_mask`). Texts are raw, without a chat template.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer.
        localizer: "language", "multiple_demand", "theory_of_mind"; a file or folder of stimuli
            (:func:`~micro.analysis.localizers.load_stimuli`); or :class:`Stimuli`.
        unit: "block_output", the components of B_e's output, [L,E,H] (whole-block experts); "up", the up-projection's,
            [L,E,F] (the choice for FFN experts); or "units", "ffn", "attention", "heads"; "residual": the stream
            behind each layer, [L,1,H], without experts.
        percent: share of all units to select, in (0, 100].
        units: number of units to select, instead of ``percent``.
        range: (low, high) percentiles of t: as many units at random from this band; (0, 0): the lowest. A control.
        mode: an expert's units on tokens that are not routed to it: "all" runs every expert on every token, "routed"
            leaves those tokens out (texts without any drop out; n per unit varies, and a unit that lost some needs
            three texts on each side), "zero" counts them as 0.
        pooling: "last" token or "mean" over tokens; None: that of the stimuli.
        absolute: compare absolute activations.
        ranking: "global", or "layer": the top of each layer.
        q: level of the false discovery rate, for the counts of significant units and for the permutations.
        significant_only: select only units with t > 0 that are significant at ``q``.
        permutations: label permutations for the specificity check (at least 200 to claim it) and for the band of
            shares under shuffled labels. Costs 4 bytes for each unit and stimulus (language on L 16, E 4, H 2048:
            250 MB) and for each unit and permutation. 0: none; moments are then streamed, nothing is kept.
        distractors: run the stimuli's distractors too, and report how many selected units also answer to those.
        random_draws: random masks for the band of chance.
        controls: steering arguments of the forward passes.
        max_bytes: most memory for activations read at once.
        seed: of the bands, the permutations and a random ``range``.
        progress: show a bar on stderr.

    Returns:
        A :class:`LocalizerResult`.

    Raises:
        ValueError: an unknown localizer, unit, mode, pooling or ranking; a share of no unit; activations that
            are not finite.

    Source: model.md 9.5; AlKhamissi et al. 2024 (the LLM language network), MiCRo's figure of expert shares.
    """
    stimuli = find_stimuli(localizer)
    reader = UnitReader(unit, mode, pooling or stimuli.pooling, max_bytes, dict(controls or {}), progress)
    selection = Selection(percent if units is None else None, units, range, ranking, q, significant_only, seed)
    if permutations < 0 or random_draws < 1:
        raise ValueError(f"localize: permutations ({permutations}) must be >= 0 and random_draws ({random_draws}) >= 1")
    if distractors and stimuli.distractors is None:
        raise ValueError(f"localize: the stimuli {stimuli.name!r} have no distractors; give Stimuli with some")
    wanted = wanted_units(selection.percent, units, _ranked_units(reader, selection, model))
    rows = _tokens(tokenizer, stimuli, stimuli.positive, stimuli.negative)
    found = _activations(model, reader, rows, absolute=absolute, keep=permutations > 0)
    result = _summary(model, stimuli, reader, selection, found, random_draws)
    if found.values is not None:
        _add_nulls(result, found.values, len(rows[0]), selection, permutations)
    if distractors:
        rows = _tokens(tokenizer, stimuli, *(stimuli.distractors or ((), ())))
        other = _activations(model, reader, rows, absolute=absolute, keep=False)
        _add_distractors(result, other, selection)
    result.settings |= {
        "k": wanted * (1 if ranking == "global" else len(result.counts)),
        "mode": mode,
        "pooling": reader.pooling,
        "max_tokens": stimuli.max_tokens,
        "absolute": absolute,
        "permutations": permutations,
        "random_draws": random_draws,
        "controls": {name: str(value) for name, value in reader.controls.items()},
    }
    return result


def _ranked_units(reader: UnitReader, selection: Selection, model: MiCRoForCausalLM) -> int:
    layers, experts, width = reader.shape(model)
    return experts * width * (layers if selection.ranking == "global" else 1)


def _tokens(
    tokenizer: Any, stimuli: Stimuli, positive: Sequence[str], negative: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    return tokenized(tokenizer, positive, stimuli.max_tokens), tokenized(tokenizer, negative, stimuli.max_tokens)


def _activations(
    model: MiCRoForCausalLM,
    reader: UnitReader,
    rows: tuple[list[list[int]], list[list[int]]],
    *,
    absolute: bool,
    keep: bool,
) -> _Activations:
    shape = reader.shape(model)
    kept: NDArray[Any] | None = None
    sides = []
    for start, side, what in ((0, rows[0], "positive stimuli"), (len(rows[0]), rows[1], "negative stimuli")):
        moments = Moments(shape)
        for indices, pooled in reader.pooled(model, side, what):
            values = pooled.abs().numpy() if absolute else pooled.numpy()
            moments.add(values.astype(np.float64))
            if keep:
                if kept is None:
                    kept = np.empty((len(rows[0]) + len(rows[1]), *shape), values.dtype)
                kept[[start + i for i in indices]] = values
        sides.append(moments)
    return _Activations(compare(*sides), (sides[0].count.max(-1), sides[1].count.max(-1)), kept)


def _summary(
    model: MiCRoForCausalLM,
    stimuli: Stimuli,
    reader: UnitReader,
    selection: Selection,
    found: _Activations,
    draws: int,
) -> LocalizerResult:
    test = found.test
    mask = selection.mask(test)
    _, experts, width = mask.shape
    counts = mask.sum(-1)
    selected = int(counts.sum())
    random = _random_counts(counts, width, selection.ranking, draws, selection.seed)
    significant = (test.t > 0) & (test.q <= selection.q)
    own = list(model.config.expert_names or default_names(experts))
    return LocalizerResult(
        localizer=stimuli.name,
        source=stimuli.source,
        unit=reader.unit,
        experts=own if len(own) == experts else ["all"],
        stimuli=[len(stimuli.positive), len(stimuli.negative)],
        selected=selected,
        units=mask.size,
        units_per_cell=width,
        counts=counts.tolist(),
        rate=(counts / width).tolist(),
        rate_random=_band(random / width),
        share=(counts.sum(0) / max(selected, 1)).tolist(),
        share_random=_band(random.sum(1) / max(selected, 1)),
        share_permuted=None,
        stimuli_used=np.stack(found.used, -1).astype(int).tolist(),
        significant=int(significant.sum()),
        significant_by_cell=significant.sum(-1).tolist(),
        note=stimuli.note,
        settings={
            "percent": selection.percent,
            "units": selection.units,
            "range": None if selection.range is None else list(selection.range),
            "ranking": selection.ranking,
            "q": selection.q,
            "significant_only": selection.significant_only,
            "seed": selection.seed,
        },
        **test._asdict(),
        mask=mask,
    )


def _band(draws: Array) -> list[Any]:
    """95 % interval over the first axis, as the last axis."""
    bounds: list[Any] = np.stack(interval(draws), -1).tolist()
    return bounds


def _random_counts(counts: NDArray[Any], width: int, ranking: str, draws: int, seed: int) -> Array:
    """[draws,L,E]: selected units per cell in random masks of the same size (in each layer, if layers are ranked)."""
    generator = np.random.default_rng(seed)
    sizes: NDArray[np.int64] = np.full(counts.shape, width)
    if ranking == "global":
        drawn = generator.multivariate_hypergeometric(sizes.reshape(-1), int(counts.sum()), draws, method="marginals")
        return np.asarray(drawn.reshape(draws, *counts.shape), np.float64)
    layers = [
        generator.multivariate_hypergeometric(size, int(count.sum()), draws, method="marginals")
        for size, count in zip(sizes, counts, strict=True)
    ]
    return np.stack(layers, 1).astype(np.float64)


def _add_nulls(
    result: LocalizerResult, values: NDArray[Any], positive: int, selection: Selection, permutations: int
) -> None:
    members = shuffled(positive, len(values) - positive, permutations=permutations, seed=selection.seed)
    nulls: NullTests = null_tests(values.reshape(len(values), -1), members, q=selection.q)
    result.specificity = nulls.specificity()
    if selection.range is not None or selection.significant_only:
        return  # shares of a random band, or of units that the null does not have, mean nothing
    shares = []
    for t in nulls.t:
        counts = np.asarray(selection.ranked(t.reshape(values.shape[1:])).sum((0, 2)), np.float64)
        shares.append(counts / max(counts.sum(), 1))
    result.share_permuted = _band(np.stack(shares))


def _add_distractors(result: LocalizerResult, other: _Activations, selection: Selection) -> None:
    """How many of the selected units are among as many that answer most to the distractors."""
    assert result.mask is not None and result.t is not None
    mask = replace(selection, significant_only=False, range=None).ranked(other.test.t)
    both = int((mask & result.mask).sum())
    flat = np.stack([result.t.reshape(-1), other.test.t.reshape(-1)])
    varied = bool((flat.std(1) > 0).all())
    result.distractors = {
        "overlap": both / max(result.selected, 1),
        "chance": int(mask.sum()) / mask.size,
        "correlation_of_t": float(np.asarray(np.corrcoef(flat))[0, 1]) if varied else None,
        "significant": int(((other.test.t > 0) & (other.test.q <= selection.q)).sum()),
    }
