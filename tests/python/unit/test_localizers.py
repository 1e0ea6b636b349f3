import numpy as np
import pytest
import scipy.stats
import torch

from micro.analysis import localizer_mask, localizer_test
from micro.analysis.localizers import null_tests, random_masks, shuffled
from micro.analysis.localizers.statistics import BLOCK_VALUES, Moments, compare


def two_sets(units=(3, 5), positive=17, negative=23, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    spread = 1 + np.arange(np.prod(units)).reshape(units)
    return (
        offset + generator.normal(size=(positive, *units)) * spread + 0.7,
        offset + generator.normal(size=(negative, *units)) * 2,
    )


# ------------------------------------------------------------------ the test


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_it_is_scipys_welch_test_with_benjamini_hochberg(absolute, offset):
    a, b = two_sets(offset=offset)
    got = localizer_test(a, b, absolute=absolute)
    seen = (np.abs(a), np.abs(b)) if absolute else (a, b)
    want = scipy.stats.ttest_ind(*seen, equal_var=False)
    assert got.t.shape == got.p.shape == got.q.shape == (3, 5)
    np.testing.assert_allclose(got.t, want.statistic, rtol=1e-9 if offset == 0 else 1e-6)
    np.testing.assert_allclose(got.p, want.pvalue, rtol=1e-9 if offset == 0 else 1e-5)
    q = scipy.stats.false_discovery_control(want.pvalue.reshape(-1)).reshape(3, 5)
    np.testing.assert_allclose(got.q, q, rtol=1e-9 if offset == 0 else 1e-5)


def test_the_formula_by_hand():
    t, p, q = localizer_test([[1.0], [2.0], [3.0]], [[2.0], [2.0], [5.0], [7.0]])
    variance = 1.0 / 3 + 6.0 / 4
    freedom = variance**2 / ((1.0 / 3) ** 2 / 2 + (6.0 / 4) ** 2 / 3)
    assert t[0] == pytest.approx(-2 / np.sqrt(variance))
    assert p[0] == pytest.approx(2 * scipy.stats.t.sf(2 / np.sqrt(variance), freedom))
    assert q[0] == p[0]


def test_the_absolute_value_is_the_default():
    a, b = np.array([[-9.0], [9.5], [-10.0]]), np.array([[1.0], [-1.2], [0.8]])
    assert localizer_test(a, b).t[0] > 10 > abs(localizer_test(a, b, absolute=False).t[0])


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e8, 1e-300])
def test_a_unit_without_variance_has_t_zero_whatever_its_value(constant):
    a, b = two_sets((4,))
    a[:, 1] = b[:, 1] = constant  # one constant
    a[:, 2], b[:, 2] = constant, constant + 1  # two constants
    t, p, q = localizer_test(a, b)
    assert t[1] == t[2] == 0 and p[1] == p[2] == 1 and q[1] == q[2] == 1
    assert (t[[0, 3]] != 0).all()
    a[:, 3] = constant  # on one side only: an ordinary test with the other side's degrees of freedom
    got = localizer_test(a, b)
    side = np.abs(b[:, 3])
    want = scipy.stats.ttest_1samp(side, abs(constant))
    assert got.t[3] == pytest.approx(-want.statistic) and got.p[3] == pytest.approx(want.pvalue)


def test_units_without_variance_count_in_the_correction():
    a, b = two_sets((4,))
    alone = localizer_test(a, b)
    zeros = np.zeros((len(a), 4)), np.zeros((len(b), 4))
    among = localizer_test(np.concatenate([a, zeros[0]], 1), np.concatenate([b, zeros[1]], 1))
    np.testing.assert_array_equal(among.p[:4], alone.p)
    assert among.q[among.p.argmin()] == pytest.approx(min(1, 2 * alone.q[alone.p.argmin()]))


def test_a_missing_stimulus_drops_out_for_its_unit_alone():
    a, b = two_sets((4,))
    a[3:9, 1] = np.nan
    b[0, 1] = np.nan
    got = localizer_test(a, b)
    want = scipy.stats.ttest_ind(np.abs(a), np.abs(b), equal_var=False, nan_policy="omit")
    np.testing.assert_allclose(got.t, want.statistic, rtol=1e-9)
    np.testing.assert_allclose(got.p, want.pvalue, rtol=1e-9)


