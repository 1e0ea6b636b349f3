"""Which cells a behaviour calls on, and what it costs to switch them: the resonance map and tunable cells.

Source: "Mixture of Tunable Experts" (Dahlke et al., 2025): expert activation on prompts that elicit a behaviour against
prompts that do not, and switching of the experts that differ. Rates are differences of plain means here; the published
score may differ. With a few cells per layer every single cell can be tried, so the map of effects is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.batches import Row, batches
from micro.analysis.inputs import counted, input_rows
from micro.analysis.modes import evaluating
from micro.analysis.result import Result
from micro.analysis.statistics import Array, benjamini_hochberg, bootstrap, permutation_p, pieces, ratio
from micro.analysis.steering.matrix import mean_change, scored, sign_flips, unit_of_changes
from micro.analysis.suites import LossSuite, Suite, traits
from micro.errors import require
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM

CHUNK = 256  # permutations at once
Cell = tuple[int, int]


class TargetSuite(LossSuite):
    """Loss of all targets of a text or record together, one row named "all".

    Args:
        data: texts (no chat template) or records (their answers).
        tokenizer: of the model.
        max_tokens: slots per batch.
        encode_options: passed to :func:`micro.data.encode`.

    Raises:
        ValueError: nothing is left after encoding.
    """

    def __init__(
        self,
        data: Sequence[Any],
        tokenizer: Any,
        *,
        max_tokens: int = 2048,
        encode_options: dict[str, Any] | None = None,
    ) -> None:
        rows = input_rows(data, tokenizer, "TargetSuite", encode_options=encode_options)
        self.names, self.records, self.max_tokens = ["all"], len(data), max_tokens
        self._batches = [
            (index, {**batch, "routing_labels": torch.zeros_like(batch["input_ids"])})
            for index, batch in batches(rows, tokenizer, max_tokens=max_tokens)
        ]


@dataclass
class ResonanceReport(Result):
    """Use of every cell by prompts A and B, and what it costs to switch it.

    rate_a, rate_b [L][E]: share of counted tokens that chose the cell, mean over prompts; mass_a, mass_b: mean
    probability. resonance = rate_a - rate_b, p (two-sided, labels A and B permuted over prompts), p_family (against the
    largest magnitude over all cells); mass_resonance, mass_p, mass_p_family. effects: one entry per switch ("suppress",
    "force") and prompt set, see :func:`cell_effects`. top: what suppressing the strongest cells together does, beside
    random cells. rank_correlation: Spearman's between resonance and (effect on B - effect on A) of suppression, see
    :func:`cost_correlation`.
    """

    name: ClassVar[str] = "resonance"

    experts: list[str]
    prompts: list[int]
    rate_a: list[list[float]]
    rate_b: list[list[float]]
    mass_a: list[list[float]]
    mass_b: list[list[float]]
    resonance: list[list[float]]
    p: list[list[float]]
    p_family: list[list[float]]
    mass_resonance: list[list[float]]
    mass_p: list[list[float]]
    mass_p_family: list[list[float]]
    effects: list[dict[str, Any]] = field(default_factory=list)
    top: dict[str, Any] | None = None
    rank_correlation: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def ranked(self, *, by: str = "resonance") -> list[Cell]:
        """(layer, expert) of all cells, the strongest first (by "resonance" or "mass_resonance")."""
        values = np.asarray(getattr(self, by))
        order = np.argsort(-values, axis=None, kind="stable")
        return [(int(i) // values.shape[1], int(i) % values.shape[1]) for i in order]

    def table(self) -> pd.DataFrame:
        """One line per cell, the strongest resonance first."""
        import pandas as pd

        lines = []
        for l, e in self.ranked():
            line: dict[str, Any] = {"layer": l, "expert": self.experts[e]}
            for key in ("rate_a", "rate_b", "resonance", "p", "p_family", "mass_resonance", "mass_p_family"):
                line[key] = getattr(self, key)[l][e]
            for effect in self.effects:
                line[f"{effect['switch']}_{effect['set']}"] = effect["effect"][l][e]
                line[f"{effect['switch']}_{effect['set']}_q"] = effect["q"][l][e]
            lines.append(line)
        return pd.DataFrame(lines)

    def __str__(self) -> str:
        table = self.table().head(8)
        for effect in self.effects:
            key = f"{effect['switch']}_{effect['set']}"
            starred = zip(table[key], table[f"{key}_q"], strict=True)
            table[key] = [f"{value:+.3f}{'*' if q < 0.05 else ' '}" for value, q in starred]
        tests = [name for name in table if str(name).endswith("_q") or name in ("p", "mass_resonance", "mass_p_family")]
        table = table.drop(columns=tests)
        shown = str(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
        if self.effects:
            units = dict.fromkeys(effect["unit"] for effect in self.effects)
            shown += f"\nchanges in {', '.join(units)}; * q < 0.05"
        if self.rank_correlation is not None and self.rank_correlation["p"] is not None:
            found = self.rank_correlation
            shown += (
                f"\nrank correlation of resonance and cost: {found['rho']:.2f}, p = {found['p']:.3f} "
                f"(shuffled labels: {found['random']:.2f})"
            )
        if self.top is None:
            return shown
        top = self.top
        random = (
            f"{top['random_a']:+.3f} (lowest {top['random_a_low']:+.3f}), p = {top['p']:.3f}"
            if top["draws"]
            else "none drawn"
        )
        cells = ", ".join(f"{l} {self.experts[e]}" for l, e in top["cells"])
        return f"{shown}\nsuppressed together ({cells}): A {top['a']:+.3f}, B {top['b']:+.3f}; random cells: A {random}"

    def plot(self) -> Figure:
        from micro.analysis.steering.resonance_figures import resonance_figure

        return resonance_figure(self)


# ---------------------------------------------------------------- the map
def resonance(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    positions: str = "predicting",
    controls: Mapping[str, Any] | None = None,
    permutations: int = 4999,
    encode_options: dict[str, Any] | None = None,
    max_tokens: int = 2048,
    seed: int = 0,
    progress: bool = False,
) -> ResonanceReport:
    """Difference in use of every cell between two sets of prompts, with a permutation null.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: of the model.
        a: texts or records that elicit the behaviour.
        b: the control set; prompts that differ from those of ``a`` in the behaviour only.
        positions: "predicting" (slots that predict an answer token of a record, or the next token of a text) or "all".
        controls: steering arguments of the forward passes.
        permutations: draws of the null; prompts are the unit.
        encode_options: passed to :func:`micro.data.encode`.
        max_tokens: slots per batch.
        seed: of the permutations.
        progress: show a bar on stderr.

    Raises:
        ValueError: a set with fewer than two usable inputs.
    """
    return _mapped(
        model,
        tokenizer,
        a,
        b,
        positions=positions,
        controls=controls,
        permutations=permutations,
        encode_options=encode_options,
        max_tokens=max_tokens,
        seed=seed,
        progress=progress,
    )[0]


def _mapped(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    positions: str = "predicting",
    controls: Mapping[str, Any] | None = None,
    permutations: int = 4999,
    encode_options: dict[str, Any] | None,
    max_tokens: int,
    seed: int,
    progress: bool,
) -> tuple[ResonanceReport, list[Array], list[list[int]]]:
    """The map, and of A and B the rates of each prompt [prompts,L,E] and the prompts' indices."""
    rates, masses, indices = [], [], []
    for name, data in (("a", a), ("b", b)):
        rows = input_rows(data, tokenizer, f"resonance, {name}", encode_options=encode_options)
        if len(rows) < 2:
            raise ValueError(f"resonance: {name} holds {len(rows)} usable input; prompts are the unit, give at least 2")
        rate, mass = _use(model, tokenizer, rows, positions, controls or {}, max_tokens, f"prompts {name}", progress)
        rates.append(rate)
        masses.append(mass)
        indices.append([index for index, _ in rows])
    p, family = _permuted(rates, permutations, seed)
    mass_p, mass_family = _permuted(masses, permutations, seed)
    means = [[x.mean(0) for x in pair] for pair in (rates, masses)]
    report = ResonanceReport(
        experts=list(model.config.expert_names or []),
        prompts=[len(rate) for rate in rates],
        rate_a=means[0][0].tolist(),
        rate_b=means[0][1].tolist(),
        mass_a=means[1][0].tolist(),
        mass_b=means[1][1].tolist(),
        resonance=(means[0][0] - means[0][1]).tolist(),
        p=p.tolist(),
        p_family=family.tolist(),
        mass_resonance=(means[1][0] - means[1][1]).tolist(),
        mass_p=mass_p.tolist(),
        mass_p_family=mass_family.tolist(),
        settings={
            "positions": positions, "permutations": permutations, "seed": seed, "unit": "prompts, equal weights",
            "controls": {name: str(value) for name, value in (controls or {}).items()},
        },
    )  # fmt: skip
    return report, rates, indices


