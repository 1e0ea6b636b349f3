"""Official checkpoints of both revisions: recognised by keys, loaded whole or not at all, written back bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dense_models import LLAMA3_ROPE, SIZES, dense, official_config, official_tensors, write_official
from safetensors.torch import load_file
from tolerances import UPCYCLED
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import micro
from micro.modeling import MiCRoForCausalLM
from micro.testing.tokenizers import tiny_tokenizer

# The hand-written folders hold no tokenizer; that this is said has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer files to write")

LAYOUTS = [
    ("llama", "block", "r1"),
    ("llama", "block", "r2"),
    ("llama", "ffn", "r1"),
    ("llama", "ffn", "r2"),
    ("olmo2", "block", "r1"),
    ("olmo2", "ffn", "r2"),
]


def _write(folder: Path, family: str = "llama", kind: str = "block", revision: str = "r1", **changes: Any) -> Path:
    config = {**official_config(family, kind, revision), **changes}
    return write_official(folder, config, official_tensors(family, kind))


@pytest.mark.parametrize(("family", "kind", "revision"), LAYOUTS)
def test_layout_and_quirks(tmp_path: Path, family: str, kind: str, revision: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = micro.load(_write(tmp_path / "official", family, kind, revision))
    tensors = official_tensors(family, kind)
    config = model.config
    assert (config.backbone, config.block_type, config.num_hidden_layers, config.num_experts) == (family, kind, 2, 4)
    assert config.expert_names == ["logic", "social", "world", "language"]
    assert model.dtype == torch.float32  # the config says bfloat16
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])  # the config says tied
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    layer = model.model.layers[1]
    middle = "layers.1" if kind == "block" else "layers.1.block_sparse_moe"
    assert torch.equal(layer.router.out_proj.weight, tensors[f"{middle}.gate.1.weight"])
    up = "mlp.up_proj" if kind == "block" else "up_proj"
    for e in range(4):
        assert torch.equal(layer.blocks.up_proj.weight[e], tensors[f"{middle}.experts.{e}.{up}.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors.values())


def test_forced_expert_is_the_dense_model_of_its_blocks(tmp_path: Path) -> None:
    """Numbers against Hugging Face's own class, from the same official file (invariant I4)."""
    model = micro.load(_write(tmp_path / "official", rope_scaling=LLAMA3_ROPE, rope_theta=5e5), dtype=torch.float64)
    tensors = official_tensors("llama", "block")
    fields = {**SIZES, "rms_norm_eps": 1e-5, "rope_parameters": dict(LLAMA3_ROPE)}
    plain = LlamaForCausalLM(LlamaConfig(**fields)).double().eval()
    state = {"lm_head.weight": tensors["lm_head.weight"], "model.norm.weight": tensors["final_norm.weight"]}
    state["model.embed_tokens.weight"] = tensors["embed_tokens.weight"]
    for name, tensor in tensors.items():
        if ".experts.2." in name:
            state["model." + name.replace("experts.2.", "")] = tensor
    plain.load_state_dict(state)
    ids = torch.randint(97, (2, 90))
    with torch.no_grad():
        expected = plain(ids).logits
        found = model(ids, force="world").logits
    assert (found - expected).abs().max() <= UPCYCLED[torch.float64] * expected.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone_num_layers": None},
        {"num_experts": None},
        {"architectures": ["SomethingElse"], "model_type": "olmo2"},
        {"ablate": "none"},
    ],
)
def test_recognised_by_keys(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = micro.load(_write(tmp_path / "official", **changes))
    assert (model.config.backbone, model.config.num_hidden_layers, model.config.num_experts) == ("llama", 2, 4)


def test_fields_of_the_run_are_kept(tmp_path: Path) -> None:
    changes = {"num_experts_per_tok": 2, "use_router": False, "jitter_noise": 0.1, "rope_theta": 123.0}
    config = micro.load(_write(tmp_path / "official", **changes)).config
    assert (config.num_experts_per_tok, config.use_router, config.jitter_noise) == (2, False, 0.1)
    assert config.rope_theta_value == 123.0
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.001}
    config = micro.load(_write(tmp_path / "moe", "llama", "ffn", **balanced)).config
    assert config.loss_coefficients == {"load_balancing_loss": 0.001}


