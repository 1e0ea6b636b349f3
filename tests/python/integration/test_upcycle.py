"""Dense -> mixture: the function is preserved, clones are copies, and folders are complete (model.md 5.6)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import LLAMA3_ROPE, SIZES, dense
from tolerances import UPCYCLED
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import micro
from micro.testing.tokenizers import tiny_tokenizer

FAMILIES = ("llama", "olmo2")
KINDS = ("block", "ffn")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_routing_gives_the_dense_logits(family: str, kind: Any, dtype: torch.dtype) -> None:
    backbone = dense(family, dtype)
    receipt = micro.upcycle(backbone, kind=kind, seed=5).upcycle_receipt
    assert receipt.max_abs_diff <= UPCYCLED[dtype] * receipt.max_abs_logit
    assert receipt.max_abs_diff == max(receipt.routings.values())
    assert len(receipt.routings) == 8  # router, labels, four forced experts, 2 and 4 experts per token
    assert (receipt.dtype, receipt.seed, receipt.kind) == (str(dtype).removeprefix("torch."), 5, kind)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_rope_and_long_rows(family: str) -> None:
    backbone = dense(family, torch.float64, rope_parameters=dict(LLAMA3_ROPE))
    model = micro.upcycle(backbone)
    ids = torch.randint(97, (1, 200))
    with torch.no_grad():
        difference = (model(ids).logits - backbone(ids).logits).abs().max()
    assert difference <= UPCYCLED[torch.float64] * backbone(ids).logits.abs().max()


def test_wide_heads_and_other_numbers_of_experts() -> None:
    backbone = dense("llama", torch.float64, head_dim=16, num_key_value_heads=1)
    model = micro.upcycle(backbone, num_experts=3, expert_names=["a", "b", "c"])
    assert model.upcycle_receipt.routings.keys() >= {"force a", "force b", "force c", "3 experts per token"}
    assert micro.upcycle(backbone, num_experts=1).config.expert_names == ["expert_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_clones_are_real_copies(kind: Any) -> None:
    backbone = dense("llama", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = micro.upcycle(backbone, kind=kind)
    with torch.no_grad():
        for _, part in model.named_expert_parameters("social"):
            part.add_(1.0)
        model.lm_head.weight.add_(1.0)
    clean = micro.upcycle(backbone, kind=kind, verify=False)
    for (name, changed), (_, same) in zip(
        model.named_expert_parameters("world"), clean.named_expert_parameters("world"), strict=True
    ):
        assert torch.equal(changed, same), name
    assert torch.equal(model.model.embed_tokens.weight, clean.model.embed_tokens.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_the_head_is_a_tensor_of_its_own() -> None:
    model = micro.upcycle(dense("llama", tie_word_embeddings=True))
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.upcycle_receipt.tensors == 3 + 2 * (2 + 9 * 4)
    assert model.upcycle_receipt.parameters == sum(p.numel() for p in model.parameters())


def test_routers_start_from_the_seed_by_the_rule_of_the_family() -> None:
    llama = micro.upcycle(dense("llama", hidden_size=64), seed=1, verify=False).model.layers
    bound = 64**-0.5
    for layer in llama:
        largest = layer.router.in_proj.weight.abs().max()
        assert 0.95 * bound < largest <= bound
        assert layer.router.out_proj.weight.abs().max() <= bound
    assert not torch.equal(llama[0].router.in_proj.weight, llama[1].router.in_proj.weight)
    olmo = micro.upcycle(dense("olmo2", initializer_range=0.05), seed=1, verify=False).model.layers
    assert olmo[0].router.in_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)


def test_routers_depend_on_the_seed_and_on_nothing_else() -> None:
    backbone = dense("llama")
    torch.manual_seed(1)
    one = micro.upcycle(backbone, seed=1, verify=False)
    torch.manual_seed(2)
    again = micro.upcycle(backbone, seed=1, verify=False)
    narrow = micro.upcycle(backbone, seed=1, dtype="bfloat16", verify=False)
    other = micro.upcycle(backbone, seed=2, verify=False)
    weights = [m.model.layers[1].router.in_proj.weight for m in (one, again, narrow, other)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0].bfloat16(), weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert backbone.dtype == torch.float32  # a cast leaves the source alone


def test_float16_backbones_ask_for_another_dtype() -> None:
    """The operators compute in float32, float64 and bfloat16, so a float16 copy could not run."""
    backbone = dense("llama", torch.float16)
    with pytest.raises(ValueError, match="dtype='bfloat16'"):
        micro.upcycle(backbone)
    assert micro.upcycle(backbone, dtype="bfloat16", verify=False).dtype == torch.bfloat16
    assert micro.upcycle(backbone, verify=False).dtype == torch.float16


def _folder(path: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    tokenizer = tiny_tokenizer(vocab_size=300)
    backbone = dense("llama", dtype, vocab_size=len(tokenizer), **fields)
    backbone.generation_config.temperature = 0.7
    backbone.generation_config.do_sample = True
    backbone.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "LICENSE.txt").write_text("the terms")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A backbone\n")
    return path


def test_a_saved_folder_is_complete(tmp_path: Path) -> None:
    source = _folder(tmp_path / "dense")
    model = micro.upcycle(source)
    for out in (tmp_path / "a", tmp_path / "b"):
        if out.name == "a":
            model.save_pretrained(out)
        else:
            micro.convert(model, out)
        names = {p.name for p in out.iterdir()}
        assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
        assert names >= {"upcycle_receipt.json", "LICENSE.txt", "config.json", "model.safetensors"}
        again = micro.load(out)
        assert again.generation_config.temperature == 0.7
        assert again.upcycle_receipt == model.upcycle_receipt == json.loads((out / "upcycle_receipt.json").read_text())
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
        assert str(tmp_path / "dense") not in (out / "config.json").read_text()
    card = (tmp_path / "b" / "README.md").read_text()
    assert "base_model" not in card  # the source is a folder, not a hub id
    assert "license: mit" in card
    assert "all experts are equal" in card
    second = tmp_path / "c"
    type(model).from_pretrained(tmp_path / "b").save_pretrained(second)
    assert (second / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()


def test_the_file_decides_the_dtype(tmp_path: Path) -> None:
    source = _folder(tmp_path / "dense")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "dtype": "bfloat16"}))
    assert micro.upcycle(source).dtype == torch.float32
    assert micro.upcycle(source, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    source = _folder(tmp_path / "dense")
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit") as caught:
        micro.upcycle(source)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj.bias" in str(caught.value)


def test_a_changed_function_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["micro.convert.upcycle"]  # as an attribute the function of that name hides it
    real = module.build

    def broken(*arguments: Any) -> Any:
        model = real(*arguments)
        with torch.no_grad():
            model.model.layers[1].blocks.k_proj.weight[2] *= -1
        return model

    monkeypatch.setattr(module, "build", broken)
    with pytest.raises(RuntimeError, match="changed the function"):
        micro.upcycle(dense("llama"))
    assert micro.upcycle(dense("llama"), verify=False).upcycle_receipt.max_abs_diff is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_bias": True}, "biases \\(attention_bias\\)"),
        ({"mlp_bias": True}, "biases \\(mlp_bias\\)"),
        ({"hidden_act": "gelu"}, "the activation 'gelu'"),
        ({"attention_dropout": 0.1}, "attention dropout 0.1"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "RoPE of type 'linear'"),
    ],
)
def test_backbones_of_another_shape_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        micro.upcycle(dense("llama", **fields))


def test_other_families_are_refused() -> None:
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported: llama"):
        micro.upcycle(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97)))
    with pytest.raises(ValueError, match="'mistral' is not supported"):
        micro.upcycle(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "layer"}, "kind 'layer'"),
        ({"num_experts": 0}, "num_experts 0"),
        ({"expert_names": ["a", "b"]}, "a list of 4 names"),
        ({"expert_names": ["a", "a", "b", "c"]}, "4 different names"),
        ({"seed": -1}, "seed -1"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"gguf_file": "x.gguf"}, "loaded model"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        micro.upcycle(dense("llama"), **arguments)


def test_loaded_models_without_plain_weights_are_refused() -> None:
    backbone = dense("llama")
    backbone.model.norm.double()
    with pytest.raises(ValueError, match=r"one floating-point dtype, it has \['torch.float32', 'torch.float64'\]"):
        micro.upcycle(backbone)
    with pytest.raises(ValueError, match="on meta"):
        micro.upcycle(dense("llama").to("meta"))
    resized = dense("llama")
    resized.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=r"another shape: \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        micro.upcycle(resized)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        micro.upcycle(tmp_path / "nothing")
    with pytest.raises(TypeError, match="got int"):
        micro.upcycle(3)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: there is no such file"):
        micro.upcycle(tmp_path / "empty")
    micro.convert(micro.upcycle(dense("llama")), tmp_path / "mixture")
    with pytest.raises(ValueError, match="mixture of experts already"):
        micro.upcycle(tmp_path / "mixture")