def _use(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    rows: list[tuple[int, Row]],
    positions: str,
    controls: Mapping[str, Any],
    max_tokens: int,
    what: str,
    progress: bool,
) -> tuple[Array, Array]:
    """Share of tokens that chose a cell, and its mean probability, [prompts,L,E] each."""
    place = {index: i for i, (index, _) in enumerate(rows)}
    shape = (len(rows), model.config.num_hidden_layers, model.config.num_experts)
    rates, masses = np.full(shape, np.nan), np.full(shape, np.nan)
    work = list(batches(rows, tokenizer, max_tokens=max_tokens))
    with evaluating(model):
        for indices, batch in track(work, what, unit="batches", enabled=progress):
            trace = model.model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                use_cache=False,
                output_routing=True,
                **controls,
            ).routing
            wanted = counted(batch, positions).to(trace.probs.device) & trace.mask
            chosen = torch.zeros_like(trace.probs, dtype=torch.float64)
            chosen.scatter_add_(-1, trace.ids.long(), (trace.weights > 0).double())
            tokens = wanted.sum(1).double()[:, None, None]
            for values, out in ((chosen, rates), (trace.probs.double(), masses)):
                sums = torch.where(wanted[None, :, :, None], values, 0).sum(2).transpose(0, 1)
                mean = (sums / tokens).cpu().numpy()
                for row, index in enumerate(indices):
                    out[place[index]] = mean[row]
    return rates, masses