def test_generation_uses_a_cache_although_training_had_none(tmp_path: Path) -> None:
    """A run with checkpointing stores use_cache: false; without a generation config transformers takes it over."""
    model = micro.load(_write(tmp_path / "official", use_cache=False, eos_token_id=[7, 9]))
    assert model.config.use_cache and model.generation_config.use_cache is not False
    assert model.generation_config.eos_token_id == [7, 9]


def test_a_stored_ablation_is_reported_and_has_no_effect(tmp_path: Path) -> None:
    folder = _write(tmp_path / "official", ablate=["social"])
    with pytest.warns(UserWarning, match=r"ablate = \['social'\], which is ignored"):
        model = micro.load(folder)
    plain = micro.load(_write(tmp_path / "plain"))
    ids = torch.randint(97, (1, 12))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_three_experts_and_shards(tmp_path: Path) -> None:
    tensors = official_tensors("llama", "block", experts=3)
    config = official_config("llama", "block", "r1", experts=3)
    model = micro.load(write_official(tmp_path / "official", config, tensors, shards=3))
    assert model.config.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert torch.equal(
        model.model.layers[0].blocks.q_proj.weight[2], tensors["layers.0.experts.2.self_attn.q_proj.weight"]
    )


def test_all_problems_in_one_error(tmp_path: Path) -> None:
    tensors = official_tensors("llama", "block")
    del tensors["layers.1.experts.2.mlp.up_proj.weight"], tensors["final_norm.weight"]
    tensors["layers.0.gate.1.weight"] = torch.zeros(5, 32)
    tensors["layers.0.experts.0.self_attn.q_proj.bias"] = torch.zeros(32)
    folder = write_official(tmp_path / "official", official_config("llama", "block", "r1"), tensors)
    with pytest.raises(ValueError, match="4 problems") as caught:
        micro.load(folder)
    for name in (
        "missing layers.1.experts.2.mlp.up_proj.weight",
        "missing final_norm.weight",
        "unexpected layers.0.experts.0.self_attn.q_proj.bias",
        "layers.0.gate.1.weight has shape [5, 32], expected [4, 32]",
    ):
        assert name in str(caught.value)


