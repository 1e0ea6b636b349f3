"""The backbones whose shapes are measured, and random weights under which outputs can be compared.

With ordinary random weights two correct implementations soon part: near-ties of routers fall differently in bfloat16,
and a flipped route sends a token to other weights. So the weights are random except for three things.
- Some coordinates of the hidden state hold a code of the token that no block changes (their rows of the output maps are
  0), and the routers read nothing else: scores are small whole numbers, exact in every dtype and without ties. Tokens
  spread evenly over the experts, every eighth layer by the same code.
- Maps into the residual stream are scaled down with depth, as trained models have it, so that embedding and blocks have
  a like share in the result; a single wrong block still moves a token by far more than rounding does.
- The head is the embedding in another order: the greedy token has a clear lead, and greedy decoding walks through the
  vocabulary without coming back soon.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

EXPERTS = 4


@dataclass(frozen=True)
class Shape:
    name: str
    backbone: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    inner: int
    vocabulary: int
    theta: float
    eps: float

    def fields(self) -> dict[str, Any]:
        """Of a Hugging Face configuration, dense or ours."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "intermediate_size": self.inner,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": self.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @property
    def block(self) -> int:
        """Weights of one block's matrices: P of performance.md 2.1."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.groups) + 3 * self.hidden * self.inner

    @property
    def keys_values(self) -> int:
        """Those among them that make keys and values."""
        return 2 * self.hidden * self.head_dim * self.groups

    def forward_flops(self, tokens: int) -> float:
        """Of the ideal top-1 forward per token, keys and values of all experts, folded router, no head (3.1)."""
        attention = 4 * self.heads * self.head_dim * (tokens + 1) / 2
        projections = 2 * (self.block - self.keys_values) + EXPERTS * 2 * self.keys_values
        return self.layers * (projections + attention + 2 * EXPERTS * self.hidden)

    def decode_bytes(self, keys: int, *, lazy: bool, itemsize: int = 2) -> float:
        """Needed for one token at batch 1 (4.1): the weights it uses, head included, and one expert's keys and values;
        without lazy keys and values also the maps of the other experts that make them.
        """
        others = 0 if lazy else (EXPERTS - 1) * self.keys_values
        cached = 2 * self.groups * self.head_dim * keys
        return itemsize * (self.layers * (self.block + others + cached) + self.vocabulary * self.hidden)


SMOLLM2_135M = Shape("SmolLM2-135M", "llama", 30, 576, 9, 3, 64, 1536, 49152, 1e5, 1e-5)
# The 1B shapes with 4 of 16 layers and a small vocabulary: ratios are per layer, and the head is not their subject.
LLAMA_1B = Shape("Llama-3.2-1B", "llama", 4, 2048, 32, 8, 64, 8192, 1024, 5e5, 1e-5)
OLMO2_1B = Shape("OLMo-2-1B", "olmo2", 4, 2048, 16, 16, 128, 8192, 1024, 5e5, 1e-6)
REAL_VOCABULARY = {"Llama-3.2-1B": 128256, "OLMo-2-1B": 100352}


def small(shape: Shape) -> Shape:
    """For a run that only shows that everything works."""
    return replace(shape, layers=2, hidden=64, heads=4, groups=2, head_dim=16, inner=96, vocabulary=256)


def fill(model: Any, shape: Shape, seed: int = 0) -> None:
    """Random weights as above for a mixture (``MiCRoForCausalLM``), drawn in its own dtype."""
    generator = torch.Generator().manual_seed(seed)
    coded = _coded(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.split(".")[-2]
            if kind == "embed_tokens":
                _fill_embedding(parameter, coded, generator)
            elif "norm" in kind:
                parameter.normal_(1.0, 0.1, generator=generator)
                if shape.backbone == "olmo2" and kind in ("post_attention_norm", "post_ffn_norm"):
                    parameter.mul_(_depth_scale(shape))
                    parameter[..., : coded * EXPERTS] = 0
            elif kind != "lm_head":
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
                if shape.backbone == "llama" and kind in ("o_proj", "down_proj"):
                    parameter.mul_(_depth_scale(shape))
                    parameter[..., : coded * EXPERTS, :] = 0
        embedding = model.model.embed_tokens.weight
        order = torch.randperm(shape.vocabulary, generator=generator)
        model.lm_head.weight.copy_(embedding[order] * shape.hidden**-0.5)
        for index, layer in enumerate(model.model.layers):
            _fill_router(layer.router, index, coded)


def _coded(shape: Shape) -> int:
    """How many codes a token has; each takes as many coordinates as there are experts."""
    return min(8, shape.hidden // (4 * EXPERTS))


def _depth_scale(shape: Shape) -> float:
    return float((2 * shape.layers) ** -0.5)


def _fill_embedding(weight: Tensor, coded: int, generator: torch.Generator) -> None:
    weight.normal_(0.0, 1.0, generator=generator)
    codes = torch.randint(EXPERTS, (weight.shape[0], coded), generator=generator)
    weight[:, : coded * EXPERTS] = torch.nn.functional.one_hot(codes, EXPERTS).flatten(1).to(weight.dtype)


def _fill_router(router: Any, layer: int, coded: int) -> None:
    """Scores E-1, E-2, .. 0 in an order that the token's code and the layer decide."""
    first = router.in_proj.weight
    first[:EXPERTS] = 0
    for code in range(EXPERTS):
        for expert in range(EXPERTS):
            score = EXPERTS - 1 - (expert - code - layer) % EXPERTS
            first[expert, (layer % coded) * EXPERTS + code] = score
    router.out_proj.weight.zero_()
    router.out_proj.weight[:, :EXPERTS] = torch.eye(EXPERTS)


def prompt(shape: Shape, tokens: int, rows: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(shape.vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
