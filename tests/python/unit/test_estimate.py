"""Counts of model.md 5.5 and figures of performance.md 3.1, 3.3, 4.3 and 4.4."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from micro import estimate as est

# backbone: dense parameters, MoB tensors, MoB parameters, MoE tensors, MoE parameters (model.md 5.5)
COUNTS = {
    "SmolLM2-135M": (134_515_008, 1_143, 491_457_600, 603, 411_727_680),
    "SmolLM2-360M": (361_821_120, 1_219, 1_382_523_840, 643, 1_146_409_920),
    "SmolLM2-1.7B": (1_711_376_384, 915, 6_745_032_704, 483, 5_536_778_240),
    "Llama-3.2-1B": (1_235_814_400, 611, 4_485_154_816, 323, 3_981_641_728),
    "Llama-3.2-3B": (3_212_749_824, 1_067, 12_327_570_432, 563, 10_213_125_120),
    "OLMo-2-1B": (1_484_916_736, 739, 4_773_775_360, 355, 3_968_075_776),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_published_backbones(name: str) -> None:
    dense = est.BACKBONES[name]
    block, ffn = (est.parameters(est.upcycled(dense, kind)) for kind in ("block", "ffn"))
    assert (est.parameters(dense).total, block.tensors, block.total, ffn.tensors, ffn.total) == COUNTS[name]


def test_the_smaller_olmo_vocabulary() -> None:
    shape = est.upcycled(replace(est.BACKBONES["OLMo-2-1B"], V=100_279))
    assert est.parameters(shape).total == 4_773_476_352


def test_active_parameters_leave_out_the_other_experts() -> None:
    shape = est.upcycled(est.BACKBONES["SmolLM2-135M"])
    counts = est.parameters(shape)
    assert counts.total == counts.shared + counts.routers + 4 * counts.expert
    assert counts.active == counts.total - 3 * counts.expert
    # Keys and values of the three other experts are read as well, with the gains of their input norms.
    assert counts.touched - counts.active == 3 * 30 * (2 * 576 * 3 * 64 + 576)
    everyone = est.parameters(replace(shape, K=4))
    assert everyone.active == everyone.touched == everyone.total


@pytest.mark.parametrize(
    ("name", "length", "dense", "top1"),  # MFLOP per token, head excluded, router not folded
    [("SmolLM2-135M", 512, 230, 290), ("SmolLM2-135M", 2048, 283, 343), ("OLMo-2-1B", 2048, 2282, 3222)],
)
def test_prefill_operations(name: str, length: int, dense: float, top1: float) -> None:
    backbone = est.BACKBONES[name]
    assert round(est.flops(backbone, length, head=False)["total"] / 1e6) == dense
    assert round(est.flops(est.upcycled(backbone), length, head=False)["total"] / 1e6) == top1


@pytest.mark.parametrize(
    ("name", "length", "dense", "top1", "top2"),
    [
        ("SmolLM2-135M", 1024, 931, 1110, 1832),
        ("SmolLM2-135M", 2048, 1055, 1234, 2079),
        ("Llama-3.2-1B", 2048, 7884, 8892, 14999),
        ("OLMo-2-1B", 2048, 8146, 10965, 17072),
    ],
)
def test_training_operations(name: str, length: int, dense: float, top1: float, top2: float) -> None:
    backbone = est.BACKBONES[name]
    shapes = (backbone, est.upcycled(backbone), est.upcycled(backbone, experts_per_token=2))
    assert [round(est.training_flops(s, "all", length) / 1e6) for s in shapes] == [dense, top1, top2]


def test_training_the_routers_alone_costs_less() -> None:
    shape = est.upcycled(est.BACKBONES["SmolLM2-135M"], experts_per_token=2)
    official = est.upcycled(est.BACKBONES["SmolLM2-135M"], experts_per_token=4)  # every expert on every token
    ratio = est.training_flops(official, "routers", 2048) / est.training_flops(shape, "routers", 2048)
    assert round(ratio, 2) == 1.82
    assert est.training_bytes(shape, "routers", 2048)["optimizer"] == 8 * est.parameters(shape).routers


def test_cache_of_all_experts() -> None:
    shape = est.upcycled(est.BACKBONES["SmolLM2-135M"])
    assert est.cache_bytes(est.BACKBONES["SmolLM2-135M"], 1, "bfloat16") == 23_040
    assert est.cache_bytes(shape, 1, "bfloat16") == 92_160
    assert est.cache_bytes(replace(shape, kind="ffn"), 1, "bfloat16") == 23_040


@pytest.mark.parametrize(
    ("name", "dense", "ideal", "checkpointed"),
    [("SmolLM2-135M", 1.04, 1.18, 0.07), ("Llama-3.2-1B", 2.48, 2.68, 0.13), ("OLMo-2-1B", 2.68, 3.49, 0.13)],
)
def test_activations(name: str, dense: float, ideal: float, checkpointed: float) -> None:
    backbone = est.BACKBONES[name]
    shape = est.upcycled(backbone)
    assert round(est.activation_bytes(backbone, 2048, "bfloat16") / 1e9, 2) == dense
    assert round(est.activation_bytes(shape, 2048, "bfloat16") / 1e9, 2) == ideal
    # One recomputed layer comes on top of the layers' inputs.
    one_layer = est.activation_bytes(replace(shape, L=1), 2048, "bfloat16")
    kept = est.activation_bytes(shape, 2048, "bfloat16", checkpointing=True) - one_layer
    assert round(kept / 1e9, 2) == checkpointed


def test_full_training_is_sixteen_bytes_per_parameter() -> None:
    shape = est.upcycled(est.BACKBONES["SmolLM2-135M"])
    parts = est.training_bytes(shape, "all", 1)
    assert parts["total"] - parts["activations"] == 16 * 491_457_600


def test_stages_and_times() -> None:
    result = est.estimate("SmolLM2-135M", freeze="r1", length=512, flops_per_second=1e11)
    assert [(s.name, s.trainable, s.experts_per_token) for s in result.stages] == [
        ("stage 1", "experts", 1),
        ("stage 2", "routers", 2),
        ("stage 3", "all", 1),
    ]
    assert result.stages[2].tokens_per_second == pytest.approx(1e11 / result.stages[2].flops_per_token)
    assert json.loads(json.dumps(result.to_dict()))["parameters"]["total"] == 491_457_600
    assert [s.name for s in est.estimate("SmolLM2-135M", kind="dense").stages] == ["training"]


def _config(**fields: object) -> dict[str, object]:
    base = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    return {**base, "intermediate_size": 48, "vocab_size": 97, "num_key_value_heads": 2, **fields}


def test_shapes_of_config_files(tmp_path: Path) -> None:
    dense = est.shape_from_config(_config(tie_word_embeddings=True))
    assert (dense.kind, dense.tied, dense.D) == ("dense", True, 8)
    official = est.shape_from_config(_config(num_experts=4, num_hidden_layers=8, backbone_num_layers=2))
    assert (official.kind, official.L, official.tied) == ("block", 2, False)
    moe = est.shape_from_config(_config(num_experts=4, architectures=["LlamaMoE"]))
    assert moe.kind == "ffn"
    ours = _config(model_type="micro", backbone="olmo2", num_experts=3, num_experts_per_tok=2, block_type="block")
    (tmp_path / "config.json").write_text(json.dumps(ours))
    assert est.shape_of(tmp_path) == est.Shape("olmo2", 2, 32, 4, 2, 8, 48, 97, E=3, K=2)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder"):
        est.estimate("no-such-model")
    with pytest.raises(ValueError, match="'hidden_size' is missing"):
        est.shape_from_config({"model_type": "llama", "num_attention_heads": 4})
    with pytest.raises(ValueError, match="gpt2' is not supported"):
        est.shape_from_config(_config(model_type="gpt2"))
    with pytest.raises(ValueError, match="dtype 'int3'"):
        est.estimate("SmolLM2-135M", precision="int3")
    with pytest.raises(ValueError, match="5 experts per token"):
        est.estimate("SmolLM2-135M", experts_per_token=5)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        est.shape_of(tmp_path)
    with pytest.raises(TypeError, match="expected a name"):
        est.shape_of(3)
