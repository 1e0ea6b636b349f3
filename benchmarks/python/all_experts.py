"""The stand-in for the official classes: what they do, written from its description (performance.md 1), over the
decoder layers of transformers with scaled-dot-product attention.

- Every expert runs its whole block on every token; the outputs of tokens that were not routed to it are thrown away.
- Every (layer, expert) has a slot of a `DynamicCache`, which concatenates at each append.
- With one new token, an expert that no row chose computes norm, keys, values and rotary positions only, and appends.
- The router is two maps without a fold; embedding and head are two tensors; generation asks for all logits of a prompt.

Its parameters may be views of a mixture's parameters: the same weights, without a second copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from shapes import EXPERTS, Shape
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, Olmo2Config, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from micro.modeling.keys import official_map

Tables = tuple[Tensor, Tensor]  # cos and sin


class Layer(nn.Module):
    """Router and experts of one layer, under the official names of their parameters."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        size, self.olmo = config.hidden_size, isinstance(config, Olmo2Config)
        make: Any = modeling_olmo2.Olmo2DecoderLayer if self.olmo else modeling_llama.LlamaDecoderLayer
        self.gate = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, EXPERTS, bias=False))
        self.experts = nn.ModuleList(make(config, index * EXPERTS + e) for e in range(EXPERTS))

    def forward(self, x: Tensor, tables: Tables, cache: DynamicCache | None, k: int) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.gate(x)
        weights, ids = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), k, dim=-1)
        weights = (weights / (weights.sum(-1, keepdim=True) + 1e-9)).to(x.dtype)
        decoding = not self.training and x.shape[1] == 1
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = ids == number
            if decoding and cache is not None and not bool(chosen.any()):
                self._append(expert, x, tables, cache)
                continue
            out = expert(x, position_embeddings=tables, past_key_values=cache, use_cache=cache is not None)
            for rank in range(k):
                rows = chosen[..., rank]
                y[rows] += out[rows] * weights[..., rank][rows][:, None]
        return y, logits

    def _append(self, expert: Any, x: Tensor, tables: Tables, cache: DynamicCache) -> None:
        """Keys and values of a token that went to other experts."""
        attention = expert.self_attn
        n = x if self.olmo else expert.input_layernorm(x)
        k, v = attention.k_proj(n), attention.v_proj(n)
        if self.olmo:
            k = attention.k_norm(k)
        heads = (*x.shape[:2], -1, attention.head_dim)
        k, v = k.view(heads).transpose(1, 2), v.view(heads).transpose(1, 2)
        rotate = (modeling_olmo2 if self.olmo else modeling_llama).apply_rotary_pos_emb
        cache.update(rotate(k, k, *tables)[1], v, attention.layer_idx)


class AllExperts(PreTrainedModel, GenerationMixin):
    """A causal language model in which every expert computes everything."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: Any, experts_per_token: int = 1) -> None:
        super().__init__(config)
        self.olmo = isinstance(config, Olmo2Config)
        module: Any = modeling_olmo2 if self.olmo else modeling_llama
        family = "Olmo2" if self.olmo else "Llama"
        self.experts_per_token = experts_per_token
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        norm = getattr(module, f"{family}RMSNorm")(config.hidden_size, config.rms_norm_eps)
        self.add_module("norm" if self.olmo else "final_norm", norm)
        self.rotary_emb = getattr(module, f"{family}RotaryEmbedding")(config=config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _supports_logits_to_keep(self) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DynamicCache()  # grows by a slot per expert and layer

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {"input_ids": input_ids[:, seen:], "past_key_values": past_key_values, "use_cache": True}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        """Rows without padding only (a mask must be all ones): nothing here measures anything else."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        x = self.embed_tokens(input_ids)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        tables = self.rotary_emb(x, positions)
        scores = []
        for layer in self.layers:
            x, logits = layer(x, tables, past_key_values if use_cache else None, self.experts_per_token)
            scores.append(logits)
        x = self.get_submodule("norm" if self.olmo else "final_norm")(x)
        logits = self.lm_head(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        out["routing_weights"] = tuple(scores)
        return out


def dense_config(shape: Shape) -> Any:
    config = (Olmo2Config if shape.backbone == "olmo2" else LlamaConfig)(**shape.fields())
    config._attn_implementation = "sdpa"
    return config


def build(ours: Any, shape: Shape, experts_per_token: int = 1, *, share: bool = True) -> AllExperts:
    """The stand-in with the weights of a mixture: views of them, or copies where both sides are to learn."""
    with no_init_weights(), torch.device("meta"):
        model = AllExperts(dense_config(shape), experts_per_token)
    model.rotary_emb = type(model.rotary_emb)(config=model.config)  # its frequencies are no parameters
    parameters = dict(ours.named_parameters())
    state = {}
    for name, target in official_map(ours.config).items():
        tensor = parameters[target.name].detach()
        tensor = tensor if target.expert is None else tensor[target.expert]
        state[name] = tensor if share else tensor.clone()
    model.load_state_dict(state, assign=True)
    model.eval()  # type: ignore[no-untyped-call]
    return model