def test_a_missing_expert_is_not_closed_up(tmp_path: Path) -> None:
    tensors = {n: t for n, t in official_tensors("llama", "block").items() if ".experts.1." not in n}
    folder = write_official(tmp_path / "official", official_config("llama", "block", "r1"), tensors)
    with pytest.raises(ValueError, match=r"missing layers\.0\.experts\.1\."):
        micro.load(folder)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        micro.load(tmp_path / "nowhere")
    dense("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"dense model .* micro\.upcycle"):
        micro.load(tmp_path / "dense")
    write_official(tmp_path / "foreign", official_config("llama", "block", "r1"), {"blk.0.attn": torch.zeros(2)})
    with pytest.raises(ValueError, match="neither ours nor official"):
        micro.load(tmp_path / "foreign")
    with pytest.raises(ValueError, match="nothing"):
        micro.load(tmp_path / "nothing")
    folder = _write(tmp_path / "activation", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        micro.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: there is no such file"):
        micro.load(folder)


def test_truncated_and_mixed_files(tmp_path: Path) -> None:
    folder = _write(tmp_path / "official")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            micro.load(folder)
    tensors = official_tensors("llama", "block")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    write_official(tmp_path / "mixed", official_config("llama", "block", "r1"), tensors)
    with pytest.raises(ValueError, match="BF16"):
        micro.load(tmp_path / "mixed")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(("family", "kind", "revision"), LAYOUTS)
def test_round_trips_are_bit_equal(tmp_path: Path, family: str, kind: str, revision: str) -> None:
    official = _write(tmp_path / "official", family, kind, revision)
    ours = micro.convert(official, tmp_path / "ours")
    back = micro.convert(ours, tmp_path / "back", to="official", revision=revision)  # type: ignore[arg-type]
    again = micro.convert(back, tmp_path / "again")
    start = _tensors(official)
    for folder in (ours, back, again):
        found = _tensors(folder)
        assert found.keys() == start.keys()
        assert all(torch.equal(found[name], start[name]) and found[name].dtype == start[name].dtype for name in start)
    assert (ours / "config.json").read_text() == (again / "config.json").read_text()


@pytest.mark.parametrize(("family", "kind", "revision"), LAYOUTS)
def test_config_and_run_file_for_the_official_classes(tmp_path: Path, family: str, kind: str, revision: str) -> None:
    ours = micro.load(_write(tmp_path / "official", family, kind, revision, num_experts_per_tok=2))
    out = micro.convert(ours, tmp_path / "out", to="official", revision=revision)  # type: ignore[arg-type]
    fields = json.loads((out / "config.json").read_text())
    given = official_config(family, kind, revision)
    for name in ("architectures", "model_type", "backbone_num_layers", "num_experts", "rope_theta", "rope_scaling"):
        assert fields[name] == given[name], name
    # The official constructor multiplies this number by E at every load; from L it builds L layers.
    assert fields["num_hidden_layers"] == 2
    assert (fields["torch_dtype"], fields["tie_word_embeddings"], fields["ablate"]) == ("float32", False, [])
    run_path = Path(fields["config_path"])
    assert run_path == out / "run.yaml"
    run = yaml.safe_load(run_path.read_text())
    trainable = {"r1": ["model", "reasoners", "experts-router"], "r2": ["model", "experts", "experts-router"]}
    assert run == {
        "model": f"micro-{family}",
        "tokenizer": str(out),
        "num-experts": 4,
        "top-k-experts": 2,
        "use-router": True,
        "jitter-noise": 0.0,
        "trainable": trainable[revision],
    }


def test_a_tied_model_is_written_untied(tmp_path: Path) -> None:
    model = micro.upcycle(dense("llama"), verify=False)
    config = type(model.config)(**{**model.config.to_dict(), "tie_word_embeddings": True})
    tied = MiCRoForCausalLM(config)
    assert "lm_head.weight" not in _tensors(micro.convert(tied, tmp_path / "ours"))
    written = _tensors(micro.convert(tmp_path / "ours", tmp_path / "official", to="official"))
    assert torch.equal(written["lm_head.weight"], written["embed_tokens.weight"])
    assert torch.equal(written["lm_head.weight"], tied.model.embed_tokens.weight)


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    from micro.convert.tensors import official_tensors as tensors_of
    from micro.convert.tensors import write_shards

    model = micro.upcycle(dense("llama"), verify=False)
    write_shards(tmp_path, tensors_of(model), max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"].values()) == files
    model.config.save_pretrained(tmp_path)
    again = micro.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_tokenizer_that_the_run_file_names(tmp_path: Path) -> None:
    """Revision r1 loads the tokenizer of the run file: it is in the folder, or one is told that it is not."""
    model = micro.upcycle(dense("llama"), verify=False)
    with pytest.warns(UserWarning, match="no tokenizer files to write"):
        micro.convert(model, tmp_path / "without", to="official")
    source = tmp_path / "SmolLM2-tiny"
    dense("llama", vocab_size=300).save_pretrained(source)
    tiny_tokenizer(vocab_size=300).save_pretrained(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = micro.convert(micro.upcycle(source, verify=False), tmp_path / "with", to="official")
    run = yaml.safe_load((out / "run.yaml").read_text())
    assert run["model"] == str(source)  # the family can be told by a word in it
    assert AutoTokenizer.from_pretrained(run["tokenizer"]).chat_template


def test_what_official_classes_cannot_express(tmp_path: Path) -> None:
    olmo = micro.upcycle(dense("olmo2"), kind="ffn", verify=False)
    with pytest.raises(ValueError, match="revision='r2'"):
        micro.convert(olmo, tmp_path / "out", to="official", revision="r1")
    model = micro.upcycle(dense("llama"), verify=False)
    model.config.weight_rule = "probability"
    with pytest.raises(ValueError, match="weight_rule 'probability'"):
        micro.convert(model, tmp_path / "out", to="official")
    named = micro.upcycle(dense("llama"), expert_names=["a", "b", "c", "d"], verify=False)
    with pytest.warns(UserWarning, match="no expert names"):
        micro.convert(named, tmp_path / "named", to="official")
    with pytest.raises(ValueError, match="to='gguf'"):
        micro.convert(model, tmp_path / "out", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="revision='r3'"):
        micro.convert(model, tmp_path / "out", revision="r3")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_folders_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro.upcycle(dense("llama"), verify=False)
    out = micro.convert(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        micro.convert(model, out)
    with pytest.raises(ValueError, match="the source itself"):
        micro.convert(out, out, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no model folder"):
        micro.convert(model, other, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        micro.convert(model, tmp_path / "file")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.generation_config), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        micro.convert(model, out, overwrite=True)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    micro.convert(model, out, to="official", overwrite=True)
    assert (out / "run.yaml").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other", "out"]  # nothing is left beside
