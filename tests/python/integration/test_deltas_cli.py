"""``micro deltas`` on a small upcycled model whose experts differ."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import micro
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
    return folder


def run(*arguments):
    return cli.run([str(argument) for argument in arguments])


def written(folder, *names):
    return {path.name for path in folder.iterdir()} >= {
        f"{n}.{s}" for n in names for s in ("json", "csv", "png", "svg")
    }


def test_deltas_compare_compress_and_merge(files, tmp_path, capsys):
    both = [files / "model", "--base", files / "base"]
    assert run("deltas", "compare", *both, "-o", tmp_path, "--interference", "--rank", 2, "--layers", "0,1") == 0
    assert run("deltas", "compress", *both[:1], tmp_path / "low", *both[1:], "--rank", 2, "-o", tmp_path) == 0
    assert (
        run("deltas", "compress", *both[:1], tmp_path / "small", *both[1:], "--rank", 2, "--compact", "-o", tmp_path)
        == 0
    )
    assert run("deltas", "expand", tmp_path / "small", tmp_path / "large") == 0
    small, large = (micro.load(tmp_path / name).state_dict() for name in ("large", "low"))
    assert max(float((small[key] - large[key]).abs().max()) for key in large) < 1e-6
    assert written(tmp_path, "deltas", "interference", "compression")
    assert micro.load(tmp_path / "low").config.num_experts == 4
    merges = {
        "ties": ["ties", "--density", 0.5],
        "sum": ["combine", "--coefficients", "logic=1,social=-0.5"],
        "apart": ["decorrelate", "--experts", "logic,world"],
    }
    for name, (command, *options) in merges.items():
        assert run("deltas", command, files / "model", tmp_path / name, *both[1:], *options) == 0
        assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / name), LlamaForCausalLM)
        assert (tmp_path / name / "tokenizer.json").is_file()
    assert run("deltas", "ties", files / "model", tmp_path / "ties", *both[1:]) == 2
    assert "--overwrite" in capsys.readouterr().err
    options = ["--into", "social", "--coefficients", "logic=1", "--overwrite"]
    assert run("deltas", "combine", files / "model", tmp_path / "ties", *both[1:], *options) == 0
    merged, given = micro.load(tmp_path / "ties"), micro.load(files / "model")
    for name, parameter in merged.named_parameters():
        if ".blocks." in name:
            assert torch.allclose(parameter[1], dict(given.named_parameters())[name][0], atol=1e-6)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["deltas", "compare", "{model}", "--base", "{model}"], "share no base"),
        (["deltas", "compare", "{model}", "--layers", "one"], "--layers: 'one' must be layer numbers"),
        (["deltas", "combine", "{model}", "out", "--coefficients", ""], "--coefficients is empty"),
        (["deltas", "compress", "{model}"], "give either fraction or rank"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run(*(argument.format(model=files / "model") for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert error.startswith("micro: ")
