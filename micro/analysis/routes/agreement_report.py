"""Do two checkpoints route the same tokens alike? Agreement beyond chance, with two null controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from micro.analysis.result import Result, plain
from micro.analysis.routes.counting import counted_layers, entropy
from micro.analysis.routes.passes import (
    MAX_SAMPLES,
    SAMPLE_SEED,
    Positions,
    Samples,
    drawn_samples,
    traces,
)
from micro.analysis.statistics import Array, hierarchical_bootstrap, interval, ratio, weighted_correlation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM

Decisions = list[NDArray[np.uint8]]  # first choice of each counted slot, [L,T_n] per sample

OTHER_SAMPLES, FRESH_ROUTER = "other samples", "fresh router"


@dataclass
class AgreementReport(Result):
    """Routing of several checkpoints on the same tokens, pair by pair.

    Each entry of ``pairs`` and ``nulls``: ``first``, ``second``; ``agreement``: share of (layer, slot) with the same
    first choice; ``kappa``: Cohen's, (a - a0) / (1 - a0), with a0 = sum of the products of both usages, per layer and
    averaged over layers; ``divergence``: Jensen-Shannon divergence of usage in nats (at most ln 2), ``variation``:
    total variation, both per layer and averaged; ``correlation`` [E]: over samples, of the experts' usage in the
    counted layers. ``*_by_layer`` [L], ``*_interval``: 95 % bootstrap over samples (of nulls: 95 % of their draws).

    Nulls: "other samples": the first checkpoint on a sample against itself on another one, slot by slot (divergences:
    random halves of the samples); "fresh router": against the same weights with newly drawn routers.
    """

    name: ClassVar[str] = "agreement"

    checkpoints: list[str]
    experts: list[str]
    samples: int
    tokens: int
    layers_counted: list[int]
    pairs: list[dict[str, Any]]
    nulls: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per pair, nulls last."""
        import pandas as pd

        lines = []
        for entry in [*self.pairs, *self.nulls]:
            line = {"first": entry["first"], "second": entry["second"]}
            for name in ("agreement", "kappa"):
                low, high = entry[f"{name}_interval"]
                line |= {name: entry[name], f"{name} low": low, f"{name} high": high}
            line |= {"divergence": entry["divergence"], "variation": entry["variation"]}
            line |= {f"r {expert}": entry["correlation"][e] for e, expert in enumerate(self.experts)}
            lines.append(line)
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        from micro.analysis.routes.figures import agreement_figure

        return agreement_figure(self)