def _permuted(sets: Sequence[Array], draws: int, seed: int) -> tuple[Array, Array]:
    """Two-sided p of mean(A) - mean(B) per cell, and against the largest magnitude of all cells (Westfall and Young
    1993, single step): labels permuted over prompts.
    """
    both = np.concatenate(list(sets))
    count, total = len(sets[0]), len(both)
    flat = both.reshape(total, -1)
    observed = flat[:count].mean(0) - flat[count:].mean(0)
    generator = np.random.default_rng(seed)
    parts = []
    for some in pieces(draws, CHUNK):
        order = generator.permuted(np.tile(np.arange(total), (some, 1)), axis=1)
        sign = np.where(order < count, 1 / count, -1 / (total - count))
        parts.append(sign @ flat)
    null = np.concatenate(parts)
    single = permutation_p(observed, null, alternative="two-sided")
    family = permutation_p(np.abs(observed), np.abs(null).max(1, keepdims=True))
    return single.reshape(both.shape[1:]), family.reshape(both.shape[1:])


def cost_correlation(
    rates: Sequence[Array], effects: Sequence[Array], counts: Sequence[Array], *, draws: int = 4999, seed: int = 0
) -> dict[str, Any]:
    """Is what A calls on more than B what A loses more by? Spearman's correlation over cells of resonance with (effect
    on B - effect on A).

    Cells are not independent (the rates of a layer sum to 1, and one prompt is in all cells of both sides), so p comes
    from permuting the labels A and B over prompts, on both sides at once: under the null the labels mean nothing. A
    prompt that uses a cell more often also loses more by it, whatever its label: random is the mean of these draws.

    Args:
        rates: of A and B, share of tokens that chose a cell, [prompts,...cells].
        effects: of A and B, sum over items of the effect of suppressing a cell, positive = better, [prompts,cells].
        counts: of A and B, items, [prompts].
        draws: permutations.
        seed: of these.

    Returns:
        rho; p (share of draws at least as high), random, draws. None each where a side does not vary.
    """
    rank = require("scipy.stats", "eval", "the rank correlation").rankdata
    a, total = len(counts[0]), len(counts[0]) + len(counts[1])
    use = np.concatenate([x.reshape(len(x), -1) for x in rates])
    lost, items = np.concatenate(list(effects)), np.concatenate(list(counts))

    def correlations(is_a: NDArray[np.bool_]) -> Array:
        """Of labellings [D,prompts]."""
        weights = is_a.astype(np.float64), (~is_a).astype(np.float64)
        resonance = weights[0] @ use / a - weights[1] @ use / (total - a)
        effect = [(w @ lost) / (w @ items)[:, None] for w in weights]
        # Rounding must not part cells that tie, as all cells do that nobody uses.
        sides = [rank(np.round(x, 12), axis=1) for x in (resonance, effect[1] - effect[0])]
        x, y = (side - side.mean(1, keepdims=True) for side in sides)
        return ratio((x * y).sum(1), np.sqrt((x * x).sum(1) * (y * y).sum(1)))

    rho = float(correlations(np.arange(total)[None] < a)[0])
    generator, parts = np.random.default_rng(seed), []
    for some in pieces(draws, CHUNK):
        order = generator.permuted(np.tile(np.arange(total), (some, 1)), axis=1)
        parts.append(correlations(order < a))
    null = np.concatenate(parts) if parts else np.zeros(0)
    null = null[~np.isnan(null)]
    if np.isnan(rho) or not len(null):
        return {"rho": None if np.isnan(rho) else rho, "p": None, "random": None, "draws": len(null)}
    p = float(permutation_p(rho, null))
    return {"rho": rho, "p": p, "random": float(null.mean()), "draws": len(null)}


