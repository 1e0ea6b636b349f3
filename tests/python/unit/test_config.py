"""MiCRoConfig: strict at construction and on save, true to itself through files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import small_config
from transformers import AutoConfig, DynamicCache

from micro.modeling import MiCRoConfig


def test_defaults() -> None:
    config = MiCRoConfig()
    assert config.model_type == "micro"
    assert config.expert_names == ["logic", "social", "world", "language"]
    assert (config.num_experts, config.num_experts_per_tok, config.weight_rule) == (4, 1, "renormalized")
    assert config.loss_coefficients == {} and config.numerics == "reference" and config.use_router
    assert config.router_hidden_size == config.hidden_size
    assert not hasattr(config, "output_router_logits") and not hasattr(config, "router_aux_loss_coef")
    assert set(config.keys_to_ignore_at_inference) >= {"lm_loss", "aux_losses", "router_logits", "routing"}
    assert MiCRoConfig(num_experts=3).expert_names == ["expert_0", "expert_1", "expert_2"]
    assert MiCRoConfig(backbone="olmo2").rms_norm_eps == 1e-6
    assert (MiCRoConfig().router_init, MiCRoConfig(backbone="olmo2").router_init) == ("uniform", "normal")


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"num_expert": 4}, r"unknown fields \['num_expert'\]"),
        ({"output_router_logits": False}, "unknown fields"),
        ({"router_aux_loss_coef": 0.1}, "unknown fields"),
        ({"backbone": "gemma"}, "backbone is 'gemma', expected one of"),
        ({"kind": "moe"}, "block_type"),
        ({"weight_rule": "softmax"}, "weight_rule"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5, expected 1\.\.4"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2, "head_dim": 8}, "no multiple"),
        ({"head_dim": 7}, "odd"),
        ({"expert_names": ["a", "b"]}, "4 different names"),
        ({"expert_names": ["a", "A", "b", "c"]}, "4 different names"),
        ({"loss_coefficients": {"balance": 1.0}}, r"unknown names \['balance'\]"),
        ({"loss_coefficients": {"z_loss": "high"}}, "no numbers"),
        ({"jitter_noise": 1.5}, "jitter_noise"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "lacks"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"freeze_pad_row": True}, "needs pad_token_id"),
        ({"numerics": "sloppy"}, "numerics"),
        ({"format_version": 2}, "format_version"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(**fields)


def test_all_problems_in_one_error() -> None:
    with pytest.raises(ValueError, match=r"backbone.*; .*num_experts_per_tok"):
        small_config(backbone="x", num_experts_per_tok=9)


def test_what_was_assigned_later_is_checked_on_save(tmp_path: Path) -> None:
    config = small_config()
    config.num_experts_per_tok = 9
    with pytest.raises(ValueError, match="num_experts_per_tok is 9"):
        config.save_pretrained(tmp_path)
    config = small_config()
    config.layer_count = 3
    with pytest.raises(ValueError, match=r"unknown fields \['layer_count'\] were assigned"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_round_trip(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = small_config("olmo2", "ffn", rope_parameters=rope, loss_coefficients={"z_loss": 0.1}, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, MiCRoConfig)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.rope_scaling_value == (32.0, 1.0, 4.0, 8192.0) and again.rope_theta_value == 5e5
    text = json.loads((tmp_path / "config.json").read_text())
    for name in ("backbone", "block_type", "num_hidden_layers", "num_experts", "expert_names", "weight_rule",
                 "rms_norm_eps", "vocab_size", "tie_word_embeddings", "use_router", "rope_parameters", "head_dim",
                 "format_version"):  # fmt: skip
        assert name in text, f"{name} is missing: the file is not self-contained"
    (tmp_path / "config.json").write_text(json.dumps({**text, "experts": 4}))
    with pytest.raises(ValueError, match="unknown fields"):
        AutoConfig.from_pretrained(tmp_path)


def test_old_rope_fields_are_understood() -> None:
    config = small_config(rope_theta=123.0)
    assert config.rope_parameters == {"rope_theta": 123.0, "rope_type": "default"}
    scaled = {"type": "default"}
    assert small_config(rope_theta=9.0, rope_scaling=scaled).rope_theta_value == 9.0


def test_stock_caches_are_built_with_true_layers() -> None:
    assert len(DynamicCache(config=small_config(num_hidden_layers=3)).layers) == 3
    assert small_config().cache_heads == 8
    assert small_config(kind="ffn").cache_heads == 2
