"""Open a model folder, ours or an official one; which of the two is told by its keys (model.md 5.4)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.convert.folders import read_json

if TYPE_CHECKING:
    import torch

    from micro.modeling import MiCRoConfig, MiCRoForCausalLM
    from micro.modeling.keys import Header

# Values that the backbone's configuration class assumes where a field is not stored.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2},
    "olmo2": {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 50279, "pad_token_id": 1},
}
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
}


@dataclass(frozen=True)
class Layout:
    """What the keys of a folder say. kind "block" (experts are whole blocks) or "ffn"; family as in MiCRoConfig."""

    kind: str
    family: str
    layers: int
    experts: int


def load(folder: str | Path, *, dtype: torch.dtype | str | None = None) -> MiCRoForCausalLM:
    """Load a mixture from a folder of ours or from an official checkpoint of either revision.

    dtype None keeps that of the tensors, whatever the configuration says (official ones say bfloat16 and hold float32).
    Of an official folder the run file and the name of the class are ignored, the head is never tied, and a stored
    ``ablate`` is left out with a warning: steering is an argument of each call.

    Errors: ValueError that lists every missing, unexpected and mis-shaped key under its official name; for truncated
    files, dense models, and fields that cannot be honoured.
    """
    from transformers import GenerationConfig

    from micro.convert.upcycle import resolve_dtype
    from micro.modeling import MiCRoConfig, MiCRoForCausalLM
    from micro.modeling.keys import file_dtype, read_headers

    folder = Path(folder).expanduser()
    wanted = resolve_dtype(dtype)
    headers = read_headers(folder)
    layout = recognise(headers, folder)
    fields = read_json(folder / "config.json")
    if fields.get("model_type") == MiCRoConfig.model_type:
        config = MiCRoConfig.from_pretrained(folder)
    else:
        config = official_config(fields, layout, headers, folder)
    model: Any = MiCRoForCausalLM.from_pretrained(folder, config=config, dtype=wanted or file_dtype(headers))
    if not (folder / "generation_config.json").is_file():
        # transformers falls back to the fields of config.json, a use_cache: false of the training run among them.
        model.generation_config = GenerationConfig.from_model_config(config)
    loaded: MiCRoForCausalLM = model.eval()
    return loaded


def recognise(headers: Mapping[str, Header], where: str | Path) -> Layout:
    """Kind, family and sizes from the names of the tensors alone."""
    patterns = {
        "block": r"layers\.(\d+)\.experts\.(\d+)\.",
        "ffn": r"layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.",
    }
    for kind, pattern in patterns.items():
        found = [match for name in headers if (match := re.match(pattern, name))]
        if found:
            layers, experts = (1 + max(int(match.group(group)) for match in found) for group in (1, 2))
            olmo2 = any(".q_norm." in name or ".post_feedforward_layernorm." in name for name in headers)
            return Layout(kind, "olmo2" if olmo2 or "norm.weight" in headers else "llama", layers, experts)
    some = ", ".join(list(headers)[:3])
    if any(name.startswith("model.layers.") for name in headers):
        raise ValueError(f"{where}: holds a dense model ({some}, ...); make a mixture of it with micro.upcycle")
    raise ValueError(
        f"{where}: the keys are neither ours nor official ones ({some}, ...); expected layers.0.experts.0... or "
        "layers.0.block_sparse_moe.experts.0..."
    )


def official_config(
    fields: Mapping[str, Any], layout: Layout, headers: Mapping[str, Header], where: str | Path
) -> MiCRoConfig:
    """Our configuration from an official config.json, with the quirks of model.md 5.4 undone."""
    from micro.modeling import MiCRoConfig

    _refuse_unsupported(fields, where)
    if (stored := fields.get("ablate")) and stored != "none":
        warnings.warn(
            f"{where}: config.json stores ablate = {stored!r}, which is ignored: pass ablate= to forward or generate",
            stacklevel=3,
        )
    default = _DEFAULTS[layout.family]
    gate = next((h for n, h in headers.items() if n.endswith("gate.0.weight")), None)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{where}/config.json: the fields {', '.join(missing)} are missing")
    optional = ("num_key_value_heads", "head_dim", "initializer_range", "max_position_embeddings")
    ids = ("rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id")
    return MiCRoConfig(
        backbone=layout.family,
        block_type=layout.kind,
        num_hidden_layers=int(fields.get("backbone_num_layers") or layout.layers),
        num_experts=int(fields.get("num_experts") or layout.experts),
        num_experts_per_tok=int(fields.get("num_experts_per_tok") or 1),
        use_router=bool(fields.get("use_router", True)),
        jitter_noise=float(fields.get("jitter_noise") or 0.0),
        router_hidden_size=gate.shape[0] if gate is not None and gate.shape else None,
        rope_parameters=_rope(fields, default["rope_theta"]),
        loss_coefficients=_losses(fields, layout),
        tie_word_embeddings="lm_head.weight" not in headers,
        **{name: fields[name] for name in names},
        **{name: fields[name] for name in optional if fields.get(name) is not None},
        **{name: fields.get(name, default.get(name)) for name in ids},
    )


def _refuse_unsupported(fields: Mapping[str, Any], where: str | Path) -> None:
    problems = [
        f"{name} = {fields[name]!r}"
        for name, allowed in _FIXED.items()
        if fields.get(name) is not None and fields[name] not in allowed
    ]
    if problems:
        raise ValueError(f"{where}/config.json: not supported: {', '.join(problems)}")


def _rope(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """One dictionary from the separate fields of older configurations."""
    given = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    kind = given.pop("type", None)
    given.setdefault("rope_type", kind or "default")
    given.setdefault("rope_theta", float(fields.get("rope_theta") or theta))
    return given


def _losses(fields: Mapping[str, Any], layout: Layout) -> dict[str, float]:
    """The load-balancing coefficient of the MoE baseline, which has effect only while router logits are returned."""
    used = layout.kind == "ffn" and bool(fields.get("output_router_logits"))
    coefficient = float(fields.get("router_aux_loss_coef") or 0.0)
    return {"load_balancing_loss": coefficient} if used and coefficient else {}