@pytest.mark.parametrize("n, m", [(2, 2), (2, 9), (9, 2)])
def test_two_stimuli_on_a_side_are_a_test(n, m):
    a, b = two_sets((6,), n, m)
    got, want = localizer_test(a, b), scipy.stats.ttest_ind(np.abs(a), np.abs(b), equal_var=False)
    np.testing.assert_allclose(got.t, want.statistic, rtol=1e-9)
    np.testing.assert_allclose(got.p, want.pvalue, rtol=1e-9)
    assert (localizer_test(a[:1], b).t == 0).all() and (localizer_test(a, b[:1]).p == 1).all()


@pytest.mark.parametrize("side", [0, 1])
def test_two_stimuli_are_no_test_for_a_unit_that_lost_some_on_either_side(side):
    sets = list(two_sets((3,), 2, 9)) if side else list(two_sets((3,), 9, 2))
    whole = localizer_test(*sets).t
    sets[side][4, 1] = np.nan
    t = localizer_test(*sets).t
    assert t[1] == 0
    np.testing.assert_array_equal(t[[0, 2]], whole[[0, 2]])


def test_fewer_than_three_of_the_stimuli_that_are_left_are_no_test():
    a, b = two_sets((5,))
    a[2:, 1] = np.nan  # two are left
    a[3:, 2] = np.nan  # three
    b[:, 3] = np.nan  # none
    t, p, q = localizer_test(a, b)
    assert t[1] == t[3] == 0 and p[1] == p[3] == q[1] == q[3] == 1
    assert t[2] != 0 and p[2] < 1
    assert np.isfinite([t, p, q]).all()


def test_blocks_change_nothing_and_equal_units_tie_exactly():
    columns = BLOCK_VALUES // 2 + 3  # several blocks of a few stimuli each
    generator = np.random.default_rng(1)
    a, b = (generator.normal(size=(n, 7)).astype(np.float32) for n in (5, 4))
    tiles = np.arange(columns) % 7
    t, p, _ = localizer_test(a[:, tiles], b[:, tiles])
    assert len(np.unique(t)) == 7 and len(np.unique(p)) == 7
    np.testing.assert_allclose(t[:7], localizer_test(a, b).t, rtol=1e-12)


def test_the_order_of_units_does_not_matter():
    a, b = two_sets((200,))
    order = np.random.default_rng(2).permutation(200)
    np.testing.assert_array_equal(localizer_test(a[:, order], b[:, order]).t, localizer_test(a, b).t[order])


def test_streamed_moments_are_those_of_all_stimuli_at_once():
    a, b = two_sets((6,), 40, 31, offset=100.0)
    a[5:9, 2] = np.nan
    sides = []
    for values in (a, b):
        moments = Moments((6,))
        for part in np.array_split(values, [1, 2, 13, 14]):
            moments.add(part)
        sides.append(moments)
        np.testing.assert_allclose(moments.mean, np.nanmean(values, 0), rtol=1e-14)
        np.testing.assert_allclose(moments.variance, np.nanvar(values, 0, ddof=1), rtol=1e-12)
    streamed, whole = compare(*sides), localizer_test(a, b)
    np.testing.assert_allclose(streamed.t, whole.t, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_and_numpy_agree_in_float64(dtype):
    a, b = (torch.tensor(x).to(dtype) for x in two_sets())
    got = localizer_test(a, b)
    assert got.t.dtype == np.float64
    np.testing.assert_array_equal(got.t, localizer_test(a.double().numpy(), b.double().numpy()).t)


def test_other_layouts_and_a_single_unit():
    a, b = two_sets((8,))
    np.testing.assert_array_equal(localizer_test(np.asfortranarray(a), b[::-1][::-1]).t, localizer_test(a, b).t)
    assert localizer_test(a[:, 0], b[:, 0]).t.shape == ()
    assert localizer_test(a[:, 0], b[:, 0]).t == pytest.approx(localizer_test(a, b).t[0], rel=1e-12)


@pytest.mark.parametrize(
    "positive, negative, error, words",
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), ValueError, "same units"),
        (np.zeros((0, 3)), np.zeros((4, 3)), ValueError, "positive must be"),
        (np.zeros((4, 0)), np.zeros((4, 0)), ValueError, "no units"),
        (np.zeros((4, 3)), 1.0, ValueError, "negative must be"),
        (np.full((4, 3), np.inf), np.zeros((4, 3)), ValueError, "infinite"),
        (np.zeros((4, 3), complex), np.zeros((4, 3)), TypeError, "real numbers"),
        ([["a"]], [["b"]], TypeError, "real numbers"),
    ],
)
def test_bad_activations_are_refused(positive, negative, error, words):
    with pytest.raises(error, match=words):
        localizer_test(positive, negative)


# ------------------------------------------------------------------ the mask


