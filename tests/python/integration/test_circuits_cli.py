"""``micro circuits`` on a small upcycled model."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import micro
from micro import data
from micro.analysis.circuits import GatingResult, head_gating
from micro.cli import main as cli
from micro.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = micro.upcycle(LlamaForCausalLM(config), verify=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def files(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("circuits")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    records = data.generate(4, split="test", seed=3)
    data.save_records(records, folder / "data.jsonl")
    pair = {"clean": [5, 6, 7], "corrupt": [5, 6, 8], "answer": "a", "wrong": [10]}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "The red", "answer": "b"}) + "\n")
    return folder


def test_every_command_writes_its_result(files, capsys):
    out = str(files / "out")
    model = str(files / "model")
    commands = {
        "patching": ["patch", model, "--pairs", str(files / "pairs.jsonl"), "--routes", "free"],
        "removal": ["remove", model, "--data", str(files / "data.jsonl"), "--how", "mean", "--limit", "2"],
        "gating": ["gate", model, "--data", str(files / "data.jsonl"), "--steps", "2", "--seeds", "1"],
        "self_repair": ["repair", model, "--prompts", str(files / "prompts.jsonl")],
    }
    for name, arguments in commands.items():
        assert cli.run(["circuits", *arguments, "--output", out]) == 0, capsys.readouterr().err
        for suffix in ("json", "csv", "png", "svg"):
            assert (files / "out" / f"{name}.{suffix}").stat().st_size > 0


def test_a_broken_line_is_named(files, capsys):
    (files / "bad.jsonl").write_text('{"clean": "a"}\n')
    assert cli.run(["circuits", "patch", str(files / "model"), "--pairs", str(files / "bad.jsonl")]) == 2
    assert "bad.jsonl, line 1: expected an object with clean, corrupt, answer, wrong" in capsys.readouterr().err


def test_an_answer_of_several_tokens_is_told_apart(files, capsys):
    row = {"clean": [5, 6], "corrupt": [5, 7], "answer": " extraordinarily", "wrong": [10]}
    (files / "long.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.run(["circuits", "patch", str(files / "model"), "--pairs", str(files / "long.jsonl")]) == 2
    assert "' extraordinarily' is" in capsys.readouterr().err


def test_gates_lower_the_loss_and_stay_gates(model, tokenizer):
    records = data.generate(3, split="test", seed=5)
    result = head_gating(model, tokenizer, records, steps=15, seeds=[0], strength=0.5)
    assert isinstance(result, GatingResult)
    assert sum(map(len, result.closed_gates[0])) == 2 * 4
    plus, minus = (torch.tensor(g[0]) for g in (result.open_gates, result.closed_gates))
    assert bool(((plus >= 0) & (plus <= 1)).all())
    assert plus.mean() > minus.mean() + 0.2
    start = head_gating(model, tokenizer, records, steps=1, seeds=[0])
    assert result.loss["task"][0] < start.loss["task"][0]
