"""Activation patching between two prompts, with its first-order screen, and structured ablation.

effect = (m_patched - m_corrupt) / (m_clean - m_corrupt), m = logit(answer) - logit(wrong) at the last slot: 1 where the
component alone carries the difference, 0 where it carries nothing (Vig et al. 2020; Wang et al. 2023). The screen is
(a_clean - a_corrupt) . dm/da from one forward and backward pass (attribution patching, Nanda 2023; Syed et al. 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from micro import interventions as iv
from micro.analysis.circuits.components import Component, Level, components
from micro.analysis.circuits.prompts import EncodedPair, PromptPair, encode_pair
from micro.analysis.modes import evaluating
from micro.analysis.result import Result
from micro.analysis.statistics import mean_interval
from micro.interventions.points import Point
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.interventions import Reading
    from micro.modeling import MiCRoForCausalLM

Routes = Literal["clean", "free"]
LEAST_SHARE = 0.05  # of the median difference: a smaller denominator would decide the mean alone


@dataclass
class PatchingResult(Result):
    """Effect of every component: [components][pairs], NaN where it was not patched (screened out)."""

    name: ClassVar[str] = "patching"

    experts: list[str]
    components: list[dict[str, Any]]
    effect: list[list[float]]
    screen: list[list[float]]  # first-order estimate of the same
    clean: list[float]  # m of the clean prompts
    corrupt: list[float]
    excluded: int  # pairs whose prompts the model does not tell apart
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One row per component: mean effect with a 95 % bootstrap interval over pairs, and the screen's mean."""
        import pandas as pd

        low, high = mean_interval(np.transpose(self.effect))
        columns = {
            "component": [Component(**part).label(self.experts) for part in self.components],
            "effect": np.mean(self.effect, axis=1),
            "low": low,
            "high": high,
            "first_order": np.mean(self.screen, axis=1),
        }
        return pd.DataFrame(columns).sort_values("effect", ascending=False, key=np.abs, ignore_index=True)

    def plot(self) -> Figure:
        from micro.analysis.circuits.figures import patching_figure

        return patching_figure(self)

    def __str__(self) -> str:
        shown = self.table().head(20).to_string(index=False, float_format=lambda value: f"{value:.3f}")
        left = f"{self.excluded} excluded" if self.excluded else "none excluded"
        pairs = f"{len(self.clean)} pairs" if len(self.clean) > 1 else "1 pair, so without intervals"
        most = ", the 20 largest shown" if len(self.components) > 20 else ""
        return f"{shown}\n{pairs} ({left}), {len(self.components)} components{most}"


def patching(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    pairs: Sequence[PromptPair],
    *,
    point: Point = "block_output",
    level: Level = "cell",
    routes: Routes = "clean",
    top: int | None = None,
    batch: int = 16,
    progress: bool = False,
) -> PatchingResult:
    """Put what a component gave for the clean prompt into the run of the corrupt one, component by component.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: of the model; None if the pairs hold token ids.
        pairs: clean and corrupt prompts of equal length with the tokens that tell them apart.
        point: where, see :mod:`micro.interventions.points`.
        level: "layer", "cell" (layer x expert), "head" (point "heads") or "slot" (layer x position; all pairs must then
            have the same length).
        routes: "clean": both runs take the router scores of the clean prompt, so that patching everything gives 1;
            "free": each run takes its own, and an expert that the clean prompt did not use is run on it for the patch.
        top: patch only so many components, the largest by the first-order screen; None: all.
        batch: interventions computed side by side.
        progress: show a bar on stderr.

    Returns:
        A :class:`PatchingResult`.

    Raises:
        ValueError: pairs of different lengths, or a point that the level does not fit.

    Source: capabilities of activation patching, Vig et al. (2020), Wang et al. (2023); screen: Syed et al. (2023).
    """
    if not pairs:
        raise ValueError("patching: pairs is empty")
    if routes not in ("clean", "free"):
        raise ValueError(f'routes is {routes!r}, expected "clean" or "free"')
    encoded = [encode_pair(pair, tokenizer, i) for i, pair in enumerate(pairs)]
    lengths = {len(pair.clean) for pair in encoded}
    if level == "slot" and len(lengths) > 1:
        raise ValueError(f'level "slot" needs prompts of one length, these have {sorted(lengths)} tokens')
    parts = components(model.config, point, level, min(lengths))
    with evaluating(model):
        runs = [_PairRun(model, pair, point, routes) for pair in encoded]
        kept = _told_apart(runs)
        screen = np.array([run.screen(parts) for run in kept]).T
        wanted = np.argsort(-np.abs(screen.mean(1)), kind="stable")[: top or len(parts)]
        effect = np.full(screen.shape, np.nan)
        for i, run in enumerate(track(kept, "patching", unit="pairs", enabled=progress)):
            effect[wanted, i] = run.effects([parts[int(w)] for w in wanted], batch)
    shown = sorted(int(w) for w in wanted)
    return PatchingResult(
        experts=list(model.config.expert_names or ()),
        components=[asdict(parts[w]) for w in shown],
        effect=effect[shown].tolist(),
        screen=screen[shown].tolist(),
        clean=[run.clean for run in kept],
        corrupt=[run.corrupt for run in kept],
        excluded=len(runs) - len(kept),
        settings={
            "point": point,
            "level": level,
            "routes": routes,
            "screened": len(parts) - len(shown),
            "excluded": f"pairs whose |m_clean - m_corrupt| is below {LEAST_SHARE} of the median",
        },
    )


