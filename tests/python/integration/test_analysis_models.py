"""Analyses on small models whose answer is known, and the commands over them."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import micro
from micro import analysis, data
from micro.analysis.batches import batches, encoded, shifted, token_losses
from micro.analysis.routes.views import record_view
from micro.cli import main as cli
from micro.experts import NAMES
from micro.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def records():
    return data.generate(6, split="test", seed=3)


@pytest.fixture(scope="module")
def dense(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(dense):
    return micro.upcycle(dense, verify=False).eval()


@pytest.fixture(scope="module")
def different(dense):
    """Experts that differ: each has another scale of its FFN."""
    model = micro.upcycle(dense, verify=False).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.blocks.down_proj.weight.mul_(torch.tensor([0.0, 1.0, 4.0, 9.0]).view(4, 1, 1))
    return model


def test_everything_forced_to_one_expert_is_used_by_it_alone(model, tokenizer, records):
    report = analysis.routing(model, tokenizer, records, controls={"force": "world"})
    assert report.usage == [0, 0, 1, 0]
    assert report.decision_entropy == [0, 0]
    assert report.accuracy == 0.25  # the world tokens are right, balanced over four labels
    assert [row[2] for row in report.confusion[0]] == [1, 1, 1, 1]


def test_routing_by_labels_is_perfect(model, tokenizer, records, monkeypatch):
    by_label = []
    original = type(model.model).forward

    def forward(self, *args, **kwargs):
        kwargs["routing_labels"] = by_label[-1]
        return original(self, *args, **kwargs)

    rows = encoded(records, tokenizer)
    (_, batch), *more = batches(rows, tokenizer, max_tokens=10**6)
    assert not more
    by_label.append(batch["routing_labels"])
    monkeypatch.setattr(type(model.model), "forward", forward)
    report = analysis.routing(model, tokenizer, records, max_tokens=10**6)
    assert report.accuracy == 1
    assert report.accuracy_interval == [1, 1]


def test_splitting_into_batches_changes_nothing(different, tokenizer, records):
    one = analysis.routing(different, tokenizer, records, max_tokens=10**6)
    many = analysis.routing(different, tokenizer, records, max_tokens=1)
    assert one.confusion == many.confusion
    assert one.usage == pytest.approx(many.usage)


def test_token_losses_add_up_to_the_models_loss(different, tokenizer, records):
    _, batch = next(batches(encoded(records, tokenizer), tokenizer, max_tokens=10**6))
    losses = token_losses(different, batch)
    with torch.no_grad():
        out = different(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"], use_cache=False
        )
    assert losses.sum() / (shifted(batch["labels"]) != -100).sum() == pytest.approx(out.loss.item(), rel=1e-5)


def test_equal_experts_can_be_ablated_without_loss(model, tokenizer, records):
    report = analysis.ablation(model, analysis.LossSuite(records, tokenizer))
    assert report.conditions == ["none", *NAMES]
    assert sorted(report.rows) == sorted(NAMES)
    assert max(abs(rise) for row in report.rise for rise in row) < 1e-5


def test_ablation_of_a_used_expert_moves_the_loss_and_sets_have_names(different, tokenizer, records):
    suite = analysis.LossSuite(records, tokenizer)
    report = analysis.ablation(different, suite, ["language", ["logic", "social"]])
    assert report.conditions == ["none", "language", "logic+social"]
    assert max(abs(row[2]) for row in report.rise) > 1e-4
    for rise, interval in zip(report.rise, report.rise_interval, strict=True):
        assert interval[0] == [0, 0] and interval[1][0] <= rise[1] <= interval[1][1]


def test_no_data_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="data is empty"):
        analysis.routing(model, tokenizer, [])
    with pytest.raises(ValueError, match="fewer than two tokens"):
        analysis.routing(model, tokenizer, ["a"])


def test_a_view_shows_answer_tokens_with_their_labels(model, tokenizer, records):
    view = record_view(model, tokenizer, records[0])
    assert view.probs.shape == (2, len(view.tokens), 4)
    answer = "".join(view.tokens[view.prompt_length :])
    assert answer.strip().startswith(records[0].assistant[:10])
    assert set(view.labels[: view.prompt_length]) == {-1}


def test_the_commands_write_what_report_joins(different, tokenizer, records, tmp_path, capsys):
    folder, file = tmp_path / "model", tmp_path / "records.jsonl"
    different.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.save_records(records, file)
    arguments = [str(folder), "--data", str(file)]
    assert cli.run(["route", *arguments, "-o", str(tmp_path / "out" / "route"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["samples"] == len(records)
    assert cli.run(["ablate", *arguments, "-o", str(tmp_path / "out" / "ablate"), "--set", "logic,social"]) == 0
    assert cli.run(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.index(">Routing</h2>") < page.index(">route</h3>") < page.index(">Ablation</h2>")
    written = {p.suffix for p in (tmp_path / "out" / "route").iterdir()}
    assert written == {".json", ".csv", ".npz", ".png", ".svg", ".html"}


def test_bad_input_of_the_commands_is_one_line_and_status_2(tmp_path, capsys):
    assert cli.run(["route", str(tmp_path)]) == 2
    assert "--data FILE" in capsys.readouterr().err
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "no saved results below it; run micro route" in capsys.readouterr().err