def test_the_mask_holds_the_largest_t_over_all_units():
    t = np.random.default_rng(0).normal(size=(3, 4, 50))
    mask = localizer_mask(t, percent=10)
    assert mask.shape == t.shape and mask.dtype == bool and mask.sum() == 60
    assert t[mask].min() > t[~mask].max()
    np.testing.assert_array_equal(mask, localizer_mask(t, units=60))
    np.testing.assert_array_equal(mask, localizer_mask(torch.tensor(t), percent=10))


def test_k_is_the_floor_of_the_share():
    t = np.random.default_rng(0).normal(size=131072)
    assert localizer_mask(t, percent=10).sum() == 13107
    for percent, units, k in ((29, 100, 29), (57, 100, 57), (0.1, 3000, 3), (99.99, 10, 9), (100, 7, 7)):
        assert localizer_mask(np.arange(1.0, 1 + units), percent=percent).sum() == k


def test_ties_share_a_place_and_may_select_more_than_k():
    t = np.array([5.0, 5.0, 5.0, 4.0, 4.0, 3.0, 2.0, -1.0])
    assert localizer_mask(t, units=1).tolist() == [True] * 3 + [False] * 5
    assert localizer_mask(t, units=2).sum() == 5
    assert localizer_mask(t, percent=25).sum() == 5
    assert localizer_mask(t, units=8).all()  # fewer distinct values than k: everything


def test_values_that_differ_in_float32_only_are_distinct_and_others_are_not():
    t = np.array([1, 1 + 2**-24, 0.5], np.float64)
    assert localizer_mask(t, units=1).tolist() == [False, True, False]
    assert localizer_mask(t.astype(np.float32), units=1).tolist() == [True, True, False]
    assert localizer_mask(torch.tensor(t).bfloat16(), units=1).tolist() == [True, True, False]


def test_units_without_a_t_are_never_selected():
    t = np.array([2.0, 0.0, 0.0, -0.0, np.nan, 1.0, -1.0, -2.0])
    assert np.flatnonzero(localizer_mask(t, units=2)).tolist() == [0, 5]
    assert np.flatnonzero(localizer_mask(t, units=3)).tolist() == [0, 5]  # zero takes the third place, unselected
    assert np.flatnonzero(localizer_mask(t, units=4)).tolist() == [0, 5, 6]
    assert np.flatnonzero(localizer_mask(t, percent=100)).tolist() == [0, 5, 6, 7]
    assert not localizer_mask(np.zeros(9), percent=50).any()
    assert not localizer_mask(np.full(9, np.nan), percent=50).any()
    assert localizer_mask(t, units=3, range=(0, 100), seed=3)[[1, 2, 3, 4]].sum() == 0


def test_the_lowest_are_their_own_mirror():
    t = np.random.default_rng(3).integers(-9, 10, 60).astype(float)
    np.testing.assert_array_equal(localizer_mask(t, units=4, range=(0, 0)), localizer_mask(-t, units=4))


def test_a_band_draws_k_units_between_its_percentiles():
    t = np.random.default_rng(4).normal(size=(2, 500))
    low, high = np.percentile(t, [20, 60])
    mask = localizer_mask(t, percent=5, range=(20, 60), seed=1)
    assert mask.sum() == 50 and t[mask].min() >= low and t[mask].max() <= high
    np.testing.assert_array_equal(mask, localizer_mask(t, units=50, range=(20, 60), seed=1))
    assert (mask != localizer_mask(t, percent=5, range=(20, 60), seed=2)).any()
    np.testing.assert_array_equal(
        localizer_mask(t, units=9, range=(0, 50)), localizer_mask(t, units=9, range=(0, 50), seed=0)
    )
    everyone = localizer_mask(t, units=400, range=(20, 60), seed=5)  # exactly all that lie there
    np.testing.assert_array_equal(everyone, (t >= low) & (t <= high))


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "either percent or units"),
        ({"percent": 10, "units": 3}, "either percent or units"),
        ({"percent": 0}, r"\(0, 100\]"),
        ({"percent": 101}, r"\(0, 100\]"),
        ({"percent": float("nan")}, r"\(0, 100\]"),
        ({"percent": 1}, "1 % of 50 units is less than one"),
        ({"units": 0}, r"1\.\.50"),
        ({"units": 51}, r"1\.\.50"),
        ({"units": 2.5}, r"1\.\.50"),
        ({"units": 3, "range": (50, 20)}, "low <= high"),
        ({"units": 3, "range": (-1, 20)}, "low <= high"),
        ({"units": 30, "range": (0, 20)}, "only 10 units"),
    ],
)
def test_bad_shares_and_bands_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        localizer_mask(np.arange(1.0, 51.0), **options)


