"""The router's logit as a sum of what was written before it.

The router is two linear maps without bias (model.md 2.3). Under whole-block experts it reads the raw residual stream,
which is the embedding plus everything that attention and FFN of the chosen experts added: the split is exact. Under
FFN experts of Llama shape it reads the stream after a norm, whose factor is held fixed for each token: the parts still
sum to the logit, but a part says what a writer gives under the norm that all writers made together.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from micro import interventions as iv
from micro.analysis.modes import evaluating

if TYPE_CHECKING:
    from torch import Tensor

    from micro.modeling import MiCRoForCausalLM

KINDS = ("attention", "ffn")


@dataclass
class RouterSplit:
    """Router logits of T tokens and their parts, float64.

    logits [T,L,E]: raw, as the model computed them. embedding [T,L,E]. writes [L',2,T,K,L,E]: what layer l' wrote
    (attention, FFN), through each of the token's K experts, into the logit of expert e in layer l; 0 for layers that
    come before it. ids int64 [L',T,K]: the experts, -1 where the weight is 0. row, slot int64 [T]. With FFN experts
    attention belongs to no expert; it stands at k = 0. heads [L',T,K,A,L,E], where asked for: attention's part, head by
    head (behind a norm, as OLMo-2 has it, under the factor that all heads made together).
    """

    logits: Tensor
    embedding: Tensor
    writes: Tensor
    ids: Tensor
    row: Tensor
    slot: Tensor
    heads: Tensor | None = None

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
            torch.cat([part.heads for part in parts if part.heads is not None], 1)
            if parts[0].heads is not None
            else None,
        )


def router_split(
    model: MiCRoForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    wanted: Tensor | None = None,
    heads: bool = False,
    actions: Sequence[iv.Action] = (),
    **controls: Any,
) -> RouterSplit:
    """Split the router logits of one batch.

    Args:
        model: a MiCRo model of either kind.
        input_ids: int64 [B,S].
        attention_mask: [B,S]; padding is left out.
        wanted: bool [B,S], which tokens; all real ones if not given.
        heads: split attention into its heads, too; 8 L^2 A E K bytes a token.
        actions: interventions (:mod:`micro.interventions`) that act in this pass, before it is read.
        controls: steering arguments of the forward.

    Returns:
        A :class:`RouterSplit`. Its parts are computed in float64 from activations in the model's dtype; the error is
        what the model itself rounded (below 1e-4 in float32).
    """
    return Splitter(model, heads=heads).run(input_ids, attention_mask, wanted, controls, actions)[0]


class Splitter:
    """Readers of a model, and the writes of a batch against them."""

    def __init__(self, model: MiCRoForCausalLM, *, random_readers: int = 0, heads: bool = False, seed: int = 0) -> None:
        self.model, self.config, self.heads = model, model.config, heads
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
        points: tuple[iv.Point, ...] = ("residual", "attention", "ffn", *(("heads",) if self.heads else ()))
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
        split = RouterSplit(logits, parts[0, :, 0], parts[1:].unflatten(0, (layers, 2)), ids, row, slot)
        if self.heads:
            split.heads = self._head_parts(readings)
        return split, random

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

    def _head_parts(self, readings: Mapping[str, Any]) -> Tensor:
        """Attention's parts by head, [L',T,K,A,L,E]."""
        layers, tokens, k = self.ids.shape
        count = self.config.num_attention_heads
        scale = self._scales(readings)[1::2]  # [L',T,L]
        shape = (layers, tokens, k, count, *self.readers.shape[:2])
        out = torch.zeros(shape, dtype=torch.float64, device=self.ids.device)
        for layer in range(layers):
            token, rank, values = self._placed(readings["heads"], layer)
            owner = self.ids[layer, token, rank] if self.block else torch.zeros_like(token)
            weights, gains, eps = self._attention_output(layer)
            for e in range(len(weights)):
                mine = owner == e
                x, at = values[mine].unflatten(-1, (count, -1)), (token[mine], rank[mine])
                readers = self.readers if gains is None else self.readers * gains[e]
                maps = torch.einsum("leh,had->lead", readers, weights[e].unflatten(-1, (count, -1)))
                parts = torch.einsum("nad,lead->nale", x, maps) * scale[layer][at[0]][:, None, :, None]
                if gains is not None:
                    a = values[mine] @ weights[e].T
                    parts = parts * torch.rsqrt(a.square().mean(-1) + eps)[:, None, None, None]
                out[layer][at] = parts * self.weights[layer][at][:, None, None, None] if self.block else parts
        return out

    def _attention_output(self, layer: int) -> tuple[Tensor, Tensor | None, float]:
        """Output matrices [E|1,H,A*D], gains of the norm behind them [E|1,H] (OLMo-2), its eps."""
        module: Any = self.model.model.layers[layer]
        owner = module.blocks if self.block else module.self_attn
        weights = owner.o_proj.weight.detach().double()
        norm = (
            (module.blocks.post_attention_norm if self.block else module.post_attention_layernorm)
            if self.olmo
            else None
        )
        gains = None if norm is None else norm.weight.detach().double()
        if not self.block:
            weights, gains = weights[None], None if gains is None else gains[None]
        return weights, gains, 0.0 if norm is None else float(norm.eps)