def _told_apart(runs: list[_PairRun]) -> list[_PairRun]:
    """The pairs whose difference is large enough to divide by."""
    differences = np.abs([run.clean - run.corrupt for run in runs])
    least = max(1e-9, LEAST_SHARE * float(np.median(differences)))
    kept = [run for run, difference in zip(runs, differences, strict=True) if difference > least]
    if not kept:
        raise ValueError("patching: the model gives the same logits for clean and corrupt in every pair")
    return kept


class _PairRun:
    """The clean and the corrupt run of one pair."""

    def __init__(self, model: MiCRoForCausalLM, pair: EncodedPair, point: Point, routes: Routes) -> None:
        self.model, self.pair, self.point, self.routes = model, pair, point, routes
        self.ids = pair.corrupt.to(model.device)[None]
        reads = [iv.read(point, name="source"), iv.read("router", name="router")]
        with torch.no_grad(), model.intervene(*reads, all_experts=routes == "free") as run:
            out = model(pair.clean.to(model.device)[None], use_cache=False, logits_to_keep=1)
        self.source: Reading = run.reading("source")
        self.scores = run.reading("router") if routes == "clean" else None
        self.clean = float(self._difference(out.logits[:, -1])[0])
        self.corrupt = float(self._run([], 1)[0])

    def effects(self, parts: Sequence[Component], batch: int) -> list[float]:
        """Normalised effect of each component, patched alone."""
        values: list[float] = []
        for first in range(0, len(parts), batch):
            chunk = parts[first : first + batch]
            patches = [
                [iv.replace(self.point, source=self.source.at(part.layer, part.expert), **part.where())]
                for part in chunk
            ]
            values += self._run(iv.side_by_side(patches), len(chunk))
        return [(value - self.corrupt) / (self.clean - self.corrupt) for value in values]

    def screen(self, parts: Sequence[Component]) -> list[float]:
        """First-order estimate of each effect."""
        read = iv.read(self.point, keep_graph=True, name="corrupt")
        embeds = self.model.model.embed_tokens(self.ids).detach().requires_grad_()
        with torch.enable_grad(), self.model.intervene(*same_routes(self.scores, 1), read) as run:
            out = self.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1)
            difference = self._difference(out.logits[:, -1])[0]
        seen = run.parts("corrupt")
        gradients = torch.autograd.grad(difference, [part.values for part in seen], allow_unused=True)
        products = [self._products(part, gradient) for part, gradient in zip(seen, gradients, strict=True)]
        scale = self.clean - self.corrupt
        return [float(_share(part, products, self.model.config.num_attention_heads)) / scale for part in parts]

    def _products(self, part: Reading, gradient: Tensor | None) -> Reading:
        """(a_clean - a_corrupt) * dm/da, row by row."""
        if gradient is None:
            return replace(part, values=torch.zeros_like(part.values))
        key = {k: i for i, k in enumerate(_keys(self.source))}
        index = torch.tensor([key[k] for k in _keys(part)])
        return replace(part, values=((self.source.values[index] - part.values) * gradient).detach())

    @torch.no_grad()
    def _run(self, actions: list[iv.Action], rows: int) -> list[float]:
        """Difference m of each row. ``iv.variants`` would give the same, but forms the logits of all slots."""
        with self.model.intervene(*same_routes(self.scores, rows), *actions):
            out = self.model(self.ids.expand(rows, -1), use_cache=False, logits_to_keep=1)
        values: list[float] = self._difference(out.logits[:, -1]).tolist()
        return values

    def _difference(self, logits: Tensor) -> Tensor:
        wide = logits.double()
        return wide[:, self.pair.answer] - wide[:, self.pair.wrong]


def same_routes(scores: Reading | None, rows: int) -> list[iv.Action]:
    """Actions that give every row of a batch the router scores, and so the routes and weights, of another run's row 0.

    Replaying the choices alone would weigh them by the new scores, which may be 0 for an expert that the new prompt
    would never use.
    """
    if scores is None:
        return []
    index = torch.arange(len(scores), device=scores.row.device).repeat(rows)
    repeated = replace(scores.select(index), row=torch.arange(rows, device=index.device).repeat_interleave(len(scores)))
    return [iv.replace("router", source=repeated, name="same routes")]


def _keys(reading: Reading) -> list[tuple[int, ...]]:
    columns = (reading.layer, reading.expert, reading.slot)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _share(part: Component, products: list[Reading], heads: int) -> Tensor:
    """Sum of the products that belong to a component."""
    total = torch.zeros((), dtype=torch.float64)
    for reading in products:
        wanted = reading.layer == part.layer
        if part.expert is not None:
            wanted = wanted & (reading.expert == part.expert)
        if part.slot is not None:
            wanted = wanted & (reading.slot == part.slot)
        values = reading.values[wanted].double()
        if part.head is not None:
            values = values.unflatten(-1, (heads, -1))[:, part.head]
        total += values.sum().cpu()
    return total
