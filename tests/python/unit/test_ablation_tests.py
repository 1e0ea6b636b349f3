"""The published test and the paired ones against SciPy and counts by hand."""

import numpy as np
import pytest
from scipy import stats

from micro.analysis.ablations.published_tests import (
    PUBLISHED_ITEMS,
    average,
    mcnemar,
    published_average,
    published_welch,
    stars,
)


def test_the_published_test_is_welch_from_summaries():
    generator = np.random.default_rng(0)
    for _ in range(50):
        m1, m2 = generator.normal(size=2)
        s1, s2 = generator.uniform(0.001, 0.5, size=2)
        n1, n2 = generator.integers(2, 5000, size=2)
        want = stats.ttest_ind_from_stats(m1, s1 * n1**0.5, n1, m2, s2 * n2**0.5, n2, equal_var=False)
        got = published_welch(m1, s1, n1, m2, s2, n2)
        assert got.t == pytest.approx(want.statistic, rel=1e-12)
        assert got.p == pytest.approx(want.pvalue, rel=1e-9, abs=1e-300)
        assert got.se == pytest.approx(np.hypot(s1, s2))


def test_degrees_of_freedom_by_hand_and_tiny_errors_do_not_vanish():
    # equal errors and sizes: nu = 2 (n - 1)
    assert published_welch(0.3, 0.01, 101, 0.2, 0.01, 101).df == pytest.approx(200)
    assert published_welch(1.0, 1e-90, 11, 0.0, 1e-90, 11).df == pytest.approx(20)


def test_a_published_row_gets_its_stars():
    """MMLU of the 1B model with and without Social: 31.20 +- 0.39 and 31.53 +- 0.39 (model.md 10) do not differ."""
    n = PUBLISHED_ITEMS["mmlu"]
    row = published_welch([31.53, 33.53], 0.39, n, 31.20, 0.39, n)
    assert row.difference == pytest.approx([0.33, 2.33])
    assert row.se == pytest.approx([0.5515, 0.5515], abs=1e-4)
    assert [stars(p) for p in row.p] == ["", "****"]


@pytest.mark.parametrize(
    ("p", "mark"), [(0.051, ""), (0.05, "*"), (0.01, "**"), (0.001, "***"), (0.0001, "****"), (0, "****"), (np.nan, "")]
)
def test_stars(p, mark):
    assert stars(p) == mark


def test_both_averages():
    items = list(PUBLISHED_ITEMS.values())
    means, errors = [10.0, 20.0, 30.0, 40.0, 50.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert published_average(means, errors, items) == (30.0, 3.0, 5609.0)
    ours = average(means, errors, items)
    assert ours.mean == 30 and ours.se == pytest.approx(55**0.5 / 5) and ours.n == sum(items)
    assert ours.se < published_average(means, errors, items).se
    with pytest.raises(ValueError, match="one mean"):
        average([1.0], [1.0, 2.0], [3.0])


def test_equal_scores_without_error_have_no_test():
    row = published_welch(1.0, 0.0, 5, 1.0, 0.0, 5)
    assert np.isnan(row.t) and np.isnan(row.p) and stars(float(row.p)) == ""


def test_bad_summaries_are_refused():
    with pytest.raises(ValueError, match="negative"):
        published_welch(1, -1, 5, 1, 1, 5)
    with pytest.raises(ValueError, match="2 items"):
        published_welch(1, 1, 1, 1, 1, 5)


def test_mcnemar_counts_what_changed():
    before = [1] * 9 + [0] * 1 + [1] * 50 + [0] * 40
    after = [0] * 9 + [1] * 1 + [1] * 50 + [0] * 40
    assert mcnemar(before, after) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(after, before) == mcnemar(before, after)
    assert mcnemar(before, before) == 1.0
    from statsmodels.stats.contingency_tables import mcnemar as theirs

    assert mcnemar(before, after) == pytest.approx(theirs([[50, 9], [1, 40]], exact=True).pvalue)


def test_mcnemar_refuses_other_scores():
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5, 1], [0, 1])
    with pytest.raises(ValueError, match=r"\[items\]"):
        mcnemar([0, 1], [0, 1, 1])