def agreement(
    checkpoints: Mapping[str, Any],
    tokenizer: Any,
    data: Sequence[Any],
    *,
    positions: Positions = "published",
    controls: Mapping[str, Any] | None = None,
    encode_options: Mapping[str, Any] | None = None,
    max_samples: int | None = MAX_SAMPLES,
    sample_seed: int = SAMPLE_SEED,
    null_draws: int = 20,
    fresh_routers: int = 3,
    max_tokens: int = 2048,
    draws: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> AgreementReport:
    """Compare the routing of checkpoints on one fixed set of tokens.

    Args:
        checkpoints: name -> model, or folder, which is loaded when its turn comes and let go afterwards. At least two,
            of the same layers and experts; all pairs are compared.
        tokenizer: of all of them.
        data: texts, pairs or records, as in :func:`micro.analysis.routing`; the slots that it counts are compared.
        positions: as there.
        controls: as there.
        encode_options: as there.
        max_samples: as there.
        sample_seed: as there.
        null_draws: random pairings of samples for the null "other samples"; 0 leaves it out.
        fresh_routers: routers drawn anew in the first checkpoint for the null "fresh router"; 0 leaves it out.
        max_tokens: slots per batch.
        draws: of the bootstrap over samples.
        seed: of the bootstrap, the pairings and the fresh routers.
        progress: show bars on stderr.

    Returns:
        An :class:`AgreementReport`.

    Raises:
        ValueError: fewer than two checkpoints, or such that differ in layers or experts; no data.

    Source: kappa: Cohen (1960); divergence: Lin (1991). The published figure compares usage only.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"analysis.agreement: give at least two checkpoints, got {len(checkpoints)}")
    samples = drawn_samples(
        data,
        tokenizer,
        what="analysis.agreement",
        positions=positions,
        max_samples=max_samples,
        sample_seed=sample_seed,
        options=encode_options,
    )

    def decide(model: MiCRoForCausalLM, name: str) -> Decisions:
        passes = traces(
            model, samples, tokenizer, controls=controls, max_tokens=max_tokens, progress=progress, description=name
        )
        return _decisions(passes, samples)

    found: dict[str, Decisions] = {}
    fresh: list[Decisions] = []
    experts: list[str] = []
    device = None
    for name, given in checkpoints.items():
        model = _model(given, device)
        device = model.device
        found[name] = decide(model, name)
        names = list(model.config.expert_names or ())
        if not experts:
            experts = names
            for i in range(fresh_routers):
                with _fresh_routers(model, seed, i):
                    fresh.append(decide(model, f"{name}, {FRESH_ROUTER} {i + 1}"))
        if names != experts or len(found[name][0]) != len(next(iter(found.values()))[0]):
            raise ValueError(f"analysis.agreement: {name} has other layers or experts than {next(iter(checkpoints))}")
        del model
    report = compare(found, experts, draws=draws, seed=seed)
    first = next(iter(found))
    kept = [d for d in found[first] if d.shape[1]]
    if null_draws:
        report.nulls.append(_other_samples(first, kept, len(experts), null_draws, seed))
    if fresh:
        usable = [[d for d in f if d.shape[1]] for f in fresh]
        entries = [_numbers(_Pair(kept, f, len(experts))) for f in usable]
        report.nulls.append(_null(first, FRESH_ROUTER, entries))
    report.settings |= {
        "positions": samples.rule,
        "samples_given": len(data),
        "max_samples": max_samples,
        "sample_seed": sample_seed,
        "null_draws": null_draws,
        "fresh_routers": fresh_routers,
    }
    return report


def compare(
    decisions: Mapping[str, Sequence[Any]], experts: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> AgreementReport:
    """The report of given first choices, without nulls.

    Args:
        decisions: checkpoint -> first choices of each sample, integers ``[L,T_n]``; samples without slots are left out.
        experts: their names.
        draws: of the bootstrap over samples.
        seed: of the bootstrap.

    Raises:
        ValueError: checkpoints that hold other samples, or no slot at all.
    """
    names = list(decisions)
    shapes = [[np.shape(d) for d in decisions[name]] for name in names]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("compare: all checkpoints need decisions [L,T_n] of the same samples, slot for slot")
    used = [i for i, shape in enumerate(shapes[0]) if shape[1]]
    if not used:
        raise ValueError("compare: no sample has a slot that counts")
    kept = {name: [np.asarray(decisions[name][i]) for i in used] for name in names}
    layers = shapes[0][0][0]
    report = AgreementReport(
        checkpoints=names,
        experts=list(experts),
        samples=len(used),
        tokens=sum(shapes[0][i][1] for i in used),
        layers_counted=counted_layers(layers),
        pairs=[],
        nulls=[],
        settings={"interval": "95 % bootstrap over samples", "bootstrap_draws": draws, "seed": seed},
    )
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            pair = _Pair(kept[first], kept[second], len(experts))
            report.pairs.append({"first": first, "second": second, **_with_intervals(pair, draws, seed)})
    return report


def _model(given: Any, device: torch.device | None) -> MiCRoForCausalLM:
    """A model as it is; a folder loaded, onto the device of the model before it."""
    if not isinstance(given, str | PathLike):
        return given  # type: ignore[no-any-return]
    import micro

    model = micro.load(fspath(given))
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def _decisions(passes: Iterator[Any], samples: Samples) -> Decisions:
    out: Decisions = [np.zeros((0, 0), np.uint8)] * len(samples.data)
    layers = 0
    for indices, _, trace, counted in passes:
        first = trace.ids[..., 0].cpu().numpy().astype(np.uint8)  # [L,B,S]
        layers = len(first)
        for row, index in enumerate(indices):
            out[index] = first[:, row, counted[row].numpy()]
    return [d if d.size else np.zeros((layers, 0), np.uint8) for d in out]


@contextmanager
def _fresh_routers(model: MiCRoForCausalLM, seed: int, draw: int) -> Iterator[None]:
    """Routers drawn anew, and put back afterwards. The stream is of this null alone: a seed used as it is would draw
    the routers with which an upcycled checkpoint of that seed started.
    """
    from micro.modeling.router import RouterMap

    weights = [m.weight for m in model.modules() if isinstance(m, RouterMap)]
    before = [w.detach().clone() for w in weights]
    try:
        state = int(np.random.SeedSequence([seed, draw, *FRESH_ROUTER.encode()]).generate_state(1)[0])
        model.reset_routers(torch.Generator(device=weights[0].device).manual_seed(state))
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


class _Pair:
    """Counts per sample of two lists of decisions: tokens [N], same [N,L], usage of both [N,L,E]."""

    def __init__(self, first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]], experts: int) -> None:
        self.layers, self.experts = len(first[0]), experts
        self.tokens = np.array([d.shape[1] for d in first], dtype=np.float64)
        self.same = np.array([(a == b).sum(1) for a, b in zip(first, second, strict=True)], dtype=np.float64)
        self.usage = tuple(np.stack([_usage(d, experts) for d in side]) for side in (first, second))

    def numbers(self, weights: Array) -> dict[str, Array]:
        """Weights [D,N] -> agreement and kappa [D,L], divergence and variation [D,L], correlation [D,E]."""
        shape = (len(weights), self.layers, self.experts)
        tokens = weights @ self.tokens
        same = weights @ self.same / tokens[:, None]
        p, q = ((weights @ u.reshape(len(u), -1)).reshape(shape) / tokens[:, None, None] for u in self.usage)
        chance, (divergence, variation) = (p * q).sum(-1), _distances(p, q)
        kept = counted_layers(self.layers)
        samples = [u[:, kept].sum(1) / (self.tokens[:, None] * len(kept)) for u in self.usage]
        return {
            "agreement": same,
            "chance": chance,
            "kappa": ratio(same - chance, 1 - chance),
            "divergence": divergence,
            "variation": variation,
            "correlation": weighted_correlation(weights, *samples),
        }


def _usage(decisions: NDArray[Any], experts: int) -> Array:
    counts: Array = (decisions[..., None] == np.arange(experts)).sum(1).astype(np.float64)
    return counts


def _distances(p: Array, q: Array) -> tuple[Array, Array]:
    """Jensen-Shannon divergence in nats and total variation of distributions [..., E]."""
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0), np.abs(p - q).sum(-1) / 2


def _summed(numbers: dict[str, Array]) -> dict[str, Array]:
    """With the averages over layers, [D]. Kappa's comes from the averages of agreement and chance, so that a layer in
    which both always choose one expert has a say.
    """
    same, chance = numbers["agreement"].mean(1), numbers["chance"].mean(1)
    return {
        "agreement": same,
        "chance": chance,
        "kappa": ratio(same - chance, 1 - chance),
        "divergence": numbers["divergence"].mean(1),
        "variation": numbers["variation"].mean(1),
        "correlation": numbers["correlation"],
        **{f"{name}_by_layer": numbers[name] for name in numbers if name != "correlation"},
    }


def _numbers(pair: _Pair) -> dict[str, Array]:
    return {k: v[0] for k, v in _summed(pair.numbers(np.ones((1, len(pair.tokens))))).items()}


def _with_intervals(pair: _Pair, draws: int, seed: int) -> dict[str, Any]:
    value = _numbers(pair)
    sizes = np.cumsum([np.size(v) for v in value.values()])

    def vector(weights: Array) -> Array:
        return np.concatenate([v.reshape(len(weights), -1) for v in _summed(pair.numbers(weights)).values()], 1)

    bounds = hierarchical_bootstrap([np.arange(len(pair.tokens))], vector, draws=draws, seed=seed)
    low, high = (dict(zip(value, np.split(b, sizes[:-1]), strict=True)) for b in bounds)
    out: dict[str, Any] = {}
    for name, v in value.items():
        out[name] = plain(v)
        interval = np.stack([low[name], high[name]], -1)
        out[f"{name}_interval"] = plain(interval if np.ndim(v) else interval[0])
    return out


def _other_samples(name: str, decisions: Decisions, experts: int, draws: int, seed: int) -> dict[str, Any]:
    """Each sample against another one, slot by slot as far as both go; usage against usage of the other half."""
    if len(decisions) < 2:
        raise ValueError("analysis.agreement: the null of other samples needs two samples; give more, or null_draws=0")
    generator = np.random.default_rng(seed)
    entries = []
    for _ in range(draws):
        order = generator.permutation(len(decisions))
        partner = np.empty_like(order)
        partner[order] = np.roll(order, 1)  # nobody is paired with itself
        ends = [min(d.shape[1], decisions[p].shape[1]) for d, p in zip(decisions, partner, strict=True)]
        pair = _Pair(
            [d[:, :end] for d, end in zip(decisions, ends, strict=True)],
            [decisions[p][:, :end] for p, end in zip(partner, ends, strict=True)],
            experts,
        )
        halves = np.array_split(order, 2)
        usage = [_usage(np.concatenate([decisions[i] for i in half], 1), experts) for half in halves]
        p, q = (u / u.sum(-1, keepdims=True) for u in usage)
        numbers = _numbers(pair)
        numbers["divergence_by_layer"], numbers["variation_by_layer"] = _distances(p, q)
        for kind in ("divergence", "variation"):
            numbers[kind] = numbers[f"{kind}_by_layer"].mean(0)
        entries.append(numbers)
    return _null(name, OTHER_SAMPLES, entries)


def _null(name: str, kind: str, entries: list[dict[str, Array]]) -> dict[str, Any]:
    """Mean over draws, and where 95 % of them lie (of fewer than 40: all)."""
    level = 0.95 if len(entries) >= 40 else 1.0
    out: dict[str, Any] = {"first": name, "second": kind, "draws": len(entries)}
    for key in entries[0]:
        values = np.stack([entry[key] for entry in entries])
        known = ~np.isnan(values)
        out[key] = plain(ratio(np.where(known, values, 0.0).sum(0), known.sum(0).astype(np.float64)))
        low, high = interval(values, level)
        out[f"{key}_interval"] = plain(np.stack([low, high], -1))
    return out
