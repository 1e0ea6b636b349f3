"""Where a routing decision comes from: the router's logit as a sum of what earlier layers wrote.

The router is two linear maps without bias (model.md 2.3). Under whole-block experts it reads the raw residual stream,
which is the embedding plus everything that attention and FFN of the chosen experts added: the split is exact. Under
FFN experts of Llama shape it reads the stream after a norm, whose factor is held fixed for each token: the parts still
sum to the logit, but a part says what a writer gives under the norm that all writers made together.

Source: the decomposition of a linear reader over the residual stream (Elhage et al., "A Mathematical Framework for
Transformer Circuits", 2021), for routers as in "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from micro import interventions as iv
from micro.analysis.batches import batches
from micro.analysis.inputs import counted, evaluating, input_rows, with_none
from micro.analysis.result import Result
from micro.analysis.statistics import Array, benjamini_hochberg, permutation_p
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from micro.modeling import MiCRoForCausalLM

KINDS = ("attention", "ffn")


@dataclass
class RouterSplit:
    """Router logits of T tokens and their parts, float64.

    logits [T,L,E]: raw, as the model computed them. embedding [T,L,E]. writes [L',2,T,K,L,E]: what layer l' wrote
    (attention, FFN), through each of the token's K experts, into the logit of expert e in layer l; 0 for layers that
    come before it. ids int64 [L',T,K]: the experts, -1 where the weight is 0. row, slot int64 [T]. With FFN experts
    attention belongs to no expert; it stands at k = 0.
    """

    logits: Tensor
    embedding: Tensor
    writes: Tensor
    ids: Tensor
    row: Tensor
    slot: Tensor

    def total(self) -> Tensor:
        """Sum of all parts [T,L,E]; equals ``logits`` to rounding."""
        return self.embedding + self.writes.sum((0, 1, 3))

    @property
    def error(self) -> float:
        """Largest difference of the sum from the logit."""
        return float((self.total() - self.logits).abs().max())

    @classmethod
    def cat(cls, parts: Sequence[RouterSplit]) -> RouterSplit:
        """Tokens of several splits, one after the other; rows are numbered through."""
        first, rows = 0, []
        for part in parts:
            rows.append(part.row + first)
            first = int(rows[-1].max()) + 1
        return cls(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.embedding for part in parts]),
            torch.cat([part.writes for part in parts], 2),
            torch.cat([part.ids for part in parts], 1),
            torch.cat(rows),
            torch.cat([part.slot for part in parts]),
        )


def router_split(
    model: MiCRoForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    wanted: Tensor | None = None,
    actions: Sequence[iv.Action] = (),
    **controls: Any,
) -> RouterSplit:
    """Split the router logits of one batch.

    Args:
        model: a MiCRo model of either kind.
        input_ids: int64 [B,S].
        attention_mask: [B,S]; padding is left out.
        wanted: bool [B,S], which tokens; all real ones if not given.
        actions: interventions (:mod:`micro.interventions`) that act in this pass, before it is read.
        controls: steering arguments of the forward.

    Returns:
        A :class:`RouterSplit`. Its parts are computed in float64 from activations in the model's dtype; the error is
        what the model itself rounded (below 1e-4 in float32).
    """
    return _Splitter(model).run(input_ids, attention_mask, wanted, controls, actions)[0]


class _Splitter:
    """Readers of a model, and the writes of a batch against them."""

    def __init__(self, model: MiCRoForCausalLM, *, random_readers: int = 0, seed: int = 0) -> None:
        self.model, self.config = model, model.config
        self.block, self.olmo = bool(model.config.is_block), model.config.backbone == "olmo2"
        readers = []
        layers: Any = model.model.layers
        for layer in layers:
            maps = layer.router.out_proj.weight.double() @ layer.router.in_proj.weight.double()
            if not self.block and not self.olmo:
                maps = maps * layer.post_attention_layernorm.weight.double()
            readers.append(maps.detach())
        self.readers = torch.stack(readers)  # [L,E,H]
        generator = torch.Generator(device="cpu").manual_seed(seed)
        norms = self.readers.norm(dim=-1, keepdim=True)
        shape = (random_readers, *self.readers.shape)
        random = torch.randn(shape, generator=generator, dtype=torch.float64).to(norms.device)
        self.random = random / random.norm(dim=-1, keepdim=True) * norms  # [D,L,E,H]

    @property
    def exactness(self) -> str:
        """How the parts are to be read."""
        if self.block:
            return "exact"
        return "norm behind the experts frozen per token" if self.olmo else "norm before the router frozen per token"

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        wanted: Tensor | None,
        controls: Mapping[str, Any],
        actions: Sequence[iv.Action] = (),
    ) -> tuple[RouterSplit, Tensor]:
        """The split, and the same parts under random readers: layer-level writers [D,1+2L',T,L,E]."""
        points: tuple[iv.Point, ...] = ("residual", "attention", "ffn")
        reads = [iv.read(point, name=f"attribution {point}") for point in points]
        device = self.model.device
        mask = None if attention_mask is None else attention_mask.to(device)
        with evaluating(self.model), self.model.model.intervene(*actions, *reads) as run:
            trace = self.model.model(
                input_ids=input_ids.to(device),
                attention_mask=mask,
                use_cache=False,
                output_routing=True,
                **controls,
            ).routing
        real = trace.mask if wanted is None else trace.mask & wanted.to(device)
        self.token = torch.full(real.shape, -1, device=device)
        self.token[real] = torch.arange(int(real.sum()), device=device)
        self.ids = trace.ids[:, real].long()  # [L,T,K]
        self.weights = trace.weights[:, real].double()
        readings = {str(point): run.reading(f"attribution {point}") for point in points}
        row, slot = real.nonzero(as_tuple=True)
        parts, random = self._parts(readings)
        ids = torch.where(self.weights > 0, self.ids, -1)
        logits = trace.raw_logits[:, real].double().transpose(0, 1)
        layers = len(self.readers)
        return RouterSplit(logits, parts[0, :, 0], parts[1:].unflatten(0, (layers, 2)), ids, row, slot), random

    def _placed(self, reading: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(token, rank among its experts, values float64) of the rows of one layer that are wanted."""
        rows = reading.at(layer)
        token = self.token[rows.row, rows.slot]
        keep = token >= 0
        token, expert = token[keep], rows.expert[keep]
        rank = torch.zeros_like(token)
        if bool((expert >= 0).any()):
            hit = self.ids[layer, token] == expert[:, None]
            rank = hit.int().argmax(1)
            chosen = hit.any(1)
            return token[chosen], rank[chosen], rows.values[keep][chosen].double()
        return token, rank, rows.values[keep].double()

    def _vectors(self, readings: Mapping[str, Any]) -> Iterator[Tensor]:
        """What was written to the stream, [T,K,H] at a time: the embedding, then attention and FFN of each layer, each
        multiplied by the weight of its expert.
        """
        layers, tokens, k = self.ids.shape
        empty = torch.zeros(tokens, k, self.readers.shape[-1], dtype=torch.float64, device=self.ids.device)
        token, rank, values = self._placed(readings["residual"], 0)
        yield empty.index_put((token, rank), values)
        for layer in range(layers):
            for kind in KINDS:
                token, rank, values = self._placed(readings[kind], layer)
                if self.block or kind == "ffn":
                    values = values * self.weights[layer, token, rank][:, None]
                out = empty.index_put((token, rank), values)
                yield self._normed(out, layer) if kind == "ffn" and self.olmo and not self.block else out

    def _normed(self, parts: Tensor, layer: int) -> Tensor:
        """OLMo-2's norm behind the FFN, with the factor of the sum of the experts: parts [T,K,H]."""
        norm: Any = self.model.model.layers[layer].post_feedforward_layernorm
        r = torch.rsqrt(parts.sum(1, keepdim=True).square().mean(-1, keepdim=True) + float(norm.eps))
        out: Tensor = parts * r * norm.weight.double()
        return out

    def _scales(self, readings: Mapping[str, Any]) -> Tensor:
        """[1 + 2L, T, L]: times a writer's vector, what of it reaches the reader of layer l; 0 where it comes too late.

        Whole-block experts hand the stream on multiplied by the sum of the weights (1, but for ``probability``).
        """
        layers, tokens, _ = self.ids.shape
        scale = torch.zeros(1 + 2 * layers, tokens, layers, dtype=torch.float64, device=self.ids.device)
        kept = self.weights.sum(-1) if self.block else torch.ones_like(self.weights[..., 0])  # [L,T]
        for reader in range(layers):
            scale[0, :, reader] = kept[:reader].prod(0)
            for writer in range(layers):
                if writer < reader:
                    scale[1 + 2 * writer : 3 + 2 * writer, :, reader] = kept[writer + 1 : reader].prod(0)
                elif writer == reader and not self.block:
                    scale[1 + 2 * writer, :, reader] = 1.0  # the router stands behind its layer's attention
        if not self.block and not self.olmo:
            scale = scale * self._router_norms(readings)
        return scale

    def _router_norms(self, readings: Mapping[str, Any]) -> Tensor:
        """The frozen factor of the norm before each router, [1,T,L]."""
        layers, tokens, _ = self.ids.shape
        out = torch.ones(tokens, layers, dtype=torch.float64, device=self.ids.device)
        for layer in range(layers):
            token, _, x = self._placed(readings["residual"], layer)
            u = torch.zeros(tokens, x.shape[1], dtype=torch.float64, device=x.device)
            u[token] = x
            token, _, a = self._placed(readings["attention"], layer)
            u[token] += a
            eps = float(self.model.model.layers[layer].post_attention_layernorm.eps)
            out[:, layer] = torch.rsqrt(u.square().mean(-1) + eps)
        return out[None]

    def _parts(self, readings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Parts of the logits [1+2L,T,K,L,E], and those of random readers, summed over K, [D,1+2L,T,L,E]."""
        scale = self._scales(readings)[:, :, None, :, None]
        real, random = [], []
        for w, vector in enumerate(self._vectors(readings)):
            real.append(torch.einsum("tkh,leh->tkle", vector, self.readers) * scale[w])
            random.append(torch.einsum("th,dleh->dtle", vector.sum(1), self.random) * scale[w, :, 0])
        return torch.stack(real), torch.stack(random, 1)


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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> AttributionReport:
        return cls(**content)

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
        from micro.analysis.attribution_figures import attribution_figure

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
    max_tokens: int = 1024,
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
    splitter = _Splitter(model, random_readers=random_readers, seed=seed)
    parts: list[RouterSplit] = []
    random: list[Tensor] = []
    work = list(batches(rows, tokenizer, max_tokens=max_tokens))
    for _, batch in track(work, "attribution", unit="batches", enabled=progress):
        wanted = counted(batch, positions)
        if not bool(wanted.any()):
            continue
        split, control = splitter.run(batch["input_ids"], batch["attention_mask"], wanted, controls or {})
        parts.append(split)
        random.append(control)
        if sum(len(part.row) for part in parts) >= token_limit:
            break
    split = RouterSplit.cat(parts)
    settings = {
        "kind": splitter.exactness,
        "positions": positions, "random_readers": random_readers, "shifts": shifts, "seed": seed,
        "token_limit": token_limit, "p": "two-sided, circular shifts of the choices within rows",
    }  # fmt: skip
    return _report(split, torch.cat(random, 2), list(model.config.expert_names or ()), settings)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _shares(parts: Tensor) -> tuple[Array, Array]:
    """Influence and share of writers: parts [W,T,L,E] -> [L,W] each."""
    parts = _centred(parts)
    parts = parts - parts.mean(1, keepdim=True)
    logit = parts.sum(0)
    total = logit.square().mean((0, 2))  # [L]
    influence = parts.square().mean((1, 3)).T
    share = (parts * logit).mean((1, 3)).T / total.clamp(min=1e-300)[:, None]
    return influence.cpu().numpy(), share.cpu().numpy()


def _report(split: RouterSplit, random: Tensor, experts: list[str], settings: dict[str, Any]) -> AttributionReport:
    layers = split.logits.shape[1]
    together = torch.cat([split.embedding[None], split.writes.sum(3).flatten(0, 1)])
    influence, share = _shares(together)
    null = np.stack([_shares(one)[1] for one in random]) if len(random) else np.full((1, *share.shape), np.nan)
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
        share_random=with_none(null.mean(0)),
        share_random_high=with_none(null.max(0)),
        entanglement=with_none(effect),
        entanglement_p=with_none(p),
        entanglement_q=with_none(benjamini_hochberg(p)),
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
