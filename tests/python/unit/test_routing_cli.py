"""``micro route`` with all its parts, on a small model."""

import csv
import json
from pathlib import Path

import pytest
import torch
from small_models import small_model

from micro import data
from micro.cli import main as cli
from micro.cli.route import _checkpoint_names, _groups
from micro.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    for seed in (0, 1):
        model = small_model(
            dtype=torch.float32, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=2048, num_hidden_layers=5
        )
        model.save_pretrained(root / f"step{seed}")
        tokenizer.save_pretrained(root / f"step{seed}")
    data.save_records(data.generate(8, split="test", seed=0), root / "records.jsonl")
    with (root / "ratings.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["sentence", "mental", "place"])
        lines.writerows((f"Mia thinks of {n} keys", n % 4, n) for n in range(8))
    return root


def test_all_parts_write_numbers_figures_and_one_page(folders, tmp_path, capsys):
    arguments = ["route", str(folders / "step0"), "--data", str(folders / "records.jsonl"), "--draws", "50"]
    arguments += ["--against", str(folders / "step1"), "--similarity", "--ratings", str(folders / "ratings.csv")]
    assert cli.run([*arguments, "--json", "--samples", "6", "-o", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["samples"] == 6 and printed["settings"]["samples_given"] == 8
    assert printed["layers_counted"] == [2] and printed["settings"]["layers_excluded"] == [0, 1, 3, 4]
    assert printed["agreement"]["checkpoints"] == ["step0", "step1"] and len(printed["agreement"]["nulls"]) == 2
    assert printed["similarity"]["sentences"] == 8  # those of the ratings
    assert printed["selectivity"]["ratings"] == ["mental", "place"]
    names = {"routing", "agreement", "similarity", "selectivity"}
    for name in names:
        for suffix in ("json", "csv", "png", "svg"):
            assert (tmp_path / f"{name}.{suffix}").stat().st_size > 0, name
        assert json.loads((tmp_path / f"{name}.json").read_text())["settings"]["model"].endswith("step0")
    for figure in ("routing_layers", "routing_groups", "routing_maps", "routing_flow"):
        assert (tmp_path / f"{figure}.png").is_file()
    page = (tmp_path / "routing.html").read_text()
    for heading in ("Usage", "Agreement of checkpoints", "Similarity", "Selectivity", "Tokens"):
        assert f">{heading}" in page
    assert "one line per layer" in page and "Without layers 0, 1, 3, 4." in page
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_ratings_need_no_other_data_and_the_table_is_printed(folders, tmp_path, capsys):
    arguments = ["route", str(folders / "step0"), "--ratings", str(folders / "ratings.csv"), "--draws", "20"]
    assert cli.run([*arguments, "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "p Holm" in out and "selectivity.json" in out and not (tmp_path / "routing.json").exists()


def test_groups_come_from_any_field():
    records = data.generate(4, split="test", seed=0)
    assert _groups(records, None) is None
    assert _groups(records, "assistant") == [r.assistant for r in records]
    with pytest.raises(ValueError, match="record 0 has no field 'colour'; it has"):
        _groups(records, "colour")


def test_checkpoints_called_alike_have_their_whole_paths():
    assert _checkpoint_names([Path("a/step1"), Path("b/step1"), Path("b/step2")], ["x"]) == [
        "a/step1", "b/step1", "step2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--text", "a b", "--group-by", "dataset"], "--group-by needs --data"),
        (["--ratings", "RATINGS", "--against", "x"], "--against needs --data or --text"),
        (["--text", "a b", "--against", "FOLDER"], "given twice"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(folders, tmp_path, capsys, arguments, reason):
    named = {"RATINGS": str(folders / "ratings.csv"), "FOLDER": str(folders / "step0")}
    given = [named.get(a, a) for a in arguments]
    assert cli.run(["route", str(folders / "step0"), *given, "-o", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
