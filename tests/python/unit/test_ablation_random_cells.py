"""Ablated sets against as many random cells: what is special about an expert shows, what any cells do does not."""

import numpy as np
import pytest
from planted_suites import Planted, model

from micro import analysis
from micro.analysis import random_cells
from micro.experts import NAMES


def whole(gone, record):
    return 1.0 * gone[:, 0].all() + 0.3 * gone[:, 1].any()  # any one cell of social costs as much as all of them


def test_an_expert_that_matters_as_a_whole_beats_random_cells_and_one_that_does_not_does_not():
    suite = Planted(whole, layers=6)
    lines = {line["ablated"]: line for line in random_cells(model(layers=6), suite, draws=40)}
    assert lines["logic"]["harm"] == 1 and lines["logic"]["p"] == pytest.approx(1 / 41)
    assert lines["logic"]["low"] > 0.6
    assert lines["social"]["harm"] == pytest.approx(0.3) and lines["social"]["p"] > 0.5
    assert lines["world"]["p"] == 1
    draws = [call["ablate"] for call in suite.calls if isinstance(call.get("ablate"), dict)]
    assert len(draws) == 40
    assert all(sorted(draw) == list(range(6)) and all(len(v) == 1 for v in draw.values()) for draw in draws)
    used = {name for draw in draws for names in draw.values() for name in names}
    assert used == set(NAMES)
    with pytest.raises(ValueError, match="at least 20"):
        random_cells(model(), suite, draws=19)


def test_sets_are_matched_in_the_number_of_experts_per_layer():
    suite = Planted(whole, layers=6)
    sets = ["logic", ["logic", "world"], ["social", "language"]]
    lines = random_cells(model(layers=6), suite, sets, draws=20, bootstrap_draws=50)
    assert [line["ablated"] for line in lines] == ["logic", "logic+world", "social+language"]
    sizes = [
        {len(set(names)) for names in call["ablate"].values()}
        for call in suite.calls
        if isinstance(call.get("ablate"), dict)
    ]
    assert sizes == [{1}] * 20 + [{2}] * 20  # two sets of two share their control
    assert lines[1]["random_mean"] == lines[2]["random_mean"]


def cells_of_noise(seed, records=25, excess=0.0):
    """Every cell costs each record something of its own; the cells of world cost more by ``excess`` in all."""
    noise = np.random.default_rng(seed).normal(0.1, 0.3, size=(records, 5, 4))

    def function(gone, record):
        return (noise[record] * gone).sum() + excess * gone[:, 2].mean()

    return Planted(function, records=records, layers=5)


@pytest.mark.parametrize("excess", [0.0, 0.8])
def test_the_interval_covers_what_is_planted(excess):
    covered = above = 0
    for seed in range(40):
        suite = cells_of_noise(seed, excess=excess)
        [line] = random_cells(model(layers=5), suite, ["world"], draws=20, bootstrap_draws=300, seed=seed)
        truth = 0.75 * excess  # a random set has a quarter of world's cells
        covered += line["low"] <= truth <= line["high"]
        above += line["low"] > 0
        assert line["excess"] == pytest.approx(line["harm"] - line["random_mean"])
    assert covered >= 33  # 38 expected
    assert above <= 5 if excess == 0 else above >= 33


def test_an_ablation_carries_its_control(tmp_path):
    suite = Planted(whole, layers=6)
    report = analysis.ablation(model(layers=6), suite, ["logic", "social"], random_draws=20, draws=50)
    assert [line["ablated"] for line in report.random] == ["logic", "social"]
    assert report.settings["random_draws"] == 20
    report.save(tmp_path)
    assert (tmp_path / "ablation_random.csv").is_file()
    assert analysis.AblationReport.load(tmp_path) == report
    assert list(report.random_table()["excess"]) == [line["excess"] for line in report.random]
    assert analysis.ablation(model(layers=6), suite, ["logic"], draws=50).random == []
    suite.calls.clear()
    with pytest.raises(ValueError, match="at least 20"):
        analysis.ablation(model(layers=6), suite, random_draws=3)
    assert not suite.calls


def test_harm_that_adds_up_over_its_own_cells_shows_as_the_share_that_the_docstring_tells():
    suite = Planted(lambda gone, record: gone[:, 0].mean(), layers=6)
    lines = random_cells(model(layers=6), suite, ["logic", ["logic", "world"]], draws=400, bootstrap_draws=20)
    assert [line["harm"] for line in lines] == pytest.approx([1, 1])
    assert [line["excess"] for line in lines] == pytest.approx([0.75, 0.5], abs=0.03)