# ---------------------------------------------------------------- switching cells
def suppress(cells: Sequence[Cell]) -> dict[str, Any]:
    """Steering arguments that take the router logit of cells (layer, expert) to -inf."""
    layers: dict[int, list[int]] = {}
    for layer, expert in cells:
        layers.setdefault(layer, []).append(expert)
    return {"ablate": layers}


def force(cells: Sequence[Cell], layers: int) -> dict[str, Any]:
    """Steering arguments that send all tokens of a cell's layer to it; other layers are free."""
    table = torch.full((1, layers, 1), -1)
    for layer, expert in cells:
        table[0, layer, 0] = expert
    return {"force": table}


def cell_effects(
    model: MiCRoForCausalLM,
    suite: Suite,
    *,
    switch: str = "suppress",
    draws: int = 4999,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """What suppressing (or forcing) each single cell does to a score, all rows of the suite together.

    Args:
        model: a MiCRo model of either kind.
        suite: :class:`TargetSuite` of prompts, or any other suite.
        switch: "suppress" (logit to -inf) or "force" (all tokens of the layer).
        draws: of the bootstrap over records and of the sign flips.
        seed: of both.
        store: where scores are kept, so that a run that was stopped goes on; in memory if not given.
        progress: show a bar on stderr.

    Returns:
        switch; unit of effects; score (nothing switched; a share where effects are points); effect [L][E], positive =
        better; interval [L][E][2]; p (sign flips of records); q (Benjamini-Hochberg over all cells). A model with one
        expert per layer cannot suppress.

    Raises:
        ValueError: an unknown switch.
    """
    if switch not in ("suppress", "force"):
        raise ValueError(f'switch must be "suppress" or "force", got {switch!r}')
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    cells = [(l, e) for l in range(layers) for e in range(experts)]
    given = [suppress([cell]) if switch == "suppress" else force([cell], layers) for cell in cells]
    values, counts, score, unit = _changes(model, suite, given, store, f"{switch} cells", progress)
    change = mean_change(values, counts)
    low, high = bootstrap(suite.records, change, draws=draws, seed=seed)
    p = sign_flips(values, counts, draws, seed)[:, 0].reshape(layers, experts)
    shape = (layers, experts)
    return {
        "switch": switch, "unit": unit, "score": score,
        "effect": change(np.ones(suite.records)).reshape(shape).tolist(),
        "interval": np.stack([low, high], -1).reshape(*shape, 2).tolist(), "p": p.tolist(),
        "q": benjamini_hochberg(p).tolist(), "records": suite.records, "draws": draws, "seed": seed,
    }  # fmt: skip


def _changes(
    model: MiCRoForCausalLM,
    suite: Suite,
    conditions: Sequence[dict[str, Any]],
    store: ScoreStore | None,
    what: str,
    progress: bool,
) -> tuple[Array, Array, float, str]:
    """Differences from no steering [conditions,records,1] (positive = better), counts [records,1], score, unit."""
    one = traits(suite, model)
    scores = scored(model, suite, [{}, *conditions], store, what=what, progress=progress)
    (free, counts), found = scores[0], np.stack([sums for sums, _ in scores[1:]])
    differences = (found - free).sum(-1, keepdims=True) * one.sign * one.factor
    totals = counts.sum(-1, keepdims=True)
    return differences, totals, float(free.sum() / totals.sum()), unit_of_changes(one)


def switch_top_cells(
    model: MiCRoForCausalLM,
    cells: Sequence[Cell],
    suite_a: Suite,
    suite_b: Suite,
    *,
    draws: int = 19,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Suppress cells together, beside as many random other cells.

    Args:
        model: a MiCRo model of either kind.
        cells: (layer, expert) pairs; at least one expert of every layer must stay.
        suite_a: scores of the prompts that elicit the behaviour.
        suite_b: scores of the control prompts.
        draws: random sets of the same number of other cells.
        seed: of these.
        store: where scores are kept.
        progress: show a bar on stderr.

    Returns:
        cells; a, b: changes of the two scores (positive = better); random_a, random_a_low, random_b: mean and lowest of
        the random sets; p: share of them with a change of A at least as low; p_selective: with (A - B) at least as low;
        unit of all changes.
    """
    config = model.config
    top = [(int(l), int(e)) for l, e in cells]
    random = _random_cells(config.num_hidden_layers, config.num_experts, top, draws, seed)
    given = [suppress(some) for some in (top, *random)]
    changes = []
    for suite, what in ((suite_a, "top cells, A"), (suite_b, "top cells, B")):
        values, counts, _, unit = _changes(model, suite, given, store, what, progress)
        changes.append(values.sum((1, 2)) / counts.sum())
    a, b = changes
    out = {"cells": [list(cell) for cell in top], "a": float(a[0]), "b": float(b[0]), "draws": draws, "seed": seed}
    if draws:
        out |= {
            "random_a": float(a[1:].mean()), "random_a_low": float(a[1:].min()), "random_b": float(b[1:].mean()),
            "p": float(permutation_p(a[0], a[1:], alternative="less")),
            "p_selective": float(permutation_p(a[0] - b[0], a[1:] - b[1:], alternative="less")),
            "random_cells": [[list(cell) for cell in some] for some in random],
        }  # fmt: skip
    return {**out, "unit": unit}


def _random_cells(layers: int, experts: int, top: Sequence[Cell], draws: int, seed: int) -> list[list[Cell]]:
    """Random sets of cells outside ``top``, of its size; each leaves an expert in every layer."""
    others = [(l, e) for l in range(layers) for e in range(experts) if (l, e) not in top]
    generator = np.random.default_rng(seed)
    out: list[list[Cell]] = []
    for _ in range(100 * max(draws, 1)):
        if len(out) == draws:
            return out
        if len(others) < len(top):
            break
        some = [others[i] for i in generator.choice(len(others), len(top), replace=False)]
        if max(np.bincount([l for l, _ in some], minlength=layers)) < experts:
            out.append(some)
    raise ValueError(f"{len(top)} cells are too many: no random set of other cells leaves an expert in every layer")


def tunable_cells(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    top: int = 3,
    switches: Sequence[str] = ("suppress", "force"),
    draws: int = 19,
    encode_options: dict[str, Any] | None = None,
    max_tokens: int = 2048,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
    **options: Any,
) -> ResonanceReport:
    """The resonance map, the effect of switching every single cell, and of suppressing the strongest ones together.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: of the model.
        a: texts or records that elicit the behaviour.
        b: the control set.
        top: how many cells with the highest resonance are suppressed together.
        switches: "suppress", "force" or both; L * E forward passes of both sets each.
        draws: random sets of cells.
        encode_options: passed to :func:`micro.data.encode`.
        max_tokens: slots per batch.
        seed: of all draws.
        store: where scores are kept, so that a run that was stopped goes on; in memory if not given.
        progress: show bars on stderr.
        options: further arguments of :func:`resonance`.
    """
    shared: dict[str, Any] = {"encode_options": encode_options, "max_tokens": max_tokens}
    store = ScoreStore() if store is None else store
    report, rates, indices = _mapped(model, tokenizer, a, b, seed=seed, progress=progress, **shared, **options)
    suites = [TargetSuite(data, tokenizer, **shared) for data in (a, b)]
    for switch in switches:
        for name, suite in zip("ab", suites, strict=True):
            found = cell_effects(model, suite, switch=switch, seed=seed, store=store, progress=progress)
            report.effects.append({"set": name, **found})
    if top:
        cells = report.ranked()[:top]
        report.top = switch_top_cells(model, cells, *suites, draws=draws, seed=seed, store=store, progress=progress)
    if "suppress" in switches:
        shape = np.asarray(report.resonance).shape
        single = [suppress([(l, e)]) for l, e in np.ndindex(*shape)]
        sums, counts = [], []
        for suite, own in zip(suites, indices, strict=True):
            values, totals, *_ = _changes(model, suite, single, store, "suppress cells", False)  # all are stored
            sums.append(values[:, own, 0].T)
            counts.append(totals[own, 0])
        permutations = report.settings["permutations"]
        report.rank_correlation = cost_correlation(rates, sums, counts, draws=permutations, seed=seed)
    report.settings |= {"top": top, "switches": list(switches), "draws": draws}
    return report
