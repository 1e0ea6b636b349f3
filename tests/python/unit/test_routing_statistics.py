"""Statistics that all analyses share, against planted truth and against SciPy."""

import numpy as np
import pytest
from scipy import stats

from micro.analysis.statistics import (
    benjamini_hochberg,
    binomial_interval,
    hierarchical_bootstrap,
    hierarchical_draws,
    holm,
    interval,
    mean_interval,
    paired_bootstrap,
    permutation_p,
    weighted_correlation,
)


def weighted_mean(values):
    return lambda w: w @ values / w.sum(-1)


def test_the_interval_leaves_out_undefined_draws():
    values = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, np.nan]])
    low, high = interval(values, level=0.5)
    assert (low[0], high[0]) == (1.5, 2.5)
    assert np.isnan([low[1], high[1]]).all()
    with pytest.raises(ValueError, match="level"):
        interval(values, level=95)


def test_the_interval_of_means_is_that_of_their_standard_errors():
    values = np.random.default_rng(0).normal(size=(200, 3, 2)) * [[1], [5], [0]]
    low, high = mean_interval(values, draws=4000)
    assert low.shape == high.shape == (3, 2)
    assert high - low == pytest.approx(2 * 1.96 * values.std(0) / np.sqrt(200), rel=0.07)
    assert np.isnan(mean_interval(values[:1])).all()


def test_the_weighted_correlation_is_pearsons_of_repeated_rows():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(30, 3)) + 1e6, generator.normal(size=(30, 1))
    y[:, 0] += x[:, 1] - 1e6
    weights = generator.integers(0, 4, size=(5, 30)).astype(float)
    got = weighted_correlation(weights, x, y)
    for d, counts in enumerate(weights.astype(int)):
        want = [stats.pearsonr(np.repeat(x[:, e], counts), np.repeat(y[:, 0], counts)).statistic for e in range(3)]
        assert got[d] == pytest.approx(want)
    assert np.isnan(weighted_correlation(weights, np.ones((30, 1)), y)).all()


