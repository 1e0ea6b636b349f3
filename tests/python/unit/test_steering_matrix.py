import numpy as np
import pytest
from matplotlib.figure import Figure
from small_models import small_config, small_model

import micro
from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.steering.bias import bias_curves
from micro.analysis.steering.matrix import (
    SteeringReport,
    specificity,
    steered_outputs,
    steering_matrix,
    steering_sets,
)
from micro.data import generate
from micro.experts import NAMES
from micro.testing.tokenizers import tiny_tokenizer


class PlantedSuite:
    """Losses that fall by ``effect`` on the row whose expert stays, if some other expert goes; noise per record."""

    task, higher_is_better, unit = "loss", False, "nats per token"

    def __init__(self, effect, records=40, seed=0):
        self.names = list(NAMES)
        generator = np.random.default_rng(seed)
        self.records, self.effect = records, effect
        self.base = 2 + generator.normal(size=(records, 4))
        self.noise = generator.normal(size=(16, records, 4)) * 0.3

    def score(self, model, controls):
        ablated = controls.get("ablate") or []
        losses = self.base.copy()
        if isinstance(ablated, dict):  # a random cell set: the share of layers in which an expert stays
            stays = [np.mean([e not in cells for cells in ablated.values()]) for e in range(4)]
            losses -= self.effect * (np.array(stays) == 1)
        elif ablated:
            gone = [NAMES.index(name) for name in ablated]
            stays = np.array([e not in gone and e != 3 for e in range(4)])
            losses += self.noise[sum(2**e for e in gone)] - self.effect * stays
        return losses * 10, np.full_like(losses, 10)


def test_the_sets_are_those_of_the_released_scripts():
    assert steering_sets(small_config()) == {
        "logic": ["social", "world"],
        "social": ["logic", "world"],
        "world": ["logic", "social"],
        "language": ["logic", "social", "world"],
    }
    assert steering_sets(small_config(num_experts=2))["expert_1"] == ["expert_0"]


def test_a_planted_effect_is_found_with_its_size_and_sign():
    model = small_model(num_hidden_layers=12)
    report = steering_matrix(model, PlantedSuite(0.5), draws=2000, random_sets=19)
    assert report.sets == list(NAMES)
    for r, c in np.ndindex(4, 4):
        planted = 0.5 if r == c and r < 3 else 0.0
        low, high = report.interval[r][c]
        assert report.change[r][c] == pytest.approx(planted, abs=0.2)
        assert low < report.change[r][c] < high
        assert (report.p_holm[r][c] < 0.01) == (planted > 0)
        if planted:
            assert report.random_p[r][c] == 1 / 20
            assert report.random_high[r][c] == 0
    assert report.index == pytest.approx(0.375, abs=0.15)
    assert report.index_p == 1 / 24


def test_the_intervals_and_corrected_tests_hold_their_level_without_an_effect():
    model = small_model()
    found = covered = 0
    for seed in range(40):
        report = steering_matrix(model, PlantedSuite(0.0, seed=seed), draws=400, random_sets=0, seed=seed)
        found += bool(np.min(report.p_holm) < 0.05)
        interval = np.array(report.interval)
        covered += ((interval[..., 0] <= 0) & (interval[..., 1] >= 0)).mean()
    assert found <= 6
    assert 0.9 < covered / 40 < 0.99


def test_specificity_is_the_own_set_against_the_others():
    change = np.eye(3) * 2.0
    assert specificity(["a", "b", "c"], ["a", "b", "c"], change) == (2.0, pytest.approx(1 / 6))
    assert specificity(["c", "b", "a"], ["a", "b", "c"], change[::-1]) == (2.0, pytest.approx(1 / 6))
    assert specificity(["a", "x"], ["a", "b"], np.zeros((2, 2))) == (None, None)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def records():
    return generate(6, split="test", seed=3)


def tiny(tokenizer, **fields):
    return small_model(vocab_size=len(tokenizer), max_position_embeddings=512, **fields)


