"""Cell maps on planted tasks: planted cells are found, nothing is found in noise, controls tell whole from random."""

import itertools
import json

import numpy as np
import pytest
from planted_suites import Planted, model

from micro.analysis.ablations.cells import CellReport, cell_map, few_per_domain
from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.ablations.statistics import sign_flip_p
from micro.data import generate
from micro.experts import NAMES


def planted(seed=0, records=20, **attributes):
    """Losses with noise of their own per cell and record; (1, social) and (2, logic) cost half a nat more."""
    noise = np.random.default_rng(seed).normal(0, 0.2, size=(records, 3, 4))

    def function(gone, record):
        return 2 + (noise[record] * gone).sum() + 0.5 * gone[1, 1] + 0.5 * gone[2, 0]

    return Planted(function, records=records, **attributes)


def test_planted_cells_are_found_and_no_others():
    report = cell_map(model(), planted(), random_draws=0)
    found = {(l, NAMES[e]) for l, e in np.argwhere(np.asarray(report.q[0]) <= 0.05)}
    assert found == {(1, "social"), (2, "logic")}
    assert report.rise[0][1][1] == pytest.approx(0.5, abs=0.2)
    assert {(x["layer"], x["expert"]) for x in report.table().head(2).to_dict("records")} == found
    [control] = report.held_out
    assert (control["layer"], control["expert"]) in found
    assert control["harm_held_out"] > 0.3 > abs(control["mean_of_other_cells"])
    assert "2 of 12 cells" in str(report)


def test_in_noise_nothing_is_found_more_often_than_the_rate():
    hits = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(size=(12, 3, 4))
        suite = Planted(lambda gone, record, x=noise: (x[record] * gone).sum(), records=12)
        hits += bool((np.asarray(cell_map(model(), suite, random_draws=0).q) <= 0.05).any())
    assert hits <= 8  # 3 expected; three standard errors


def test_for_shares_a_fall_is_harm_and_changes_are_points():
    suite = Planted(lambda gone, record: record < 12 - 8 * gone[0, 3], records=20, higher_is_better=True)
    report = cell_map(model(), suite, random_draws=0)
    assert report.units == ["points"] and report.rise[0][0][3] == pytest.approx(-40)
    assert report.held_out[0]["expert"] == "language" and report.held_out[0]["harm_held_out"] > 0
    assert np.count_nonzero(report.rise[0]) == 1
    assert np.asarray(report.p)[0][report.rise[0] == np.zeros((3, 4))].tolist() == [1.0] * 11


def test_a_control_of_few_draws_is_refused_before_anything_is_scored():
    suite = planted()
    with pytest.raises(ValueError, match="at least 20"):
        cell_map(model(), suite, random_draws=19)
    assert not suite.calls


def test_signs_of_records_are_flipped_exactly_and_at_random():
    generator = np.random.default_rng(2)
    few = generator.normal(0.4, 1, size=(9, 2))
    patterns = np.array(list(itertools.product([-1, 1], repeat=9)))
    want = (np.abs(patterns @ few) >= np.abs(few.sum(0)) * (1 - 1e-12)).mean(0)
    assert sign_flip_p(few) == pytest.approx(want)
    many = generator.normal(0.2, 1, size=(60, 2))
    from scipy.stats import ttest_1samp

    assert sign_flip_p(many) == pytest.approx(ttest_1samp(many, 0).pvalue, rel=0.1, abs=0.003)
    assert sign_flip_p(np.zeros((30, 1)))[0] == 1
    assert sign_flip_p(np.ones((16, 1)))[0] < 3e-4
    assert sign_flip_p(np.ones((3, 1)))[0] == 0.25  # three records can say no more


def test_p_values_are_uniform_where_nothing_is_planted():
    p = sign_flip_p(np.random.default_rng(7).standard_t(3, size=(20, 2000)), draws=2000)
    for level in (0.01, 0.05, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * (level * (1 - level) / 2000) ** 0.5 + 1e-3)


def test_a_map_that_was_stopped_goes_on(tmp_path):
    suite = planted(fingerprint="v1")
    one = model()
    original, calls = suite.score, []

    def stops(model, controls):
        calls.append(controls)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(model, controls)

    suite.score = stops
    with pytest.raises(KeyboardInterrupt):
        cell_map(one, suite, random_draws=0, store=ScoreStore(tmp_path))
    assert len(list(tmp_path.glob("*.npz"))) == 6
    report = cell_map(one, suite, random_draws=0, store=ScoreStore(tmp_path))
    assert len(calls) == 7 + 7  # 13 conditions, one of them tried twice
    assert report == cell_map(one, planted(fingerprint="other"), random_draws=0)


def test_a_report_reads_back_and_draws_itself(tmp_path):
    report = cell_map(model(), planted(), random_draws=20)
    report.save(tmp_path)
    assert CellReport.load(tmp_path) == report
    assert json.loads((tmp_path / "cells.json").read_text())["settings"]["random_draws"] == 20
    assert len(report.whole) == 4 and "random_mean" in str(report)
    assert len(report.plot().axes) == 2  # the map and its scale


def test_few_records_of_each_domain():
    records = generate(60, split="test", seed=1)
    few = few_per_domain(records, 3)
    assert few == [r for r in records if r in few] and len(few) == 12
    assert few_per_domain(records, 1000) == records
