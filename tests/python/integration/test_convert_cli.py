"""The commands upcycle, convert, collapse, estimate and generate, on a tiny folder, through the entry of `micro`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from dense_models import dense
from transformers import AutoModelForCausalLM

import micro
from micro.cli.main import run
from micro.cli.values import numbers_by_name
from micro.testing.tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense folder, and a mixture of it in which the experts differ, in one place."""
    place = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer(vocab_size=300)
    backbone = dense("llama", vocab_size=len(tokenizer))
    backbone.save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    model = micro.upcycle(place / "dense")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    micro.convert(model, place / "mixture")
    return place


def test_upcycle_convert_collapse(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, official, back = (str(tmp_path / name) for name in ("ours", "official", "back"))
    assert run(["upcycle", str(folder / "dense"), ours, "--kind", "ffn", "--seed", "4", "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert (receipt["kind"], receipt["seed"], receipt["dtype"]) == ("ffn", 4, "float32")
    assert run(["convert", ours, official, "--to", "official", "--revision", "r2"]) == 0
    assert json.loads((tmp_path / "official" / "config.json").read_text())["model_type"] == "micro_llama_moe"
    assert run(["collapse", official, back, "--rule", "expert", "--expert", "social"]) == 0
    again = AutoModelForCausalLM.from_pretrained(back).state_dict()
    first = AutoModelForCausalLM.from_pretrained(folder / "dense").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "tokenizer.json" in {p.name for p in (tmp_path / "back").iterdir()}
    assert "expert social" in (tmp_path / "back" / "README.md").read_text()


def test_errors_are_one_line_and_status_2(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture, out = str(folder / "mixture"), str(tmp_path / "out")
    for arguments, words in (
        (["upcycle", mixture, out], "mixture of experts already"),
        (["upcycle", str(folder / "dense"), mixture], "not empty"),
        (["upcycle", str(folder / "dense"), str(folder / "dense"), "--overwrite"], "the dense model itself"),
        (["upcycle", "./no-such-model", out], "no such folder, and this is no hub id"),
        (["upcycle", str(folder / "dense"), out, "--kind", "layer"], "kind 'layer'"),
        (["convert", str(folder / "dense"), out], "dense model"),
        (["convert", mixture, out, "--revision", "r9"], "revision='r9'"),
        (["collapse", mixture, out, "--rule", "weighted", "--weights", "logic:1"], "NAME=NUMBER"),
        (["estimate", "no-such-model"], "neither a folder"),
        (["generate", mixture], "give a PROMPT"),
        (["generate", mixture, "hello", "--ablate", "humour"], "unknown expert 'humour'"),
        (["generate", mixture, "hello", "--ablate", "logic,social,world,language"], "every expert"),
    ):
        assert run(arguments) == 2, arguments
        error = capsys.readouterr().err
        line = [part for part in error.splitlines() if part.startswith("micro: ")]
        assert len(line) == 1, error
        assert words in line[0], error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_estimate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "SmolLM2-135M", "--gflops", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 491_457_600
    assert run(["estimate", str(folder / "mixture"), "--gflops", "100", "--length", "64", "--tokens", "1000"]) == 0
    text = capsys.readouterr().out
    assert f"{sum(p.numel() for p in micro.load(folder / 'mixture').parameters()):,} in all" in text
    assert all(f"stage {n}" in text for n in (1, 2, 3))


def _generate(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    arguments = ["generate", str(folder / "mixture"), "The sum of", "--max-new-tokens", "12", *options]
    assert run(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_generate_is_what_the_model_generates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = micro.load(folder / "mixture"), AutoTokenizer.from_pretrained(folder / "mixture")
    ids = tokenizer("The sum of", return_tensors="pt")
    answers = {}
    for name, options, controls in (
        ("plain", [], {}),
        ("force", ["--force", "world"], {"force": "world"}),
        ("ablate", ["--ablate", "logic,LN"], {"ablate": ["logic", "language"]}),
        ("bias", ["--bias", "social=50"], {"bias": {"social": 50.0}}),
    ):
        out = model.generate(**ids, max_new_tokens=12, do_sample=False, **controls)[0, ids["input_ids"].shape[1] :]
        answers[name] = json.loads(_generate(folder, capsys, "--json", *options))
        assert [token["id"] for token in answers[name]["tokens"]] == out.tolist(), name
        assert answers[name]["text"] == tokenizer.decode(out, skip_special_tokens=True)
    assert answers["force"]["usage"]["world"] == 1.0
    assert {t["expert"] for t in answers["ablate"]["tokens"][:-1]} <= {"social", "world"}
    assert answers["plain"]["tokens"][-1]["expert"] is None  # never processed
    streamed = _generate(folder, capsys)
    assert streamed.strip() == answers["plain"]["text"].strip()


def test_generate_shows_routing_with_marks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _generate(folder, capsys, "--show-routing", "--force", "social")
    assert "[S]" in text
    assert "\x1b" not in text  # not a terminal
    assert re.search(r"S social 100%", text)


def test_the_engine_gives_the_same_answers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--ablate", "social"], ["--repetition-penalty", "1.5"], ["--force", "world"]):
        assert json.loads(_generate(folder, capsys, "--json", "--engine", *options)) == json.loads(
            _generate(folder, capsys, "--json", *options)
        )
    assert _generate(folder, capsys, "--engine") == _generate(folder, capsys)
    one, two, three = (
        _generate(folder, capsys, "--engine", "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2")
    )
    assert one == two
    assert one != three
    assert run(["convert", str(folder / "mixture"), str(tmp_path / "official"), "--to", "official"]) == 0
    capsys.readouterr()
    assert run(["generate", str(tmp_path / "official"), "The sum of", "--engine", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == _generate(folder, capsys)
    assert run(["generate", str(folder / "mixture"), "hello", "--engine", "--num-beams", "2"]) == 2
    assert "no beam search" in capsys.readouterr().err


def test_sampling_is_seeded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two, three = (_generate(folder, capsys, "--temperature", "1.5", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == two
    assert one != three


def test_chat_line_by_line(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand then?\n"))
    assert run(["generate", str(folder / "mixture"), "--chat", "--system", "Be short.", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.strip()


def test_numbers_by_name() -> None:
    assert numbers_by_name("logic=1.5, social=-2", "--bias") == {"logic": 1.5, "social": -2.0}
    assert numbers_by_name(None, "--bias") is None
    with pytest.raises(ValueError, match="given twice"):
        numbers_by_name("a=1,a=2", "--bias")
