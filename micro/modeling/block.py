"""One layer of whole-block experts (MoB, MiCRo), and the routing decision that both kinds of layers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from micro import ops
from micro.experts import Routing
from micro.modeling.cache import append_to_cache
from micro.modeling.call import Call, LayerControls
from micro.modeling.config import MiCRoConfig
from micro.modeling.fused import FusedLayer
from micro.modeling.layers import StackedLinear, StackedNorm, touch
from micro.modeling.router import MiCRoRouter

# hidden states, effective logits, raw logits, probabilities, ids, weights; None where another tensor of the call says
# the same (effective logits and probabilities under given rows) or where the router did not run.
LayerResult = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]


class MiCRoBlocks(nn.Module):
    """Parameters of the E blocks of one layer (model.md 2.4, 2.5); FFN experts have the three FFN maps only."""

    def __init__(self, config: MiCRoConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        if config.is_block:
            self._add_attention(config)
        self.gate_proj = StackedLinear(experts, hidden, inner, rows=True)
        self.up_proj = StackedLinear(experts, hidden, inner, rows=True)
        self.down_proj = StackedLinear(experts, inner, hidden, rows=True)

    def _add_attention(self, config: MiCRoConfig) -> None:
        experts, hidden, head = config.num_experts, config.hidden_size, int(config.head_dim or 0)
        queries, keys = config.num_attention_heads * head, int(config.num_key_value_heads or 0) * head
        olmo = config.backbone == "olmo2"
        eps = float(config.rms_norm_eps or 0)

        def norm(size: int) -> StackedNorm:
            return StackedNorm(experts, size, eps, gain_in_float32=olmo)

        if olmo:
            self.q_norm, self.k_norm = norm(queries), norm(keys)
        else:
            self.input_norm = norm(hidden)
        self.post_attention_norm = norm(hidden)
        if olmo:
            self.post_ffn_norm = norm(hidden)
        self.q_proj = StackedLinear(experts, hidden, queries, rows=True)
        self.k_proj = StackedLinear(experts, hidden, keys, rows=False)
        self.v_proj = StackedLinear(experts, hidden, keys, rows=False)
        self.o_proj = StackedLinear(experts, queries, hidden, rows=True)

    def ffn(self, x: Tensor, offsets: Tensor, at: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """SwiGLU of each row's expert: x [N,H] in plan order -> [N,H]; ``at``: :meth:`RoutedRows.at`."""
        # Gate first: the gradients of x are added in the reverse of this order, and the fused layer's are, too.
        gate, up = self.gate_proj(x, offsets), self.up_proj(x, offsets)
        units = ops.swiglu(gate, up if at is None else at("up", up))
        out: Tensor = self.down_proj(units if at is None else at("units", units), offsets)
        return out


class RoutedRows:
    """The rows that a layer's experts compute, and where actions meet them.

    The usual ones are the routing's. Where actions ask for all experts on all tokens, the plan has T E rows, and the
    result is still made of the routing's alone.
    """

    def __init__(self, routing: Routing, experts: int, call: Call, controls: LayerControls) -> None:
        self.routing, self.hooks = routing, controls.hooks
        self.usual = self.plan = ops.plan(routing.ids, experts, routing.weights, call.real)
        if self.hooks is None or not self.hooks.all_experts:
            return
        everyone = torch.arange(experts, dtype=torch.int32, device=routing.ids.device)
        self.plan = ops.plan(everyone.repeat(len(routing.ids), 1), experts, None, call.real)
        self.hooks.chosen = self._chosen()

    def _chosen(self) -> Tensor:
        """Bool [T,E]: the pairs of the usual plan."""
        usual = self.usual
        pairs = torch.zeros_like(self.plan.inverse, dtype=torch.bool)
        routed = torch.arange(len(usual.tokens), device=pairs.device) < usual.offsets[-1]
        pairs[usual.tokens[routed].long(), usual.experts[routed].long()] = True
        return pairs

    def at(self, point: str, x: Tensor) -> Tensor:
        """Rows [N,W] in plan order, after the actions at a point."""
        if self.hooks is None:
            return x
        return self.hooks.routed(point, x, self.plan.tokens, self.plan.experts, self.plan.offsets)

    def combine(self, out: Tensor) -> Tensor:
        """Weighted sum of a token's experts: out [N,H] -> [T,H]."""
        usual = self.usual
        if usual is not self.plan:
            out = out[self.plan.inverse[usual.tokens.long(), usual.experts.long()].long()]
        return ops.combine(out, self.routing.weights, usual.experts, usual.offsets, usual.inverse)


def jitter(x: Tensor, controls: LayerControls) -> Tensor:
    """Noise: x times uniform(1 - j, 1 + j), out of place, from the call's seed, so that recomputation repeats it
    (model.md 2.14).
    """
    if controls.jitter == 0.0:
        return x
    generator = torch.Generator(device=x.device).manual_seed(controls.jitter_seed)
    noise = torch.empty_like(x).uniform_(1 - controls.jitter, 1 + controls.jitter, generator=generator)
    return x * noise


