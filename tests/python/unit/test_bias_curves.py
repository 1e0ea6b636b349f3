"""Graded bias: what it moves, and that a run that was stopped goes on with its own model's parts only."""

import numpy as np
import pytest
import torch
from small_models import small_model

from micro import analysis
from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.steering import bias
from micro.analysis.steering.bias import bias_curves
from micro.data import generate
from micro.testing.tokenizers import tiny_tokenizer

GIVEN = {"values": [-2, 0, 2], "experts": ["logic", "world"], "draws": 20}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def records():
    return generate(6, split="test", seed=3)


def tiny(tokenizer, **fields):
    return small_model(vocab_size=len(tokenizer), max_position_embeddings=512, **fields)


def test_bias_moves_probability_and_usage_up_and_zero_changes_nothing(tokenizer, records):
    model = tiny(tokenizer, num_hidden_layers=1)
    for curve in bias_curves(model, tokenizer, records, values=[-1e4, -4, -1, 0, 1, 4, 1e4], draws=50):
        for share in (curve["probability"], curve["usage"]):
            assert np.all(np.diff(share) >= 0)
            assert share[0] == 0
            assert share[-1] == 1
        assert np.nanmax(np.abs(np.array(curve["change"][3], float))) == 0
        assert np.nanmax(np.abs(np.array(curve["change"][0], float))) > 0


def test_bias_in_one_layer_only(tokenizer, records):
    model = tiny(tokenizer, num_hidden_layers=2)
    curve = bias_curves(model, tokenizer, records, values=[1e4], experts=["logic"], layers=[0], draws=10)[0]
    assert 0.5 <= curve["usage"][0] < 1


def test_texts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="labelled records, not texts"):
        bias_curves(tiny(tokenizer), tokenizer, ["one text", "another"])


# ---------------------------------------------------------------- resuming
@pytest.fixture
def measured(monkeypatch):
    """Controls of every setting that is measured; ``stop`` interrupts at that one."""
    calls = []
    original = bias._Answers.routed

    def routed(self, model, controls):
        if len(calls) == calls_until_stop[0]:
            calls_until_stop[0] = None
            raise KeyboardInterrupt
        calls.append(dict(controls))
        return original(self, model, controls)

    calls_until_stop = [None]
    monkeypatch.setattr(bias._Answers, "routed", routed)
    return calls, calls_until_stop


def test_a_stopped_run_goes_on_and_ends_with_the_same_curves(tmp_path, tokenizer, records, measured):
    calls, stop = measured
    model = tiny(tokenizer)
    whole = bias_curves(model, tokenizer, records, **GIVEN)
    assert len(calls) == 5  # no bias, and two values for each of two experts
    calls.clear()
    stop[0] = 3
    with pytest.raises(KeyboardInterrupt):
        bias_curves(model, tokenizer, records, store=ScoreStore(tmp_path), **GIVEN)
    assert len(list(tmp_path.glob("*.npz"))) == 2 * 3 and not list(tmp_path.glob(".*"))
    first = list(calls)
    assert bias_curves(model, tokenizer, records, store=ScoreStore(tmp_path), **GIVEN) == whole
    assert len(calls) == 5 and all(calls.count(controls) == 1 for controls in calls)
    assert calls[:3] == first
    calls.clear()
    assert bias_curves(model, tokenizer, records, store=ScoreStore(tmp_path), **GIVEN) == whole
    assert calls == []


def test_parts_of_another_model_or_of_other_records_are_not_taken(tmp_path, tokenizer, records, measured):
    calls, _ = measured
    model, other = tiny(tokenizer), tiny(tokenizer)
    with torch.no_grad():
        other.model.layers[1].blocks.down_proj.weight[-1, 0, 0].add_(0.5)  # one number
    bias_curves(model, tokenizer, records, store=ScoreStore(tmp_path), **GIVEN)
    calls.clear()
    found = bias_curves(other, tokenizer, records, store=ScoreStore(tmp_path), **GIVEN)
    assert len(calls) == 5
    assert found == bias_curves(other, tokenizer, records, **GIVEN)
    calls.clear()
    bias_curves(model, tokenizer, records[:5], store=ScoreStore(tmp_path), **GIVEN)
    assert len(calls) == 5
    calls.clear()
    bias_curves(model, tokenizer, records, layers=[0], store=ScoreStore(tmp_path), **GIVEN)
    assert len(calls) == 4  # no bias is no bias in any layer


def test_the_matrix_and_its_curves_share_a_folder(tmp_path, tokenizer, records, measured):
    calls, _ = measured
    model = tiny(tokenizer)
    suite = analysis.LossSuite(records, tokenizer)
    report = analysis.steering_matrix(model, suite, random_sets=1, draws=20, store=ScoreStore(tmp_path))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with_store = bias_curves(model, tokenizer, records, store=ScoreStore(tmp_path), **GIVEN)
    assert len(calls) == 5
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())
    alone = bias_curves(model, tokenizer, records, **GIVEN)
    for one, two in zip(with_store, alone, strict=True):
        assert one["usage"] == two["usage"]
        change = [np.array(curve["change"], float) for curve in (one, two)]
        assert np.allclose(*change, atol=1e-9, equal_nan=True)
    again = analysis.steering_matrix(model, suite, random_sets=1, draws=20, store=ScoreStore(tmp_path))
    assert again == report
