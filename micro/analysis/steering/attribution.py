"""Where a routing decision comes from: parts of router logits (``router_parts``) over many tokens.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", 2026: influence as the variance
of a part, entanglement of layers. Shares, random routers and tests are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from micro.analysis.batches import batches
from micro.analysis.inputs import counted, input_rows
from micro.analysis.result import Result, plain
from micro.analysis.statistics import Array, benjamini_hochberg, permutation_p
from micro.analysis.steering.router_parts import KINDS, RouterSplit, Splitter
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from micro.modeling import MiCRoForCausalLM


@dataclass
class AttributionReport(Result):
    """What decides routing, layer by layer, and which cell promotes or inhibits later ones.

    Parts are centred over experts, because a softmax sees differences only. writers: "embedding", then "attention l"
    and "ffn l". influence [L][W]: variance of a writer's part over tokens, mean over experts (nats squared).
    share [L][W]: covariance of the part with the logit over the logit's variance; a layer's shares sum to 1.
    share_random [L][W], share_random_high [L][W]: mean and maximum of the share under random routers of the same norm.
    entanglement [L'][E'][L][E]: how much higher the logit of cell (l,e) is through what layer l' wrote, where expert e'
    was chosen there, than where it was not; None where that never or always happened. p, q (Benjamini-Hochberg over all
    cells): against the choices shifted in a circle within each row. rate [L'][E']. max_error: of the sums.
    """

    name: ClassVar[str] = "attribution"

    experts: list[str]
    writers: list[str]
    rows: int
    tokens: int
    max_error: float
    largest_logit: float
    influence: list[list[float]]
    share: list[list[float]]
    share_random: list[list[float | None]]
    share_random_high: list[list[float | None]]
    entanglement: list[list[list[list[float | None]]]]
    entanglement_p: list[list[list[list[float | None]]]]
    entanglement_q: list[list[list[list[float | None]]]]
    rate: list[list[float]]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per layer and writer that can reach it."""
        import pandas as pd

        lines = [
            {
                "layer": layer, "writer": writer, "influence": self.influence[layer][w], "share": self.share[layer][w],
                "random_share": self.share_random[layer][w], "random_share_high": self.share_random_high[layer][w],
            }
            for layer in range(len(self.share))
            for w, writer in enumerate(self.writers)
            if self.influence[layer][w] > 0
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def cells(self) -> pd.DataFrame:
        """One line per pair of cells: writer layer and expert, reader layer and expert, effect, p, q."""
        import pandas as pd

        lines = []
        for m, e, l, f in np.ndindex(*np.asarray(self.entanglement, dtype=object).shape):
            effect = self.entanglement[m][e][l][f]
            if effect is not None and m < l:
                names = {"from_layer": m, "from": self.experts[e], "to_layer": l, "to": self.experts[f]}
                tests = {"p": self.entanglement_p[m][e][l][f], "q": self.entanglement_q[m][e][l][f]}
                lines.append({**names, "effect": effect, **tests})
        return pd.DataFrame(lines)

    def __str__(self) -> str:
        lines = [f"{self.tokens} tokens of {self.rows} rows; parts sum to the logits within {self.max_error:.1e}"]
        for layer, share in enumerate(self.share):
            order = [w for w in np.argsort(share)[::-1] if self.influence[layer][w] > 0][:3]
            parts = [f"{self.writers[w]} {share[w]:+.2f}{self._random(layer, w)}" for w in order]
            lines.append(f"layer {layer}: {', '.join(parts)}")
        return "\n".join(lines)

    def _random(self, layer: int, writer: int) -> str:
        share = self.share_random[layer][writer]
        return "" if share is None else f" (random {share:+.2f})"

    def plot(self) -> Figure:
        from micro.analysis.steering.attribution_figures import attribution_figure

        return attribution_figure(self)


def attribution(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    data: Sequence[Any],
    *,
    positions: str = "predicting",
    controls: Mapping[str, Any] | None = None,
    random_readers: int = 5,
    shifts: int = 199,
    token_limit: int = 4096,
    encode_options: dict[str, Any] | None = None,
    max_tokens: int = 512,
    seed: int = 0,
    progress: bool = False,
) -> AttributionReport:
    """Split the router logits over tokens of texts or records, and say who decides and which cell leads to which.

    Args:
        model: a MiCRo model of either kind; float32 or wider for sums within 1e-4.
        tokenizer: of the model.
        data: texts (no chat template) or records.
        positions: "predicting" (answers of records; all tokens but the last of texts) or "all".
        controls: steering arguments of the forward passes.
        random_readers: random routers of the same norm, the control of shares.
        shifts: draws of the null of the entanglement.
        token_limit: stop after so many tokens; the parts of all of them are held at once, 16 L^2 E K bytes a token.
        encode_options: passed to :func:`micro.data.encode`.
        max_tokens: slots per batch.
        seed: of the null and of the random readers.
        progress: show a bar on stderr.

    Raises:
        ValueError: no data, nothing left after encoding, or an unknown word for positions.
    """
    rows = input_rows(data, tokenizer, "attribution", encode_options=encode_options)
    splitter = Splitter(model, random_readers=random_readers, seed=seed)
    parts: list[RouterSplit] = []
    real, random = _Shares(), _Shares()
    work = list(batches(rows, tokenizer, max_tokens=max_tokens))
    for _, batch in track(work, "attribution", unit="batches", enabled=progress):
        wanted = counted(batch, positions)
        if not bool(wanted.any()):
            continue
        split, control = splitter.run(batch["input_ids"], batch["attention_mask"], wanted, controls or {})
        parts.append(split)
        real.add(torch.cat([split.embedding[None], split.writes.sum(3).flatten(0, 1)])[None])
        if random_readers:
            random.add(control)
        if sum(len(part.row) for part in parts) >= token_limit:
            break
    split = RouterSplit.cat(parts)
    settings = {
        "kind": splitter.exactness,
        "positions": positions, "random_readers": random_readers, "shifts": shifts, "seed": seed,
        "token_limit": token_limit, "p": "two-sided, circular shifts of the choices within rows",
    }  # fmt: skip
    null = random.result()[1] if random_readers else None
    return _report(split, real.result(), null, list(model.config.expert_names or ()), settings)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


class _Shares:
    """Streaming variances of parts and their covariances with the logit."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: list[Tensor] = []  # of p, p^2 and p z, [D,W,L,E]

    def add(self, parts: Tensor) -> None:
        """Take in [D,W,T,L,E]."""
        parts = _centred(parts)
        logit = parts.sum(1, keepdim=True)
        new = [parts.sum(2), parts.square().sum(2), (parts * logit).sum(2)]
        self.sums = [old + one for old, one in zip(self.sums, new, strict=True)] if self.sums else new
        self.tokens += parts.shape[2]

    def result(self) -> tuple[Array, Array]:
        """Influence and share, [D,L,W] each."""
        mean, square, product = (total / self.tokens for total in self.sums)
        influence = (square - mean.square()).clamp(min=0).mean(-1)
        covariance = (product - mean * mean.sum(1, keepdim=True)).mean(-1)
        share = covariance / covariance.sum(1, keepdim=True).clamp(min=1e-300)
        return influence.transpose(1, 2).cpu().numpy(), share.transpose(1, 2).cpu().numpy()


def _report(
    split: RouterSplit, found: tuple[Array, Array], null: Array | None, experts: list[str], settings: dict[str, Any]
) -> AttributionReport:
    layers = split.logits.shape[1]
    influence, share = (values[0] for values in found)
    null = np.full((1, *share.shape), np.nan) if null is None else null
    effect, p, rate = entanglement(split, len(experts), settings["shifts"], settings["seed"])
    return AttributionReport(
        experts=experts,
        writers=["embedding"] + [f"{kind} {layer}" for layer in range(layers) for kind in KINDS],
        rows=int(split.row.unique().numel()),
        tokens=len(split.row),
        max_error=split.error,
        largest_logit=float(split.logits.abs().max()),
        influence=influence.tolist(),
        share=share.tolist(),
        share_random=plain(null.mean(0)),
        share_random_high=plain(null.max(0)),
        entanglement=plain(effect),
        entanglement_p=plain(p),
        entanglement_q=plain(benjamini_hochberg(p)),
        rate=rate.tolist(),
        settings=settings,
    )


def entanglement(split: RouterSplit, experts: int, shifts: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Mean centred part of layer l' in the logit of (l,e) where e' was chosen there, less the mean where it was not.

    Returns:
        effect and p, [L',E',L,E], NaN for l <= l' and where e' was never or always chosen; rate [L',E'].
    """
    writes = _centred(split.writes.sum((1, 3))).cpu().numpy()  # [L',T,L,E]
    layers = writes.shape[0]
    ids = split.ids.cpu().numpy()
    fired = (ids[..., None] == np.arange(experts)).any(2).astype(np.float64)  # [L',T,E']
    order = _shift_orders(split.row.cpu().numpy(), shifts, seed)
    effect = np.full((layers, experts, layers, experts), np.nan)
    p = np.full_like(effect, np.nan)
    for m in range(layers - 1):
        later = writes[m, :, m + 1 :]
        effect[m, :, m + 1 :] = _difference(fired[m][None], later)[0]
        null = _difference(fired[m][order], later)
        if shifts:
            centre = null.mean(0)
            p[m, :, m + 1 :] = permutation_p(effect[m, :, m + 1 :] - centre, null - centre, alternative="two-sided")
    return effect, p, fired.mean(1)


def _difference(fired: Array, later: Array) -> Array:
    """Fired [D,T,E'], later [T,...] -> mean where fired less mean where not [D,E',...]."""
    count = fired.sum(1)
    flat = later.reshape(len(later), -1)
    sums = np.einsum("dte,tx->dex", fired, flat, optimize=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        yes = sums / count[..., None]
        no = (flat.sum(0) - sums) / (len(flat) - count)[..., None]
    out = np.where((count[..., None] > 0) & (count[..., None] < len(flat)), yes - no, np.nan)
    return out.reshape(*fired.shape[:1], fired.shape[2], *later.shape[1:])


def _shift_orders(row: Array, shifts: int, seed: int) -> Any:
    """int64 [shifts,T]: the tokens of each row moved in a circle by a random number of places."""
    generator = np.random.default_rng(seed)
    order = np.tile(np.arange(len(row)), (shifts, 1))
    for r in np.unique(row):
        index = np.flatnonzero(row == r)
        moved = (np.arange(len(index)) + generator.integers(0, len(index), size=(shifts, 1))) % len(index)
        order[:, index] = index[moved]
    return order