def decide(
    router: MiCRoRouter, x: Tensor, bias: Tensor | None, call: Call, controls: LayerControls
) -> tuple[Tensor | None, Routing]:
    """Raw logits (None if the router need not run) and the decision for x [T,H] (model.md 2.3, 4.3)."""
    raw = router(x) if controls.run_router else None
    if raw is not None and controls.hooks is not None:
        raw = controls.hooks.tokens("router", raw)
    memo = controls.memo
    replay = controls.replay if memo is None or memo.ids is None else memo.ids
    k, rule, rows = call.experts_per_token, call.weight_rule, controls.rows
    if rows is not None and controls.row_mask is None:
        routing = ops.route(None, k, rows=rows, replay=replay, weight_rule=rule)
    else:
        assert raw is not None
        steer = {"bias": bias, "ablate": controls.ablate, "force": controls.force}
        if controls.replay is not None and controls.replay_mask is not None and replay is controls.replay:
            free = ops.route(raw, k, weight_rule=rule, **steer)
            replay = torch.where(controls.replay_mask[:, None], controls.replay, free.ids)
        routing = ops.route(raw, k, replay=replay, weight_rule=rule, **steer)
        if rows is not None and controls.row_mask is not None:
            given = controls.row_mask[:, None]
            effective = torch.where(given, rows, routing.effective)
            mixed = torch.where(given, rows, routing.probs)
            routing = ops.route(None, k, rows=mixed, weight_rule=rule)._replace(effective=effective)
    if memo is not None and memo.ids is None:
        memo.ids = routing.ids.detach()
    return raw, routing._replace(weights=routing.weights.to(x.dtype))


def result(x: Tensor, raw: Tensor | None, routing: Routing, controls: LayerControls) -> LayerResult:
    """What a layer returns. Never an input itself: under reentrant checkpointing that recurses without end."""
    given = controls.rows is not None and controls.row_mask is None
    effective, probs = (None, None) if given else (routing.effective, routing.probs)
    return x, effective, raw, probs, routing.ids, routing.weights


class MiCRoBlockLayer(GradientCheckpointingLayer):
    """A layer whose experts are whole transformer blocks, attention included.

    Every expert has keys and values for every token; queries, attention, output and FFN run for a token's K experts
    only (model.md 2.6). Without a cache, keys and values of experts that nobody uses are skipped.
    """

    def __init__(self, config: MiCRoConfig, index: int) -> None:
        super().__init__()
        self.index, self.olmo = index, config.backbone == "olmo2"
        self.heads = (config.num_attention_heads, int(config.num_key_value_heads or 0), int(config.head_dim or 0))
        self.num_experts = config.num_experts
        self.router = MiCRoRouter(config)
        self.blocks = MiCRoBlocks(config)
        self.fused = FusedLayer(config, index)

    def forward(
        self, hidden: Tensor, bias: Tensor | None = None, *, call: Call, controls: LayerControls
    ) -> LayerResult:
        """The layer: hidden [B,S,H], bias float [T|1,E] or None -> (hidden [B,S,H], effective and raw logits [T,E],
        probabilities [T,E], ids int32 [T,K], weights [T,K]).
        """
        if call.fused and (done := self.fused.run(self, hidden, bias, call, controls)) is not None:
            return result(*done, controls)
        x = jitter(hidden.reshape(-1, hidden.shape[-1]), controls)
        raw, routing = decide(self.router, x, bias, call, controls)
        rows = RoutedRows(routing, self.num_experts, call, controls)
        plan = rows.plan
        xs = ops.permute(x, plan.tokens, plan.offsets, plan.inverse)
        blocks, offsets, experts = self.blocks, plan.offsets, plan.experts
        keys, values = self._keys_values(x, call, None if call.cache is not None else offsets)
        q = blocks.q_proj(xs if self.olmo else blocks.input_norm(xs, experts), offsets)
        if self.olmo:
            q = blocks.q_norm(q, experts)
        q = ops.rope(q.unflatten(-1, (self.heads[0], self.heads[2])), call.cos, call.sin, plan.tokens)
        a = ops.expert_attention(
            q, keys, values, plan.tokens, offsets, slots=call.slots, start=call.start, mask=call.mask
        )
        a = blocks.o_proj(rows.at("heads", a.flatten(1)), offsets)
        if self.olmo:
            u = xs + rows.at("attention", blocks.post_attention_norm(a, experts))
            f = blocks.post_ffn_norm(blocks.ffn(u, offsets, rows.at), experts)
        else:
            u = xs + rows.at("attention", a)
            f = blocks.ffn(blocks.post_attention_norm(u, experts), offsets, rows.at)
        y = rows.combine(rows.at("block_output", u + rows.at("ffn", f)))
        if controls.rows is not None:
            y = touch(y, self.router)
        return result(y.view(hidden.shape), raw, routing, controls)

    def _keys_values(self, x: Tensor, call: Call, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of all experts, [B,E,G,J,D] each, the cached slots included."""
        blocks, (_, groups, size) = self.blocks, self.heads
        n = x[None] if self.olmo else blocks.input_norm(x[None])
        k, v = blocks.k_proj(n, offsets), blocks.v_proj(n, offsets)
        if self.olmo:
            k = blocks.k_norm(k)
        k = ops.rope(k.unflatten(-1, (groups, size)), call.cos, call.sin)
        shape = (self.num_experts, call.rows, call.slots, groups, size)
        k, v = (t.view(shape).permute(1, 0, 3, 2, 4) for t in (k, v))
        if call.cache is None:
            return k, v
        return append_to_cache(call.cache, self.index, k, v, call.length)
