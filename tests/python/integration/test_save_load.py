"""Files: official names, bit-equal round trips, one error for all that does not fit, and the traps of loaders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import ALL_FOUR, random_ids, small_config, small_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from micro.modeling import MiCRoConfig, MiCRoForCausalLM, MiCRoModel
from micro.modeling.keys import check_folder, official_shapes, read_headers, to_official


def equal_states(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_round_trip_is_bit_equal_under_official_names(tmp_path: Path, backbone: str, kind: str, shard: str) -> None:
    model = small_model(backbone, kind, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    files = read_all(tmp_path / "a")
    want = to_official(model.config, model.state_dict())
    assert files.keys() == want.keys() == official_shapes(model.config).keys()
    assert all(torch.equal(files[k], want[k]) for k in files)
    assert (len(list((tmp_path / "a").glob("*.safetensors"))) > 1) == (shard == "20KB")
    # Auto classes, and a second save after a load
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(again, MiCRoForCausalLM)
    assert equal_states(model, again)
    again.save_pretrained(tmp_path / "b", max_shard_size=shard)
    assert {k: v.tolist() for k, v in read_all(tmp_path / "b").items()} == {k: v.tolist() for k, v in files.items()}
    assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "a" / "config.json").read_text()
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "b"), MiCRoConfig)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_headless_model_loads_and_saves(tmp_path: Path, backbone: str, kind: str) -> None:
    model = small_model(backbone, kind, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a")
    body = AutoModel.from_pretrained(tmp_path / "a")
    assert isinstance(body, MiCRoModel)
    assert equal_states(model.model, body)
    body.save_pretrained(tmp_path / "b")
    files = read_all(tmp_path / "b")
    assert files.keys() == official_shapes(model.config).keys() - {"lm_head.weight"}
    assert equal_states(body, MiCRoModel.from_pretrained(tmp_path / "b"))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tmp_path: Path, tied: bool) -> None:
    model = small_model(dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in read_all(tmp_path)) is not tied
    again = MiCRoForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert equal_states(model, again)
    if tied:
        files = read_all(tmp_path)
        save_file({**files, "lm_head.weight": files["embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"ties the head, but lm_head\.weight is in the file"):
            MiCRoForCausalLM.from_pretrained(tmp_path)


def test_dtype_is_that_of_the_tensors(tmp_path: Path) -> None:
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert MiCRoForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
    assert MiCRoForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert MiCRoForCausalLM.from_pretrained(tmp_path, dtype="float64").dtype == torch.float64


def test_every_problem_in_one_error_and_no_tensor_read(tmp_path: Path) -> None:
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    files = read_all(tmp_path)
    lost = "layers.1.experts.2.self_attn.k_proj.weight"
    files.pop(lost)
    files["layers.0.gate.1.weight"] = torch.zeros(3, 32)
    files["layers.0.experts.4.mlp.up_proj.weight"] = torch.zeros(40, 32)
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        MiCRoForCausalLM.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "3 problems" in text and str(tmp_path) in text
    assert f"missing {lost} [16, 32]" in text
    assert "unexpected layers.0.experts.4.mlp.up_proj.weight [40, 32]" in text
    assert "layers.0.gate.1.weight has shape [3, 32], expected [4, 32]" in text


def test_broken_files_are_named(tmp_path: Path) -> None:
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    shard = sorted((tmp_path / "whole").glob("*.safetensors"))[1]

    def spoiled(name: str) -> Path:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        return tmp_path / name / shard.name

    file = spoiled("short")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{shard.name}: .*incomplete file"):
        MiCRoForCausalLM.from_pretrained(tmp_path / "short")
    file = spoiled("empty")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=shard.name):
        MiCRoForCausalLM.from_pretrained(tmp_path / "empty")
    file = spoiled("garbled")
    file.write_bytes(file.read_bytes()[:8] + b"\xff" + file.read_bytes()[9:])
    with pytest.raises(ValueError, match="header is unreadable"):
        MiCRoForCausalLM.from_pretrained(tmp_path / "garbled")
    spoiled("gone").unlink()
    with pytest.raises(ValueError, match=rf"shards \['{shard.name}'\] are not there"):
        MiCRoForCausalLM.from_pretrained(tmp_path / "gone")
    spoiled("index")
    (tmp_path / "index" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="no index"):
        MiCRoForCausalLM.from_pretrained(tmp_path / "index")
    (tmp_path / "nothing").mkdir()
    model.config.save_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="neither model"):
        MiCRoForCausalLM.from_pretrained(tmp_path / "nothing")


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    files = read_all(tmp_path)
    files["final_norm.weight"] = files["final_norm.weight"].bfloat16()
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"\['BF16', 'F32'\]"):
        MiCRoForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_load_state_dict_takes_official_keys(backbone: str, kind: str) -> None:
    model, fresh = small_model(backbone, kind, seed=1), small_model(backbone, kind, seed=2)
    official = to_official(model.config, model.state_dict())
    fresh.load_state_dict({k: v.clone() for k, v in official.items()})
    assert equal_states(model, fresh)
    # in two parts, as shards come, with the experts of one tensor in both
    names, other = sorted(official), small_model(backbone, kind, seed=3)
    for part in (names[0::2], names[1::2]):
        other.load_state_dict({k: official[k] for k in part}, strict=False)
    assert equal_states(model, other)
    with pytest.raises(RuntimeError, match=r"experts\.2"):
        fresh.load_state_dict({k: v for k, v in official.items() if "experts.2." not in k})
    with pytest.raises(RuntimeError, match="expected"):
        fresh.load_state_dict({**official, next(k for k in names if "experts.1." in k): torch.zeros(1)})
    body = small_model(backbone, kind, seed=4).model
    body.load_state_dict({k: v for k, v in official.items() if k != "lm_head.weight"})
    assert equal_states(model.model, body)


def test_initialisation_never_touches_loaded_weights(tmp_path: Path) -> None:
    model = small_model(dtype=torch.float32)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.fill_(i + 1)
    model.save_pretrained(tmp_path)
    assert equal_states(model, MiCRoForCausalLM.from_pretrained(tmp_path))


def test_meta_device_and_parameter_counts() -> None:
    """model.md 5.5, the numbers that released files confirm."""
    smol = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    llama = {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    olmo = {**llama, "vocab_size": 100352, "num_attention_heads": 16, "num_key_value_heads": 16, "backbone": "olmo2"}
    for fields, kind, tensors, parameters in (
        (smol, "block", 1143, 491_457_600),
        (smol, "ffn", 603, 411_727_680),
        (llama, "block", 611, 4_485_154_816),
        (llama, "ffn", 323, 3_981_641_728),
        (olmo, "block", 739, 4_773_775_360),
        (olmo, "ffn", 355, 3_968_075_776),
    ):
        config = MiCRoConfig(**fields, block_type=kind)
        with torch.device("meta"):
            model = MiCRoForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == parameters
        shapes = official_shapes(config)
        assert len(shapes) == tensors
        assert sum(torch.Size(s).numel() for s in shapes.values()) == parameters


def test_router_start_by_family_and_generator() -> None:
    torch.manual_seed(0)
    uniform = MiCRoForCausalLM(small_config(hidden_size=256, head_dim=8)).model.layers[0].router.in_proj.weight
    normal = MiCRoForCausalLM(small_config("olmo2", hidden_size=256, head_dim=8)).model.layers[0].router.in_proj.weight
    assert float(uniform.detach().abs().max()) <= 1 / 16 and float(uniform.std()) == pytest.approx(
        1 / 16 / 3**0.5, rel=0.02
    )
    assert float(normal.std()) == pytest.approx(0.02, rel=0.02) and float(normal.abs().max()) > 1 / 16
    model = small_model()
    body = model.model.layers[0].blocks.q_proj.weight.clone()
    starts = []
    for _ in range(2):
        model.reset_routers(torch.Generator().manual_seed(7))
        starts.append(model.model.layers[1].router.out_proj.weight.clone())
    assert torch.equal(*starts)
    assert torch.equal(body, model.model.layers[0].blocks.q_proj.weight)


def test_named_expert_parameters_are_slices() -> None:
    model = small_model()
    mine = dict(model.named_expert_parameters("MD"))
    assert len(mine) == 2 * 9
    name, slice_ = "model.layers.1.blocks.o_proj.weight", mine["model.layers.1.blocks.o_proj.weight"]
    with torch.no_grad():
        slice_.zero_()
    assert float(dict(model.named_parameters())[name][0].abs().max()) == 0
    with pytest.raises(ValueError, match="unknown expert"):
        dict(model.named_expert_parameters("nobody"))


def test_check_folder_reads_headers_only(tmp_path: Path) -> None:
    model = small_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert check_folder(model.config, tmp_path) == torch.bfloat16
    assert read_headers(tmp_path)["layers.0.gate.0.weight"].shape == (32, 32)
    assert not model.generate(random_ids(1, 3), max_new_tokens=1, do_sample=False, pad_token_id=0).isnan().any()
