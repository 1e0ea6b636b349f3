"""Correlation of routes and ratings: planted, absent, and against SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import small_model

from micro.analysis.routes.selectivity_report import SelectivityReport, correlations, read_ratings, selectivity
from micro.testing import tiny_tokenizer

WORDS = ("sad glad thinks knows hopes fears", "stone river iron copper engine ladder")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_correlation_and_p_are_scipys():
    generator = np.random.default_rng(0)
    values = generator.dirichlet(np.ones(4), size=60)
    rated = np.stack([values[:, 1] + 0.4 * generator.normal(size=60), generator.normal(size=60)], 1)
    got = correlations(values, rated, permutations=4000, draws=800)
    for e in range(4):
        for k in range(2):
            want = stats.pearsonr(values[:, e], rated[:, k])
            assert got["correlation"][e, k] == pytest.approx(want.statistic)
            assert got["p"][e, k] == pytest.approx(want.pvalue, abs=0.03)
            low, high = want.confidence_interval()
            assert got["interval"][e, k] == pytest.approx([low, high], abs=0.12)


def test_the_planted_pair_alone_survives_correction():
    generator = np.random.default_rng(1)
    values = generator.normal(size=(200, 4))
    rated = generator.normal(size=(200, 5))
    rated[:, 2] = 0.7 * values[:, 1] + np.sqrt(1 - 0.49) * rated[:, 2]
    got = correlations(values, rated, permutations=2000, draws=100)
    assert got["correlation"][1, 2] == pytest.approx(0.7, abs=0.08)
    assert np.argwhere(got["p_holm"] <= 0.05).tolist() == [[1, 2]]


def test_noise_is_found_as_often_as_the_level_says():
    found = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        got = correlations(generator.normal(size=(30, 4)), generator.normal(size=(30, 2)), permutations=399, draws=2)
        found += bool((got["p_holm"] <= 0.05).any())
    assert found <= 5 + 2 * np.sqrt(100 * 0.05 * 0.95)


def test_missing_ratings_leave_out_a_sentence_and_constants_have_no_correlation():
    values = np.array([[0.1, 0.5], [0.2, 0.5], [0.6, 0.5], [0.9, 0.5]])
    rated = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, 1.0], [3.0, 1.0]])
    got = correlations(values, rated, permutations=50, draws=20)
    assert got["correlation"][0, 0] == pytest.approx(np.corrcoef([0.1, 0.2, 0.9], [1, 2, 3])[0, 1])
    assert np.isnan(got["correlation"][1]).all() and np.isnan(got["p"][1]).all()
    assert np.isnan(got["p_holm"][:, 1]).all()  # two sentences are too few


def test_lines_of_several_raters_are_averaged(tmp_path):
    table = tmp_path / "ratings.csv"
    table.write_text("sentence,mental,place\nA b.,1,5\nC d.,2,\nA b.,3,5\nE f.,4,1\n", encoding="utf-8")
    sentences, names, rated = read_ratings(table)
    assert sentences == ["A b.", "C d.", "E f."] and names == ["mental", "place"]
    np.testing.assert_array_equal(rated, [[2, 5], [2, np.nan], [4, 1]])


@pytest.mark.parametrize(
    "table, reason",
    [
        ({"text": ["a"]}, "no column 'sentence'"),
        ({"sentence": ["a", "b", "c"]}, "no rating"),
        ({"sentence": ["a", "b", "c"], "x": ["1", "two", "3"]}, "'x' holds something that is no number"),
        ({"sentence": ["a", "b"], "x": [1, 2]}, "at least three"),
        ({"sentence": ["a", None, "c"], "x": [1, 2, 3]}, "line 3 has no sentence"),
    ],
)
def test_bad_tables_are_refused(table, reason):
    with pytest.raises(ValueError, match=reason):
        read_ratings(table)


def test_a_router_that_reads_words_is_found(tokenizer, tmp_path):
    """The routers read the word lists themselves, so that the social share follows the rating."""
    generator = np.random.default_rng(2)
    lists = [line.split() for line in WORDS]
    shares = generator.integers(0, 7, size=30)
    sentences = [
        " ".join([*generator.choice(lists[0], n), *generator.choice(lists[1], 6 - n)]) + f" {i}"
        for i, n in enumerate(shares)
    ]
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer))
    ids = [tokenizer(" ".join(line), add_special_tokens=False)["input_ids"] for line in lists]
    mental = sorted(set(ids[0]) - set(ids[1]))
    with torch.no_grad():  # one direction of the embedding says "mental word", and the routers read it alone
        model.model.embed_tokens.weight[:, 0] = -4.0
        model.model.embed_tokens.weight[mental, 0] = 4.0
        for layer in model.model.layers:
            layer.router.in_proj.weight.copy_(torch.eye(32))
            layer.router.out_proj.weight.zero_()
            layer.router.out_proj.weight[1, 0] = 10.0
            layer.blocks.o_proj.weight.mul_(0.01)
            layer.blocks.down_proj.weight.mul_(0.01)
    table = {"sentence": sentences, "mental": shares.astype(float), "noise": generator.normal(size=30)}
    report = selectivity(model, tokenizer, table, permutations=500, draws=50)
    line = report.table().set_index(["measure", "expert", "rating"])
    for measure in ("share", "probability"):
        assert line.loc[(measure, "social", "mental"), "r"] > 0.9
        assert line.loc[(measure, "social", "mental"), "p Holm"] <= 0.05
        assert line.loc[(measure, "social", "noise"), "p Holm"] > 0.05
    assert report.layers == [0, 1] and report.settings["tokens"] == "sentence"
    report.save(tmp_path)
    assert SelectivityReport.load(tmp_path) == report
    assert len(report.plot().axes) == 2
