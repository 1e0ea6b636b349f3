"""The whole model in plain PyTorch, by the definition: every expert on every token, then select (model.md 2).

Reads a state dictionary with official key names, both families, both kinds, any floating dtype. Independent of
:mod:`micro.ops` and :mod:`micro.modeling`: it shares no function with what it is compared with. Slow on purpose.

B rows, S slots, E experts, K experts per token, H hidden, A query heads, G key/value heads, D head size, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Shape(Protocol):
    """The fields of a config that the mathematics needs."""

    backbone: str
    block_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict[str, float]
    num_experts: int
    num_experts_per_tok: int
    weight_rule: str
    tie_word_embeddings: bool


@dataclass
class ReferenceOutput:
    """logits [B,S,V]; hidden: L + 1 tensors [B,S,H]; per layer: raw and effective router logits and probabilities
    [B,S,E], ids and weights [B,S,K].
    """

    logits: Tensor
    hidden: list[Tensor]
    raw: list[Tensor]
    effective: list[Tensor]
    probs: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]


class ReferenceModel:
    """``ReferenceModel(config, state)(input_ids)``: the forward pass of model.md 2, written to be read."""

    def __init__(self, config: Shape, state: Mapping[str, Tensor]) -> None:
        self.config, self.state = config, state
        self.olmo, self.block = config.backbone == "olmo2", config.block_type == "block"
        self.dtype = state["embed_tokens.weight"].dtype

    def __call__(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        k: int | None = None,
        rows: Tensor | None = None,
        ablate: Tensor | None = None,
        bias: Tensor | None = None,
        force: Tensor | None = None,
        ids: list[Tensor] | None = None,
    ) -> ReferenceOutput:
        """Given rows [B,S,E] replace probabilities; ablate bool and bias broadcast to [B,L,S,E], force int (-1 free) to
        [B,L,S]; ids (L tensors [B,S,K]) are taken as choices.
        """
        batch, slots = input_ids.shape
        x = self.state["embed_tokens.weight"][input_ids]
        if position_ids is None:
            position_ids = torch.arange(slots).expand(batch, slots)
        visible = torch.ones(slots, slots, dtype=torch.bool).tril().expand(batch, slots, slots)
        if attention_mask is not None:
            real = attention_mask.bool()
            visible = visible & real[:, None, :] & real[:, :, None]
        turn = self._rotation(position_ids)
        out = ReferenceOutput(x, [], [], [], [], [], [])
        for layer in range(self.config.num_hidden_layers):
            out.hidden.append(x)
            steer = [None if t is None else t[:, layer if t.shape[1] > 1 else 0] for t in (ablate, bias, force)]
            chosen = None if ids is None else ids[layer]
            run = self._block_layer if self.block else self._ffn_layer
            x = run(layer, x, visible, turn, lambda z, s=steer, c=chosen: self._route(z, k, rows, s, c, out))
        x = self._norm(x, self.state["norm.weight" if self.olmo else "final_norm.weight"])
        out.hidden.append(x)
        head = "embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        out.logits = x @ self.state[head].T
        return out

    # ------------------------------------------------------------------ layers
    def _block_layer(self, layer: int, x: Tensor, visible: Tensor, turn: tuple[Tensor, Tensor], route) -> Tensor:  # type: ignore[no-untyped-def]
        prefix = f"layers.{layer}."
        ids, weights = route(self._logits(x, prefix + "gate."))
        y = torch.zeros_like(x)
        for e in range(self.config.num_experts):
            one = f"{prefix}experts.{e}."
            if self.olmo:
                u = x + self._norm(self._attention(x, one, visible, turn), self._w(one + "post_attention_layernorm"))
                out = u + self._norm(self._mlp(u, one + "mlp."), self._w(one + "post_feedforward_layernorm"))
            else:
                n = self._norm(x, self._w(one + "input_layernorm"))
                u = x + self._attention(n, one, visible, turn)
                out = u + self._mlp(self._norm(u, self._w(one + "post_attention_layernorm")), one + "mlp.")
            y = self._add(y, out, ids, weights, e)
        return y

    def _ffn_layer(self, layer: int, x: Tensor, visible: Tensor, turn: tuple[Tensor, Tensor], route) -> Tensor:  # type: ignore[no-untyped-def]
        prefix = f"layers.{layer}."
        if self.olmo:
            attended = self._attention(x, prefix, visible, turn)
            n = u = x + self._norm(attended, self._w(prefix + "post_attention_layernorm"))
        else:
            u = x + self._attention(self._norm(x, self._w(prefix + "input_layernorm")), prefix, visible, turn)
            n = self._norm(u, self._w(prefix + "post_attention_layernorm"))
        ids, weights = route(self._logits(n, prefix + "block_sparse_moe.gate."))
        m = torch.zeros_like(x)
        for e in range(self.config.num_experts):
            m = self._add(m, self._mlp(n, f"{prefix}block_sparse_moe.experts.{e}."), ids, weights, e)
        return u + (self._norm(m, self._w(prefix + "post_feedforward_layernorm")) if self.olmo else m)

    @staticmethod
    def _add(y: Tensor, out: Tensor, ids: Tensor, weights: Tensor, e: int) -> Tensor:
        for rank in range(ids.shape[-1]):
            chosen = (ids[..., rank] == e)[..., None]
            y = y + torch.where(chosen, out * weights[..., rank, None], 0)
        return y

    # ------------------------------------------------------------------ pieces
    def _w(self, name: str) -> Tensor:
        return self.state[name + ".weight"]

    def _logits(self, x: Tensor, gate: str) -> Tensor:
        return (x @ self._w(gate + "0").T) @ self._w(gate + "1").T

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * gain.to(wide.dtype)).to(x.dtype) if self.olmo else wide.to(x.dtype) * gain

    def _mlp(self, u: Tensor, prefix: str) -> Tensor:
        gate, up = u @ self._w(prefix + "gate_proj").T, u @ self._w(prefix + "up_proj").T
        return (gate * torch.sigmoid(gate) * up) @ self._w(prefix + "down_proj").T

    def _attention(self, n: Tensor, prefix: str, visible: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        c, own = self.config, prefix + "self_attn."
        q, k, v = (n @ self._w(own + name).T for name in ("q_proj", "k_proj", "v_proj"))
        if self.olmo:
            q, k = self._norm(q, self._w(own + "q_norm")), self._norm(k, self._w(own + "k_norm"))
        q, k, v = (t.unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for t in (q, k, v))  # [B,heads,S,D]
        q, k = self._turned(q, turn), self._turned(k, turn)
        shared = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(c.head_dim)
        scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
        p = scores.softmax(-1) * visible[:, None].any(-1, keepdim=True)
        out: Tensor = (p @ v).transpose(1, 2).flatten(2) @ self._w(own + "o_proj").T
        return out

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables cos and sin, [B,1,S,D/2]; angles in float32."""
        rope, d = self.config.rope_parameters, self.config.head_dim
        exponents = torch.arange(0, d, 2, dtype=torch.float32) / d
        f = 1.0 / (float(rope["rope_theta"]) ** exponents)
        if rope.get("rope_type", "default") == "llama3":
            f = torch.stack([self._scaled(one, rope) for one in f])
        angles = positions[:, None, :, None].float() * f
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.olmo else (cos.to(self.dtype), sin.to(self.dtype))

    @staticmethod
    def _scaled(f: Tensor, rope: dict[str, float]) -> Tensor:
        length, old = 2 * math.pi / f, rope["original_max_position_embeddings"]
        if length < old / rope["high_freq_factor"]:
            return f
        if length > old / rope["low_freq_factor"]:
            return f / rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        m = (old / length - low) / (high - low)
        return (1 - m) * f / rope["factor"] + m * f

    @staticmethod
    def _turned(u: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = turn
        first, second = u.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(u.dtype)

    # ------------------------------------------------------------------ routing
    def _route(
        self,
        z: Tensor,
        k: int | None,
        rows: Tensor | None,
        steer: list[Tensor | None],
        chosen: Tensor | None,
        out: ReferenceOutput,
    ) -> tuple[Tensor, Tensor]:
        k = k or self.config.num_experts_per_tok
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        ablate, bias, force = steer
        effective = wide if bias is None else wide + bias.to(wide.dtype)
        if ablate is not None:
            effective = effective.masked_fill(ablate.expand_as(effective), -math.inf)
        p = effective.softmax(-1)
        if force is not None:
            force = force.expand(z.shape[:-1])
            p = torch.where((force >= 0)[..., None], F.one_hot(force.clamp(min=0), z.shape[-1]).to(p.dtype), p)
        if rows is not None:
            p = effective = rows.to(wide.dtype)
        if chosen is None:
            chosen = torch.argsort(p.detach(), dim=-1, descending=True, stable=True)[..., :k]
        q = p.gather(-1, chosen)
        rule, share = self.config.weight_rule, q / (q.sum(-1, keepdim=True) + 1e-9)
        if rule == "probability":
            weights = q
        elif rule == "straight_through":
            weights = share.detach() + (q - q.detach())
        else:
            weights = share
        for record, value in zip(
            (out.raw, out.effective, out.probs, out.ids, out.weights),
            (wide, effective, p, chosen, weights.to(z.dtype)),
            strict=True,
        ):
            record.append(value)
        return chosen, weights.to(z.dtype)


def next_token_loss(logits: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
    """Mean over labels != -100, shifted left by one, of -log softmax; divided by ``num_items`` if given."""
    targets, scores = labels[:, 1:], logits[:, :-1].log_softmax(-1)
    keep = targets != -100
    total = -(scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * keep).sum()
    return total / (max(int(keep.sum()), 1) if num_items is None else num_items)