# ------------------------------------------------------------------ planted truth


def test_planted_units_are_recovered_exactly():
    generator = np.random.default_rng(5)
    a, b = generator.normal(size=(240, 4, 4, 32)), generator.normal(size=(240, 4, 4, 32))
    planted = np.zeros((4, 4, 32), bool)
    planted.reshape(-1)[generator.choice(512, 51, replace=False)] = True
    a[:, planted] += 3.0
    test = localizer_test(a, b)
    np.testing.assert_array_equal(localizer_mask(test.t, percent=10), planted)
    assert (test.q[planted] < 0.05).all()
    assert (test.q[~planted] < 0.05).sum() <= 8


def test_noise_has_a_discovery_no_more_often_than_it_says():
    generator = np.random.default_rng(6)
    values = generator.normal(size=(60, 300))
    nulls = null_tests(values, shuffled(30, 30, permutations=200, seed=1))
    found = nulls.specificity()
    assert found["passed"] and found["share_with_discovery"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    assert nulls.t.shape == (200, 300) and abs(float(nulls.t.mean())) < 0.02


def test_shuffled_labels_hide_even_a_strong_effect():
    generator = np.random.default_rng(7)
    values = generator.normal(size=(80, 200))
    values[:40, :20] += 5
    assert (localizer_test(values[:40], values[40:]).q < 0.05).sum() >= 20
    assert null_tests(values, shuffled(40, 40, seed=2)).specificity()["passed"]


def test_a_test_that_finds_too_much_does_not_pass():
    generator = np.random.default_rng(8)
    values = generator.normal(size=(40, 50))
    values[:20, :5] += 5
    members = np.tile(np.arange(40) < 20, (200, 1))  # nothing is shuffled
    found = null_tests(values, members).specificity()
    assert not found["passed"] and found["share_with_discovery"] == 1


@pytest.mark.parametrize("first", [14, 2])
@pytest.mark.parametrize("missing", [False, True])
def test_permutations_by_matrix_products_are_the_test_itself(missing, first):
    generator = np.random.default_rng(9)
    values = np.abs(generator.normal(size=(17 + first, 40)) + 50)
    values[:first, :10] += 9
    values[:, 11] = 3.3
    if missing:
        values[generator.random(values.shape) < 0.3] = np.nan
        values[2:first, 12] = np.nan
        values[:, 0] = generator.normal(size=len(values)) + 50  # nothing dropped out here
    members = shuffled(first, 17, permutations=5, seed=3)
    members = np.concatenate([np.arange(17 + first)[None] < first, members])
    nulls = null_tests(values, members)
    for r, member in enumerate(members):
        want = localizer_test(values[member], values[~member])
        np.testing.assert_allclose(nulls.t[r], want.t, rtol=1e-5, atol=1e-6)
        assert nulls.discoveries[r] == (want.q <= 0.05).sum()
    assert (nulls.t[:, 0] != 0).all()
    assert nulls.discoveries[0] > 0 or (missing and first == 2)


def test_every_labelling_has_as_many_positive_stimuli():
    members = shuffled(3, 5, permutations=50, seed=4)
    assert members.shape == (50, 8) and set(members.sum(1)) == {3}
    assert 2 < members[:, 0].sum() < 40
    np.testing.assert_array_equal(members, shuffled(3, 5, permutations=50, seed=4))


# ------------------------------------------------------------------ random masks


@pytest.mark.parametrize("matched", [False, True])
def test_random_masks_are_as_large_and_lie_outside(matched):
    generator = np.random.default_rng(10)
    mask = generator.random((3, 2, 40)) < 0.2
    masks = random_masks(mask, 20, matched=matched, seed=1)
    assert len(masks) == 20 and len({m.tobytes() for m in masks}) == 20
    for other in masks:
        assert other.sum() == mask.sum() and not (other & mask).any()
        if matched:
            np.testing.assert_array_equal(other.sum(-1), mask.sum(-1))


def test_a_mask_with_no_room_outside_is_refused():
    mask = np.zeros((2, 2, 10), bool)
    mask[1, 0, :6] = True
    assert len(random_masks(mask, 2)) == 2
    with pytest.raises(ValueError, match=r"cell \(1, 0\)"):
        random_masks(mask, 2, matched=True)
    with pytest.raises(ValueError, match="the model"):
        random_masks(np.ones((1, 1, 3), bool), 2)
