"""``micro steer`` on a small upcycled model whose experts differ."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import micro
from micro import data
from micro.cli import main as cli
from micro.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=512,
    )  # fmt: skip
    dense = LlamaForCausalLM(config)
    model = micro.upcycle(dense, verify=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("files")
    dense.save_pretrained(folder / "base")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data.save_records(data.generate(4, split="test", seed=3), folder / "a.jsonl")
    (folder / "b.txt").write_text("One plain line.\n\nAnother plain line.\n")
    return folder


def run(*arguments):
    return cli.run([str(argument) for argument in arguments])


def written(folder, *names):
    return {path.name for path in folder.iterdir()} >= {
        f"{n}.{s}" for n in names for s in ("json", "csv", "png", "svg")
    }


def test_steer_matrix_writes_matrix_curves_and_answers(files, tmp_path, capsys):
    given = [files / "model", "--data", files / "a.jsonl", "-o", tmp_path, "--random-sets", 1, "--limit", 1]
    extra = ["--curves", "--bias", "2", "--prompt", "Why?", "--max-new-tokens", 3]
    assert (
        run("steer", "matrix", *given, *extra, "--set", "logic=social,world", "--set", "alone=logic,social,world") == 0
    )
    out = capsys.readouterr().out
    assert "change, nats per token" in out
    assert "alone: " in out
    assert written(tmp_path, "steering")
    content = json.loads((tmp_path / "steering.json").read_text())
    assert content["ablated"] == {"logic": ["social", "world"], "alone": ["logic", "social", "world"]}
    assert len(content["curves"]) == 4
    assert list(content["outputs"][0]) == ["prompt", "unsteered", "logic", "alone"]


def test_steer_cells_and_router(files, tmp_path, capsys):
    given = ["--a", files / "a.jsonl", "--b", files / "b.txt", "-o", tmp_path, "--top", 1, "--draws", 2]
    assert run("steer", "cells", files / "model", *given) == 0
    assert run("steer", "router", files / "model", "--data", files / "b.txt", "-o", tmp_path, "--shifts", 3) == 0
    assert written(tmp_path, "resonance", "attribution")
    assert "parts sum to the logits" in capsys.readouterr().out
    assert run("steer", "router", files / "model", "--text", "One line of text.", "-o", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["steer", "matrix", "{model}", "--data", "{a}", "--set", "logic"], "must be NAME=EXPERT,EXPERT"),
        (["steer", "matrix", "{model}", "--data", "{a}", "--bias", "high"], "must be numbers with commas"),
        (["steer", "cells", "{model}", "--a", "{a}", "--b", "{b}", "--switch", "off"], "--switch is 'off'"),
        (["steer", "router", "{model}"], "give either --data FILE or one or more --text"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    names = {"model": files / "model", "a": files / "a.jsonl", "b": files / "b.txt"}
    assert run(*(argument.format(**names) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert error.startswith("micro: ")
