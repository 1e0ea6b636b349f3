"""One layer of FFN experts (MoE, MiCRo-MoE): attention and norms are shared, only the FFN is cloned (model.md 2.12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from micro import ops
from micro.modeling.block import LayerResult, MiCRoBlocks, RoutedRows, decide, jitter, result
from micro.modeling.cache import append_to_cache
from micro.modeling.call import Call, LayerControls
from micro.modeling.config import MiCRoConfig
from micro.modeling.fused import FusedLayer
from micro.modeling.layers import Linear, RMSNorm, touch
from micro.modeling.router import MiCRoRouter

if TYPE_CHECKING:
    from micro.interventions.session import LayerHooks


class MiCRoAttention(nn.Module):
    """The shared attention of one layer, under the backbone's own parameter names."""

    def __init__(self, config: MiCRoConfig, index: int) -> None:
        super().__init__()
        hidden, head = config.hidden_size, int(config.head_dim or 0)
        self.index, self.olmo = index, config.backbone == "olmo2"
        self.heads = (config.num_attention_heads, int(config.num_key_value_heads or 0), head)
        queries, keys = self.heads[0] * head, self.heads[1] * head
        self.q_proj = Linear(hidden, queries)
        self.k_proj = Linear(hidden, keys)
        self.v_proj = Linear(hidden, keys)
        self.o_proj = Linear(queries, hidden)
        if self.olmo:
            eps = float(config.rms_norm_eps or 0)
            self.q_norm = RMSNorm(queries, eps, gain_in_float32=True)
            self.k_norm = RMSNorm(keys, eps, gain_in_float32=True)

    def forward(self, x: Tensor, call: Call, hooks: LayerHooks | None = None) -> Tensor:
        """Causal attention of x [T,H] -> [T,H], as the expert attention with one expert that has every token."""
        heads, groups, size = self.heads
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.olmo:
            q, k = self.q_norm(q), self.k_norm(k)
        q = ops.rope(q.unflatten(-1, (heads, size)), call.cos, call.sin)
        k = ops.rope(k.unflatten(-1, (groups, size)), call.cos, call.sin)
        shape = (call.rows, 1, call.slots, groups, size)
        k, v = (t.view(shape).transpose(2, 3) for t in (k, v))
        if call.cache is not None:
            k, v = append_to_cache(call.cache, self.index, k, v, call.length)
        a = ops.expert_attention(q, k, v, *call.everyone, slots=call.slots, start=call.start, mask=call.mask)
        a = a.flatten(1)
        out: Tensor = self.o_proj(a if hooks is None else hooks.tokens("heads", a))
        return out


class MiCRoFFNLayer(GradientCheckpointingLayer):
    """A layer whose experts are FFNs."""

    def __init__(self, config: MiCRoConfig, index: int) -> None:
        super().__init__()
        self.index, self.olmo = index, config.backbone == "olmo2"
        self.num_experts = config.num_experts
        eps = float(config.rms_norm_eps or 0)

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps, gain_in_float32=self.olmo)

        self.self_attn = MiCRoAttention(config, index)
        self.post_attention_layernorm = norm()
        if self.olmo:
            self.post_feedforward_layernorm = norm()
        else:
            self.input_layernorm = norm()
        self.router = MiCRoRouter(config)
        self.blocks = MiCRoBlocks(config)
        self.fused = FusedLayer(config, index)

    def forward(
        self, hidden: Tensor, bias: Tensor | None = None, *, call: Call, controls: LayerControls
    ) -> LayerResult:
        """As :meth:`micro.modeling.block.MiCRoBlockLayer.forward`."""
        if call.fused and (done := self.fused.run(self, hidden, bias, call, controls)) is not None:
            return result(*done, controls)
        x, hooks = hidden.reshape(-1, hidden.shape[-1]), controls.hooks
        seen = () if hooks is None else (hooks,)  # a module put in the place of attention need not know of hooks
        if self.olmo:
            a = self.post_attention_layernorm(self.self_attn(x, call, *seen))
            u = n = jitter(x + (a if hooks is None else hooks.tokens("attention", a)), controls)
        else:
            a = self.self_attn(self.input_layernorm(x), call, *seen)
            u = x + (a if hooks is None else hooks.tokens("attention", a))
            n = jitter(self.post_attention_layernorm(u), controls)
        raw, routing = decide(self.router, n, bias, call, controls)
        m = self._mixture(n, RoutedRows(routing, self.num_experts, call, controls))
        y = u + (self.post_feedforward_layernorm(m) if self.olmo else m)
        if controls.rows is not None:
            y = touch(y, self.router)
        return result(y.view(hidden.shape), raw, routing, controls)

    def _mixture(self, n: Tensor, rows: RoutedRows) -> Tensor:
        """Weighted sum of a token's FFN experts, [T,H]; 0 at padded tokens."""
        plan = rows.plan
        f = self.blocks.ffn(ops.permute(n, plan.tokens, plan.offsets, plan.inverse), plan.offsets, rows.at)
        return rows.combine(rows.at("block_output", rows.at("ffn", f)))