def test_the_binomial_interval_is_scipys_and_has_a_width_at_the_ends():
    counts = [(k, n) for n in (1, 4, 17, 300) for k in {0, 1, n // 3, n - 1, n}]
    low, high = binomial_interval([k for k, _ in counts], [n for _, n in counts])
    want = [stats.binomtest(k, n).proportion_ci(0.95, method="exact") for k, n in counts]
    assert low == pytest.approx([w.low for w in want], abs=1e-12)
    assert high == pytest.approx([w.high for w in want], abs=1e-12)
    low, high = binomial_interval(4, 4)
    assert (float(low), float(high)) == (pytest.approx(0.025**0.25), 1.0)
    assert np.isnan(binomial_interval([0, 1], [0, 2])).tolist() == [[True, False]] * 2
    narrow, wide = (np.ptp(binomial_interval(5, 9, level=level)) for level in (0.5, 0.99))
    assert narrow < wide


def test_a_paired_difference_is_found_where_an_unpaired_one_drowns():
    generator = np.random.default_rng(0)
    items = generator.normal(scale=10, size=60)
    a, b = items + 0.5 + 0.3 * generator.normal(size=60), items + 0.3 * generator.normal(size=60)
    got = paired_bootstrap(a, b)
    assert got.difference == pytest.approx((a - b).mean())
    assert got.low > 0 and got.p < 0.001 and got.items == 60
    assert stats.ttest_ind(a, b).pvalue > 0.5
    standard_error = (a - b).std() / np.sqrt(60)
    assert (got.high - got.low) / (2 * 1.96 * standard_error) == pytest.approx(1, abs=0.05)


def test_paired_p_values_are_even_under_the_null():
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(2, 80, 300))
    p = paired_bootstrap(a, b, draws=999).p
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.corrcoef(p, stats.ttest_rel(a, b).pvalue)[0, 1] > 0.99


def test_pairs_with_a_hole_are_left_out_and_columns_do_not_mix():
    a = np.array([[1.0, 5.0], [2.0, np.nan], [3.0, 7.0]])
    got = paired_bootstrap(a, np.zeros_like(a), draws=200)
    assert got.difference.tolist() == [2.0, 6.0]
    assert got.items.tolist() == [3, 2]
    alone = paired_bootstrap(a[:, 0], np.zeros(3), draws=200)
    assert (got.low[0], got.high[0], got.p[0]) == (alone.low, alone.high, alone.p)


def test_conditions_of_different_items_are_refused():
    with pytest.raises(ValueError, match=r"same items.*\[3\].*\[2\]"):
        paired_bootstrap(np.zeros(3), np.zeros(2))


def nested_data(generator, seeds=6, templates=8, items=10, spread=(1.0, 0.7, 0.5)):
    effects = [generator.normal(size=(seeds, *n)) * s for n, s in zip([(), (templates,), (templates, items)], spread,
                                                                      strict=True)]  # fmt: skip
    values = effects[0][:, None, None] + effects[1][:, :, None] + effects[2]
    labels = np.meshgrid(*map(np.arange, values.shape), indexing="ij")
    return values.ravel(), [x.ravel() for x in labels]


def test_nested_draws_keep_the_number_of_observations_and_average_to_one():
    _, levels = nested_data(np.random.default_rng(0))
    weights = hierarchical_draws(levels, lambda w: w, draws=4000)
    assert (weights.sum(1) == len(levels[0])).all()  # equal group sizes
    assert np.abs(weights.mean(0) - 1).max() < 0.15
    seeds = weights.reshape(-1, 6, 80).sum(2) / 80
    assert set(np.unique(seeds)) <= set(range(7))  # whole seeds are drawn


def test_the_hierarchical_interval_has_the_variance_of_its_levels():
    generator = np.random.default_rng(2)
    values, levels = nested_data(generator, seeds=40, templates=30, items=5)
    drawn = hierarchical_draws(levels, weighted_mean(values), draws=3000)
    table = values.reshape(40, 30, 5)
    expected = (  # each level adds the spread of its group means over the number of groups
        table.mean((1, 2)).var() / 40 + table.mean(2).var(1).mean() / (40 * 30) + table.var(2).mean() / (40 * 30 * 5)
    )
    assert drawn.var() == pytest.approx(expected, rel=0.1)


def test_the_hierarchical_interval_covers_where_pooling_items_does_not():
    generator = np.random.default_rng(3)
    covered = pooled = 0
    for seed in range(60):
        values, levels = nested_data(generator, seeds=12)
        low, high = hierarchical_bootstrap(levels, weighted_mean(values), draws=250, seed=seed)
        covered += low <= 0 <= high
        low, high = hierarchical_bootstrap([np.arange(len(values))], weighted_mean(values), draws=250, seed=seed)
        pooled += low <= 0 <= high
    assert covered / 60 > 0.85
    assert pooled / 60 < 0.5


def test_crossed_levels_share_their_draws():
    seed, template = (x.ravel() for x in np.meshgrid(np.arange(5), np.arange(7), indexing="ij"))
    weights = hierarchical_draws([seed, template], lambda w: w, crossed=True, draws=50).reshape(50, 5, 7)
    for w in weights:
        assert np.linalg.matrix_rank(w) <= 1 and w.sum() == 35
    shared = np.random.default_rng(4).normal(size=7)[template]  # templates alone matter, and all seeds share them
    widths = []
    for crossed in (True, False):
        low, high = hierarchical_bootstrap([seed, template], weighted_mean(shared), crossed=crossed, draws=2000)
        widths.append(high - low)
    assert widths[0] > 1.8 * widths[1]  # nested draws would divide the spread of templates by the seeds


@pytest.mark.parametrize("crossed", [True, False])
def test_templates_are_drawn_within_their_domain_and_seeds_across(crossed):
    shape = (4, 2, 5, 3)  # seed, domain, template of the domain, item
    seed, domain, template, item = (x.ravel() for x in np.meshgrid(*map(np.arange, shape), indexing="ij"))
    levels = [seed, domain * 100 + template, domain * 10000 + template * 100 + item]
    weights = hierarchical_draws(levels, lambda w: w, strata=domain, crossed=crossed, draws=40).reshape(40, *shape)
    per_domain = weights.sum((3, 4))
    assert (per_domain[..., 0] == per_domain[..., 1]).all()  # the same seeds in both domains, as many templates
    assert len(np.unique(weights.sum((2, 3, 4)))) > 1


def test_labels_may_be_strings_and_must_agree_in_length():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = hierarchical_bootstrap([["a", "a", "b", "b"]], weighted_mean(values), draws=500)
    assert (low, high) == (1.5, 3.5)
    with pytest.raises(ValueError, match="one length"):
        hierarchical_bootstrap([[1, 2], [1, 2, 3]], weighted_mean(values))


def test_pieces_of_draws_are_the_same_draws(monkeypatch):
    _, levels = nested_data(np.random.default_rng(0))
    whole = hierarchical_draws(levels, lambda w: w.std(1), draws=50)
    assert whole.shape == (50,)
    monkeypatch.setattr("micro.analysis.statistics.CHUNK_NUMBERS", 480 * 7)
    parts = hierarchical_draws(levels, lambda w: w.std(1), draws=50)
    assert parts.shape == (50,) and parts[:7].std() > 0


def test_corrections_by_hand():
    p = np.array([[0.01, 0.04], [0.03, np.nan]])
    np.testing.assert_allclose(holm(p), [[0.03, 0.06], [0.06, np.nan]])
    np.testing.assert_allclose(benjamini_hochberg(p), [[0.03, 0.04], [0.04, np.nan]])
    for method in (holm, benjamini_hochberg):
        assert np.isnan(method([np.nan, np.nan])).all()
        assert method([]).shape == (0,)
        with pytest.raises(ValueError, match=r"0\.\.1"):
            method([0.5, 1.5])


def test_corrections_agree_with_statsmodels():
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    p = np.random.default_rng(0).uniform(size=30) ** 4
    p[3] = p[7]  # ties
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], rtol=1e-12)


def test_corrections_hold_their_rates():
    generator = np.random.default_rng(5)
    families = generator.uniform(size=(400, 20))
    assert np.mean([(holm(p) <= 0.05).any() for p in families]) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    assert np.mean([(benjamini_hochberg(p) <= 0.05).any() for p in families]) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    assert np.mean([(families[i] <= 0.05).any() for i in range(400)]) > 0.5  # uncorrected, it would be common


def test_permutation_p_counts_draws_as_far_out():
    null = np.array([[-3.0, 0.0], [1.0, 0.0], [2.0, np.nan]])
    assert permutation_p([2.0, 1.0], null).tolist() == [2 / 4, 1 / 3]
    assert permutation_p(2.0, null[:, 0], alternative="two-sided") == 3 / 4
    assert permutation_p(-3.0, null[:, 0], alternative="less") == 2 / 4
    assert permutation_p(0.1 + 0.2, [0.3]) == 1  # equal but for rounding
    assert np.isnan(permutation_p(np.nan, [0.0]))
    with pytest.raises(ValueError, match="alternative"):
        permutation_p(1.0, [0.0], alternative="both")
    with pytest.raises(ValueError, match="one draw"):
        permutation_p(1.0, [])
