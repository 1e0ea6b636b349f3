"""Configuration of a MiCRo model: the backbone's fields under their Hugging Face names, and those of the experts."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from micro.experts import default_names

BACKBONES = ("llama", "olmo2")
BLOCK_TYPES = ("block", "ffn")
WEIGHT_RULES = ("renormalized", "probability", "straight_through")
LOSS_NAMES = ("load_balancing_loss", "z_loss", "label_loss", "entropy")
ROPE_TYPES = ("default", "llama3")

# Keys that transformers and the tools around it put into a config although they are no fields of ours.
_INJECTED = frozenset({
    "architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation", "model_type", "name_or_path",
    "output_attentions", "output_hidden_states", "quantization_config", "return_dict", "rope_scaling", "rope_theta",
    "torch_dtype", "transformers_version", "use_return_dict",
})  # fmt: skip

# What the mathematics of the backbones leaves open in other models, with the only value that is supported here.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}


class MiCRoConfig(PreTrainedConfig):
    """A mixture of cognitive reasoners over a Llama-shaped or OLMo-2-shaped backbone (model.md 2, interface.md 2).

    ``num_hidden_layers`` is the true number of layers L, always. Unknown fields and contradictions are a ``ValueError``
    at construction and again in :meth:`save_pretrained`, so that what was assigned later is checked too.
    """

    model_type = "micro"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "lm_loss",
        "aux_losses",
        "past_key_values",
        "hidden_states",
        "attentions",
        "router_logits",
        "routing",
    ]

    format_version: int = 1
    backbone: str = "llama"
    block_type: str = "block"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    rms_norm_eps: float | None = None
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    num_experts: int = 4
    num_experts_per_tok: int = 1
    expert_names: list[str] | None = None
    use_router: bool = True
    router_hidden_size: int | None = None
    router_init: str | None = None
    weight_rule: str = "renormalized"
    jitter_noise: float = 0.0
    loss_coefficients: dict[str, float] | None = None
    aux_pooling: str = "pooled"
    aux_window: str = "mean"
    freeze_pad_row: bool = False
    numerics: str = "reference"

    def __post_init__(self, **kwargs: Any) -> None:
        known = {name for name in kwargs if name in _INJECTED or name.startswith("_")}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"MiCRoConfig: unknown fields {unknown}; known are {sorted(self._own_fields())}")
        self._fill_defaults()
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.check()

    def _own_fields(self) -> list[str]:
        return [name for name in MiCRoConfig.__dataclass_fields__ if not name.startswith("_")]

    def _fill_defaults(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.rms_norm_eps is None:
            self.rms_norm_eps = 1e-6 if self.backbone == "olmo2" else 1e-5
        if self.expert_names is None:
            self.expert_names = default_names(self.num_experts)
        if self.loss_coefficients is None:
            self.loss_coefficients = {}
        if self.router_hidden_size is None:
            self.router_hidden_size = self.hidden_size
        if self.router_init is None:
            self.router_init = "normal" if self.backbone == "olmo2" else "uniform"

    # ------------------------------------------------------------------ what follows from the fields
    @property
    def is_block(self) -> bool:
        """Whole-block experts (MoB, MiCRo) rather than FFN experts (MoE, MiCRo-MoE)."""
        return self.block_type == "block"

    @property
    def cache_heads(self) -> int:
        """Key/value heads of one layer in a cache: E*G for whole-block experts, G for FFN experts."""
        return int(self.num_key_value_heads or 0) * (self.num_experts if self.is_block else 1)

    @property
    def rope_theta_value(self) -> float:
        """Base of the rotary frequencies."""
        return float((self.rope_parameters or {})["rope_theta"])

    @property
    def rope_scaling_value(self) -> tuple[float, float, float, float] | None:
        """(factor, low, high, old context) of Llama-3 scaling, or None."""
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") == "default":
            return None
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        factor, low, high, context = (float(rope[key]) for key in keys)
        return factor, low, high, context

    # ------------------------------------------------------------------ checks
    def check(self) -> None:
        """Raise one ``ValueError`` that lists every contradiction among the fields."""
        problems = [*self._check_kinds(), *self._check_sizes(), *self._check_experts(), *self._check_rope()]
        if problems:
            raise ValueError("MiCRoConfig: " + "; ".join(problems))

    def _check_kinds(self) -> list[str]:
        choices = {
            "backbone": BACKBONES,
            "block_type": BLOCK_TYPES,
            "weight_rule": WEIGHT_RULES,
            "router_init": ("uniform", "normal"),
            "aux_pooling": ("pooled", "per_layer"),
            "aux_window": ("mean", "sum"),
            "numerics": ("reference", "fast"),
            "format_version": (1,),
            **{name: (value,) for name, value in _FIXED.items()},
        }
        return [
            f"{name} is {getattr(self, name)!r}, expected one of {list(allowed)}"
            for name, allowed in choices.items()
            if getattr(self, name) not in allowed
        ]

    def _check_sizes(self) -> list[str]:
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        names += ["num_key_value_heads", "head_dim", "router_hidden_size", "num_experts"]
        problems = [
            f"{name} is {value!r}, expected a positive integer"
            for name in names
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1
        ]
        if problems:
            return problems
        if self.num_attention_heads % int(self.num_key_value_heads or 1):
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if int(self.head_dim or 0) % 2:
            problems.append(f"head_dim {self.head_dim} is odd: rotary positions turn pairs")
        if not float(self.rms_norm_eps or 0) > 0:
            problems.append(f"rms_norm_eps is {self.rms_norm_eps!r}, expected a positive number")
        return problems

    def _check_experts(self) -> list[str]:
        problems = []
        names, experts = self.expert_names, self.num_experts
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            problems.append(f"expert_names is {names!r}, expected a list of names")
        elif len(names) != experts or len({name.lower() for name in names}) != experts:
            problems.append(f"expert_names {names} does not hold {experts} different names")
        k = self.num_experts_per_tok
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= experts:
            problems.append(f"num_experts_per_tok is {k!r}, expected 1..{experts}")
        if not isinstance(self.jitter_noise, (int, float)) or not 0 <= self.jitter_noise < 1:
            problems.append(f"jitter_noise is {self.jitter_noise!r}, expected a number in [0, 1)")
        coefficients = self.loss_coefficients
        if not isinstance(coefficients, dict):
            problems.append(f"loss_coefficients is {coefficients!r}, expected a dictionary")
        elif unknown := sorted(set(coefficients) - set(LOSS_NAMES)):
            problems.append(f"loss_coefficients has unknown names {unknown}; known are {list(LOSS_NAMES)}")
        elif bad := {n: c for n, c in coefficients.items() if not isinstance(c, (int, float)) or c != c}:
            problems.append(f"loss_coefficients holds no numbers: {bad}")
        if self.freeze_pad_row and self.pad_token_id is None:
            problems.append("freeze_pad_row needs pad_token_id")
        return problems

    def _check_rope(self) -> list[str]:
        rope = self.rope_parameters
        if not isinstance(rope, dict) or "rope_theta" not in rope:
            return [f"rope_parameters is {rope!r}, expected a dictionary with rope_type and rope_theta"]
        kind = rope.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            return [f"rope_type is {kind!r}, expected one of {list(ROPE_TYPES)}"]
        allowed = {"rope_type", "type", "rope_theta"}
        needed = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if kind == "llama3":
            allowed |= needed
            if missing := sorted(needed - set(rope)):
                return [f"rope_parameters of type llama3 lacks {missing}"]
        if unknown := sorted(set(rope) - allowed):
            return [f"rope_parameters has unknown entries {unknown}"]
        return []

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json``; fields that were assigned after construction are checked first."""
        inherited = set(PreTrainedConfig.__dataclass_fields__) | _INJECTED
        own = {name for name in vars(self) if not name.startswith("_")}
        if unknown := sorted(own - set(MiCRoConfig.__dataclass_fields__) - inherited):
            raise ValueError(f"MiCRoConfig: unknown fields {unknown} were assigned; nothing was written")
        self.check()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