def test_equal_experts_cannot_be_steered(tokenizer, records):
    import torch

    model = tiny(tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name:
                parameter.copy_(parameter[:1].clone().expand_as(parameter))
    report = steering_matrix(model, micro.analysis.LossSuite(records, tokenizer), draws=100, random_sets=2)
    assert np.abs(report.change).max() < 1e-9
    assert report.records == 6
    curves = bias_curves(model, tokenizer, records, values=[-3, 3], experts=["world"], draws=50)
    assert np.nanmax(np.abs(np.array(curves[0]["change"], float))) < 1e-9


def test_change_of_a_loss_is_the_change_of_log_likelihood(tokenizer, records):
    model = tiny(tokenizer)
    suite = micro.analysis.LossSuite(records, tokenizer)
    report = steering_matrix(model, suite, draws=50, random_sets=1)
    sums = [suite.score(model, c)[0].sum(0) for c in ({}, {"ablate": ["social", "world"]})]
    counts = suite.score(model, {})[1].sum(0)
    assert np.array(report.change)[:, 0] == pytest.approx((sums[0] - sums[1]) / counts, abs=1e-9)
    assert report.score == pytest.approx(sums[0] / counts)


def test_answers_under_each_set_are_those_of_generate(tokenizer):
    model = tiny(tokenizer).float()
    out = steered_outputs(model, tokenizer, ["Two and two?", "Why?"], max_new_tokens=6)
    assert [list(line) for line in out] == [["prompt", "unsteered", *NAMES]] * 2
    turns = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, ablate=["logic", "world"])
    assert out[1]["social"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_a_report_is_saved_loaded_and_drawn(tmp_path, tokenizer, records):
    report = steering_matrix(small_model(), PlantedSuite(0.5), draws=100, random_sets=2)
    report.curves = bias_curves(tiny(tokenizer), tokenizer, records[:2], values=[-1, 1], draws=20)
    report.outputs = [{"prompt": "a", "unsteered": "b", **dict.fromkeys(NAMES, "c")}]
    report.save(tmp_path)
    again = SteeringReport.load(tmp_path)
    assert again.change == report.change
    assert isinstance(again.plot(), Figure)
    assert len(again.table()) == 16
    assert "own set against the others" in str(again)


class ShareSuite:
    """Half of the answers are right without steering, a quarter under any."""

    task, higher_is_better, names, records = "quiz", True, ["all"], 8

    def score(self, model, controls):
        return np.full((8, 1), 1.0 if controls else 2.0), np.full((8, 1), 4.0)


def test_changes_of_shares_are_points():
    report = steering_matrix(small_model(), ShareSuite(), draws=19, random_sets=1)
    assert (report.unit, report.score, report.change) == ("points", [0.5], [[-25.0] * 4])
    assert "change, points" in str(report)
    assert report.plot().axes[0].get_title() == "Change of share correct, points"


def test_a_stopped_run_goes_on_from_the_scores_on_disk(tmp_path, tokenizer, records):
    model, suite = tiny(tokenizer), micro.analysis.LossSuite(records, tokenizer)
    given = {"draws": 20, "random_sets": 2, "store": ScoreStore(tmp_path)}
    first = steering_matrix(model, suite, **given)
    files = sorted(tmp_path.iterdir())
    files[0].unlink()
    calls, score_many = [], suite.score_many

    def counted(model, conditions):
        calls.append(len(conditions))
        return score_many(model, conditions)

    suite.score_many = counted
    given["store"] = ScoreStore(tmp_path)
    assert np.array(steering_matrix(model, suite, **given).change) == pytest.approx(np.array(first.change), abs=1e-12)
    assert calls == [1]
    assert sorted(tmp_path.iterdir()) == files


def test_bad_sets_are_refused(tokenizer, records):
    model = small_model()
    with pytest.raises(ValueError, match="ablates all 4 experts"):
        steering_matrix(model, PlantedSuite(0), {"x": NAMES})
    with pytest.raises(ValueError, match="unknown expert 'maths'"):
        steering_matrix(model, PlantedSuite(0), {"x": ["maths"]})
    with pytest.raises(ValueError, match="none 'unsteered'"):
        steering_matrix(model, PlantedSuite(0), {"unsteered": []})
    with pytest.raises(ValueError, match="controls: keep is what the sets are for"):
        steering_matrix(model, PlantedSuite(0), controls={"keep": "logic"})
    other = PlantedSuite(0)
    other.unit = "share correct"
    with pytest.raises(ValueError, match="different units"):
        steering_matrix(model, [PlantedSuite(0), other])
