"""Folders as C++ programs read them: the same tensors and fields as Python's, and one error for what is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import ALL_FOUR, small_model

from micro._C import Checkpoint
from micro.modeling import MiCRoForCausalLM
from micro.modeling.keys import WEIGHTS_FILE, expert_shapes, official_map, to_official

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_every_tensor_is_what_python_loads(
    tmp_path: Path, backbone: str, kind: str, dtype: torch.dtype, shard: str
) -> None:
    model = small_model(backbone, kind, dtype=dtype, router_hidden_size=24)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    checkpoint = Checkpoint.open(tmp_path)
    loaded = MiCRoForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    want = to_official(loaded.config, loaded.state_dict())
    assert checkpoint.names() == sorted(want)
    assert all(same(checkpoint.tensor(name), tensor) for name, tensor in want.items())
    assert checkpoint.bytes == sum(t.numel() * t.element_size() for t in want.values())


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_a_layer_has_the_names_of_the_parameters(tmp_path: Path, backbone: str, kind: str) -> None:
    model = small_model(backbone, kind, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    checkpoint, parameters = Checkpoint.open(tmp_path), dict(model.named_parameters())
    shared = {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffn_norm": "post_feedforward_layernorm",
    }
    seen = 0
    for index in range(model.config.num_hidden_layers):
        at, layer = f"model.layers.{index}.", checkpoint.layer(index)
        for name in ("in_proj", "out_proj"):
            assert same(layer.pop(f"router_{name}"), parameters[f"{at}router.{name}.weight"])
        for name, tensors in layer.items():
            if name in expert_shapes(model.config):
                assert same(torch.stack(tensors), parameters[f"{at}blocks.{name}.weight"])
            elif tensors:
                (tensor,) = tensors
                assert same(tensor, parameters[f"{at}{shared.get(name, f'self_attn.{name}')}.weight"])
            seen += len(tensors)
    assert seen + 2 * model.config.num_hidden_layers + 3 == len(official_map(model.config))
    assert same(checkpoint.embed_tokens(), model.model.embed_tokens.weight)
    assert same(checkpoint.final_norm(), model.model.norm.weight)
    assert same(checkpoint.lm_head(), model.lm_head.weight)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True, "eos_token_id": 5, "bos_token_id": 1, "pad_token_id": 2},
        {"rope_parameters": LLAMA3, "eos_token_id": [3, 5], "num_experts": 3, "num_experts_per_tok": 2},
        {"weight_rule": "straight_through", "use_router": False, "numerics": "fast", "rms_norm_eps": 3e-7},
        {"weight_rule": "probability", "expert_names": ["Ä", '"', "🙂", "\n d"], "max_position_embeddings": 99},
    ],
)
@pytest.mark.parametrize("backbone,kind", [("llama", "block"), ("olmo2", "ffn")])
def test_the_configuration_is_that_of_python(tmp_path: Path, backbone: str, kind: str, fields: dict[str, Any]) -> None:
    model = small_model(backbone, kind, dtype=torch.float32, **fields)
    model.save_pretrained(tmp_path)
    got, config = Checkpoint.open(tmp_path).config, model.config
    assert got.pop("rope_theta") == config.rope_theta_value
    assert got.pop("rope_scaling") == config.rope_scaling_value
    eos = config.eos_token_id
    assert got.pop("eos_token_ids") == ([] if eos is None else [eos] if isinstance(eos, int) else eos)
    assert got == {name: getattr(config, name) for name in got}


def test_generation_stops_where_python_does(tmp_path: Path) -> None:
    model = small_model(dtype=torch.float32, eos_token_id=5)
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).config["eos_token_ids"] == [7, 8]
    (tmp_path / "generation_config.json").unlink()
    assert Checkpoint.open(tmp_path).config["eos_token_ids"] == [5]


def test_what_a_caller_writes_stays_with_the_caller(tmp_path: Path) -> None:
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    before = checkpoint.embed_tokens().clone()
    checkpoint.embed_tokens().zero_()
    assert torch.equal(checkpoint.embed_tokens(), before)


def change(folder: Path, what: str) -> None:
    weights, config = folder / WEIGHTS_FILE, folder / "config.json"
    tensors, fields = load_file(weights), json.loads(config.read_text())
    if what == "a missing tensor":
        del tensors["layers.1.experts.2.self_attn.o_proj.weight"]
    elif what == "an unexpected tensor":
        tensors["layers.2.gate.0.weight"] = torch.zeros(2)
    elif what == "a wrong shape":
        tensors["layers.1.gate.1.weight"] = torch.zeros(5, 32)
    elif what == "a wrong type":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    elif what == "whole numbers":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].int()
    elif what == "a tied head":
        fields["tie_word_embeddings"] = True
    elif what == "an official folder":
        fields["model_type"] = "micro_llama"
    elif what == "another number of experts":
        fields |= {"num_experts": 5, "expert_names": list("abcde")}
    save_file(tensors, weights)
    config.write_text(json.dumps(fields))
    if what == "a file cut short":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif what == "no safetensors":
        weights.write_bytes(b"not a header, but a text")
    elif what == "broken JSON":
        config.write_text(config.read_text().replace('"hidden_size":', '"hidden_size"'))


@pytest.mark.parametrize(
    "what,message",
    [
        ("a missing tensor", r"1 problem: missing layers\.1\.experts\.2\.self_attn\.o_proj\.weight \[32, 32\]"),
        ("an unexpected tensor", r"unexpected layers\.2\.gate\.0\.weight \[2\] in model\.safetensors"),
        ("a wrong shape", r"layers\.1\.gate\.1\.weight \(model\.safetensors\) has shape \[5, 32\], expected \[4, 32\]"),
        ("a wrong type", r"tensor lm_head\.weight is BFloat16 and .* Float; expected one type for all"),
        ("whole numbers", r"model\.safetensors: tensor lm_head\.weight: dtype is I32, expected F64, F32, BF16 or F16"),
        ("a tied head", r"config\.json ties the head, but lm_head\.weight is in model\.safetensors"),
        ("an official folder", r"config\.json: model_type is 'micro_llama', expected 'micro'"),
        ("another number of experts", r"missing layers\.0\.experts\.4\.input_layernorm\.weight \[32\]"),
        ("a file cut short", r"model\.safetensors: tensor .* its data end at byte .*is the file complete\?"),
        ("no safetensors", r"model\.safetensors: 24 bytes hold no safetensors header"),
        ("broken JSON", r"config\.json: not valid JSON at byte \d+: expected ':', got '3'"),
    ],
)
def test_a_broken_folder_is_one_error(tmp_path: Path, what: str, message: str) -> None:
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    change(tmp_path, "nothing")
    Checkpoint.open(tmp_path)
    change(tmp_path, what)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert "Exception raised from" not in str(caught.value)  # no C++ trace


def test_unknown_names_and_layers(tmp_path: Path) -> None:
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ValueError, match=r"there is no tensor 'model\.norm\.weight'; expected an official name"):
        checkpoint.tensor("model.norm.weight")
    with pytest.raises(IndexError, match=r"expected 0 \.\. 1, got 2"):
        checkpoint.layer(2)
    with pytest.raises(ValueError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
