"""Tiny dense Hugging Face models, and official checkpoint folders written by hand, for the conversion tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def dense(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A random dense model whose weights and gains are large enough for every part to matter."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    }[family]
    model = model_class(config_class(**{**SIZES, "initializer_range": 0.2, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def official_tensors(family: str, kind: str, experts: int = 4, layers: int = 2) -> dict[str, Tensor]:
    """Random tensors under the official names of model.md 5.1 to 5.3, written out here on purpose."""
    generator = torch.Generator().manual_seed(7)
    hidden, inner, queries, keys, vocabulary = 32, 48, 32, 16, 97
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    attention |= {"o_proj": (hidden, queries)}
    if family == "olmo2":
        attention |= {"q_norm": (queries,), "k_norm": (keys,)}
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
    else:
        norms = ["input_layernorm", "post_attention_layernorm"]
    ffn = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    shapes["norm" if family == "olmo2" else "final_norm"] = (hidden,)
    for layer in range(layers):
        at = f"layers.{layer}"
        router = at if kind == "block" else f"{at}.block_sparse_moe"
        shapes |= {f"{router}.gate.0": (hidden, hidden), f"{router}.gate.1": (experts, hidden)}
        owners = [f"{at}.experts.{e}" for e in range(experts)] if kind == "block" else [at]
        for owner in owners:
            shapes |= {f"{owner}.{norm}": (hidden,) for norm in norms}
            shapes |= {f"{owner}.self_attn.{name}": shape for name, shape in attention.items()}
            if kind == "block":
                shapes |= {f"{owner}.mlp.{name}": shape for name, shape in ffn.items()}
        if kind == "ffn":
            for e in range(experts):
                shapes |= {f"{at}.block_sparse_moe.experts.{e}.{name}": shape for name, shape in ffn.items()}
    return {f"{n}.weight": _draw(n, shape, generator) for n, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)


def official_config(family: str, kind: str, revision: str, experts: int = 4, layers: int = 2) -> dict[str, Any]:
    """A config.json with the quirks of model.md 5.4: L*E layers for blocks, a head that is not really tied, a dtype
    that is not that of the file, a run file on somebody else's machine."""
    names = {
        ("r1", "block", "llama"): ("MiCRoLlama", "llama"),
        ("r1", "block", "olmo2"): ("MiCRoOLMo", "olmo2"),
        ("r1", "ffn", "llama"): ("LlamaMoE", "llama"),
        ("r2", "block", "llama"): ("MiCRoLlama", "micro_llama"),
        ("r2", "ffn", "llama"): ("MiCRoLlamaMoE", "micro_llama_moe"),
        ("r2", "ffn", "olmo2"): ("MiCRoOlmoMoE", "micro_olmo_moe"),
    }
    name, model_type = names[revision, kind, family]
    fields = {k: v for k, v in SIZES.items() if k != "num_hidden_layers"}
    return {
        **fields,
        "architectures": [name],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "num_hidden_layers": layers * experts if kind == "block" else layers,
        "backbone_num_layers": layers,
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "use_router": True,
        "jitter_noise": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "config_path": "/home/somebody/runs/config.yaml",
        "ablate": [],
        "transformers_version": "4.53.2",
    }


def write_official(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Write an official checkpoint folder: config.json and safetensors, in shards with an index where asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
