"""Alignment: each statistic against its definition, and what is planted must be found."""

import numpy as np
import pytest
import scipy.stats

from micro.analysis import alignment as al
from micro.analysis.alignment.ceiling import Ceiling
from micro.analysis.alignment.contrasts import corrected_t
from micro.analysis.alignment.resampling import block_orders, block_weights, blocks_of, resampled_scores
from micro.analysis.alignment.rsa import ranks

QUICK = {"folds": 3, "inner_folds": 3, "permutations": 19, "draws": 50}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def plain_ridge(x, y, folds, inner, lambdas):
    """Ridge with a penalty per voxel by inner folds: the definition, voxel by voxel, with a solver of its own."""

    def predict(train, test, target, penalty):
        mean, deviation = x[train].mean(0), x[train].std(0)
        fit, held = (x[train] - mean) / deviation, (x[test] - mean) / deviation
        centre = target[train].mean()
        weights = np.linalg.solve(fit.T @ fit + penalty * np.eye(x.shape[1]), fit.T @ (target[train] - centre))
        return held @ weights + centre

    scores, chosen = np.zeros((folds, y.shape[1])), np.zeros((folds, y.shape[1]))
    for f, test in enumerate(np.array_split(np.arange(len(x)), folds)):
        train = np.setdiff1d(np.arange(len(x)), test)
        for voxel in range(y.shape[1]):
            target = y[:, voxel]
            inner_scores = []
            for penalty in lambdas:
                total = 0.0
                for part in np.array_split(np.arange(len(train)), inner):
                    rest = np.delete(train, part)
                    total += np.corrcoef(predict(rest, train[part], target, penalty), target[train[part]])[0, 1]
                inner_scores.append(total)
            chosen[f, voxel] = lambdas[int(np.argmax(inner_scores))]
            scores[f, voxel] = np.corrcoef(predict(train, test, target, chosen[f, voxel]), target[test])[0, 1]
    return scores, chosen


@pytest.mark.parametrize("width", [5, 50])  # primal and dual
def test_ridge_is_the_plain_loop(width):
    x = normal(36, width) * 3 + 7
    y = x[:, :2] @ normal(2, 4, seed=1) + normal(36, 4, seed=2) + 5
    lambdas = (0.1, 10.0, 1000.0)
    got = al.ridge(x, y, folds=3, inner_folds=4, lambdas=lambdas)
    scores, chosen = plain_ridge(x, y, 3, 4, lambdas)
    assert np.array_equal(got.lambdas, chosen) and len(np.unique(chosen)) > 1
    assert np.allclose(got.by_fold, scores, atol=1e-10) and np.allclose(got.r, scores.mean(0), atol=1e-10)
    assert np.isclose(got.score, np.median(scores.mean(0)), atol=1e-10)


def test_primal_and_dual_agree():
    x, y = normal(30, 12), normal(30, 3, seed=1)
    wide = np.concatenate([x, np.zeros((30, 40))], 1)  # columns that do not vary add nothing but make it d > n
    first, second = al.ridge(x, y, folds=3), al.ridge(wide, y, folds=3)
    assert np.allclose(first.predictions, second.predictions, atol=1e-8)


def test_a_planted_linear_map_is_recovered_up_to_its_ceiling():
    n, d, v = 900, 4, 12
    x = normal(n, d)
    signal = x @ normal(d, v, seed=1)
    signal /= signal.std(0)
    repetitions = signal + normal(4, n, v, seed=2) * 1.5
    responses = al.Responses.repeated(repetitions)
    ceiling = responses.ceiling()
    assert np.allclose(ceiling.reliability, 1 / (1 + 1.5**2 / 4), atol=0.05)
    score = al.ridge(x, responses.values)
    assert abs(np.median(ceiling.normalise(score.r)) - 1) < 0.03
    assert abs(np.median(score.r) - (1 / (1 + 1.5**2 / 4)) ** 0.5) < 0.03


def test_random_features_predict_nothing():
    result = al.align({"noise": normal(90, 20)}, normal(90, 40, seed=1), **QUICK)
    (entry,) = result.sets
    assert abs(entry["score"]) < 0.08 and entry["p"] > 0.05 and entry["lambdas"].keys() >= {"1e+06", "0.001"}


def test_folds_are_contiguous_and_do_not_cut_groups():
    assert [rows.tolist() for rows in al.contiguous_folds(10, 3)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    groups = [0] * 5 + [1] * 3 + [2] * 4
    folds = al.contiguous_folds(12, 3, groups)
    assert [rows.tolist() for rows in folds] == [list(range(5)), [5, 6, 7], [8, 9, 10, 11]]
    for labels, folds in (([0] * 12, 2), (groups, 4)):
        with pytest.raises(ValueError, match="use fewer folds"):
            al.contiguous_folds(12, folds, labels)
    with pytest.raises(ValueError, match="folds must be"):
        al.contiguous_folds(5, 2)


@pytest.mark.parametrize("values, place", [(np.array([[1.0, np.nan]]), "row 0, column 1"), (np.ones(3), "matrix")])
def test_ridge_refuses_what_it_cannot_use(values, place):
    with pytest.raises(ValueError, match=place):
        al.ridge(values, np.ones((3, 1)))


def test_split_half_and_spearman_brown():
    assert np.allclose(al.spearman_brown([0.5, -0.3, 0.0]), [2 / 3, -0.3, 0])
    two = normal(2, 50, 3)
    expected = [scipy.stats.pearsonr(two[0, :, i], two[1, :, i])[0] for i in range(3)]
    assert np.allclose(al.split_half(two), al.spearman_brown(expected))
    # Three repetitions: halves of one each, stepped up by a factor of three.
    signal = normal(4000, 1, seed=1)
    three = signal + normal(3, 4000, 1, seed=2)
    assert np.allclose(al.split_half(three), 0.75, atol=0.02)
    with pytest.raises(ValueError, match="repetitions >= 2"):
        al.split_half(two[:1])


def test_voxels_without_reliability_are_left_out_and_counted():
    ceiling = Ceiling(np.array([0.04, 0.05, 0.25, -0.2]))
    assert ceiling.excluded == 3
    assert np.array_equal(np.isnan(ceiling.normalise(np.ones(4))), [True, True, False, True])
    assert ceiling.normalise(np.full(4, 0.3))[2] == pytest.approx(0.6)
    responses = al.Responses(normal(30, 3) * [1, 0, 1], reliability=[0.5, 0.5, 0.01])
    result = al.align({"x": normal(30, 4, seed=1)}, responses, **QUICK)
    assert result.voxels_included == 1 and "rsa" not in result.sets[0]  # one column has no dissimilarities
    assert result.voxels_excluded == {"without variance": 1, "reliability <= 0.05": 1}
    with pytest.raises(ValueError, match="no voxel of 3 is left"):
        al.align({"x": normal(30, 4)}, al.Responses(normal(30, 3), reliability=[0, 0, 0]), **QUICK)


def test_rsa_is_spearman_of_the_triangles():
    x, y = normal(12, 5), normal(12, 7, seed=1)
    triangle = np.triu_indices(12, 1)
    expected = scipy.stats.spearmanr((1 - np.corrcoef(x))[triangle], (1 - np.corrcoef(y))[triangle])[0]
    assert al.rsa(x, y) == pytest.approx(expected, abs=1e-12)
    assert al.rsa(x, x * 3 + 1) == pytest.approx(1)
    with pytest.raises(ValueError, match="stimulus 2"):
        al.rdm(np.concatenate([x[:2], np.ones((1, 5))]))


def test_topological_rsa_clips_ranks():
    x, y = normal(12, 5), normal(12, 7, seed=1)
    triangle = np.triu_indices(12, 1)
    clipped = []
    for values in (x, y):
        order = scipy.stats.rankdata((1 - np.corrcoef(values))[triangle])
        clipped.append(np.clip(order, *np.quantile(order, [0.2, 0.6])))
    assert al.rsa(x, y, lower=0.2, upper=0.6) == pytest.approx(np.corrcoef(*clipped)[0, 1], abs=1e-12)
    assert np.array_equal(ranks(al.rdm(x)), scipy.stats.rankdata(al.rdm(x)[triangle]))
    with pytest.raises(ValueError, match="quantiles"):
        al.rsa(x, y, lower=0.5, upper=0.5)


def unbiased_hsic(k, l):
    """Song et al. 2012, equation 5."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    one = np.ones(n)
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + sums - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def test_cka_is_its_definition():
    x, y = normal(20, 4) + 3, normal(20, 6, seed=1)
    y[:, 0] += x[:, 0]
    xc, yc = x - x.mean(0), y - y.mean(0)
    biased = np.linalg.norm(xc.T @ yc) ** 2 / (np.linalg.norm(xc.T @ xc) * np.linalg.norm(yc.T @ yc))
    assert al.cka(x, y, unbiased=False) == pytest.approx(biased, abs=1e-12)
    k, l = x @ x.T, y @ y.T
    unbiased = unbiased_hsic(k, l) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))
    assert al.cka(x, y, unbiased=True) == pytest.approx(unbiased, abs=1e-10)
    assert al.cka(x, y) == al.cka(x, y, unbiased=True)  # n < 10 d
    assert al.cka(x[:, :2], y) == al.cka(x[:, :2], y, unbiased=False)
    with pytest.raises(ValueError, match="responses do not vary"):
        al.cka(x, np.full((20, 3), 0.1))


def test_the_unbiased_estimator_is_near_zero_where_the_biased_one_is_not():
    pairs = [(normal(20, 60, seed=i), normal(20, 60, seed=100 + i)) for i in range(30)]
    assert abs(np.mean([al.cka(x, y, unbiased=True) for x, y in pairs])) < 0.02
    assert np.mean([al.cka(x, y, unbiased=False) for x, y in pairs]) > 0.6


def test_blocks_keep_to_folds_and_groups_and_weights_keep_their_sum():
    folds = al.contiguous_folds(54, 2)
    blocks = blocks_of(folds, np.repeat([0, 1, 2], 18))
    assert sorted(row for fold in blocks for block in fold for row in block) == list(range(54))
    assert all(block[0] // 18 == block[-1] // 18 for fold in blocks for block in fold)
    weights = block_weights(blocks_of(folds), 54, 20, seed=0)
    assert np.allclose(weights[:, folds[0]].sum(1), 27) and weights.max() > 1
    (order,) = block_orders(blocks, 1, seed=0)
    assert sorted(order) == list(range(54)) and (order != np.arange(54)).any()


def test_resampled_correlations_are_those_of_repeated_rows():
    predictions, responses = normal(12, 3) + 50, normal(12, 3, seed=1)
    folds = al.contiguous_folds(12, 2)
    weights = block_weights(blocks_of(folds), 12, 3, seed=2)
    got = resampled_scores(predictions, responses, folds, weights, lambda r: r)
    for draw, counts in enumerate(weights.astype(int)):
        expected = np.zeros(3)
        for rows in folds:
            drawn = np.repeat(rows, counts[rows])
            expected += [np.corrcoef(predictions[drawn, i], responses[drawn, i])[0, 1] / 2 for i in range(3)]
        assert np.allclose(got[draw], expected)


def planted(experts=("logic", "social"), layers=3, n=90):
    """Responses are noisy views of expert "logic" at layer 1, in the network "a" only."""
    sets = []
    for e, expert in enumerate(experts):
        for layer in range(layers):
            values = normal(n, 6, seed=10 * e + layer)
            sets.append(al.FeatureSet(f"{expert}, layer {layer}", values, layer, expert))
    source = sets[1].values @ normal(6, 10, seed=50)
    responses = np.concatenate([source + normal(n, 10, seed=51), normal(n, 5, seed=52)], 1)
    return sets, al.Responses(responses, networks=["a"] * 10 + ["b"] * 5)


def test_the_planted_expert_layer_and_network_are_found(tmp_path):
    sets, responses = planted()
    result = al.align(
        sets, responses, controls={sets[1].name: [normal(90, 6, seed=70 + i) for i in range(9)]}, **QUICK | {"folds": 5}
    )
    best = max(result.sets, key=lambda entry: entry["score"])
    assert best["name"] == "logic, layer 1" and best["p"] == best["p_family"] == 0.05
    assert best["interval"][0] < best["score"] < best["interval"][1] and best["interval"][0] > best["null_95"]
    (contrast,) = result.contrasts
    assert (contrast["first"], contrast["second"]) == ("model: logic", "model: social")
    assert contrast["interval"][0] > 0 and contrast["p_holm"] == contrast["p"] < 0.05
    scores = {(row["expert"], row["network"]): row["score"] for row in result.networks}
    assert scores["logic", "a"] > 0.15 > max(scores["social", "a"], scores["logic", "b"])
    assert all(result.self_test_passed.values()) and len(result.self_test) == 4
    assert result.random_units[0]["p"] == pytest.approx(0.1)
    for metric in ("rsa", "topological_rsa", "cka"):
        assert max(result.sets, key=lambda entry: entry[metric]["value"])["name"] == "logic, layer 1"

    assert result.network_table().loc["model: logic", "a"] == scores["logic", "a"]

    result.save(tmp_path)
    again = al.AlignmentResult.load(tmp_path)
    assert again == result and np.allclose(again.voxels["logic, layer 1"], result.voxels["logic, layer 1"], atol=1e-6)
    assert (tmp_path / "alignment.csv").read_text().startswith("set,width,r,")
    assert again.plot().axes and all(part in str(again) for part in ("self-test, ridge: 6 of 6", "\nmodel: social "))


def test_the_corrected_t_test_counts_shared_training_data():
    differences = np.array([0.1, 0.3, 0.2, 0.15])
    mean, interval, p = corrected_t(differences)
    inflated = scipy.stats.ttest_1samp(differences, 0).statistic / np.sqrt(1 + 4 / 3)  # 1/k + 1/(k-1) instead of 1/k
    assert mean == pytest.approx(differences.mean()) and p == pytest.approx(2 * scipy.stats.t.sf(inflated, 3))
    assert interval[0] == pytest.approx(mean - scipy.stats.t.ppf(0.975, 3) * mean / inflated)
    assert corrected_t(np.zeros(4)) == (0, [0, 0], 1)


def test_the_self_test_fails_where_sets_cannot_be_told_apart():
    values = normal(60, 5)
    result = al.align({"one": values, "same": values.copy(), "other": normal(60, 5, seed=1)}, normal(60, 4), **QUICK)
    assert not any(result.self_test_passed.values())
    ranks = {row["target"]: row["rank"] for row in result.self_test["ridge"]}
    assert ranks == {"one": 2, "same": 2, "other": 1}
    assert "do not read an order" in str(result)


def test_chosen_contrasts_and_models_beside_each_other():
    sets, responses = planted(experts=("logic",), layers=2)
    other = [al.FeatureSet(f"untrained {s.name}", normal(90, 6, seed=80 + i), s.layer, s.expert, "untrained")
             for i, s in enumerate(sets)]  # fmt: skip
    result = al.align([*sets, *other], responses, metrics=("ridge",), **QUICK)
    (contrast,) = result.contrasts
    assert (contrast["first"], contrast["second"]) == ("model: logic", "untrained: logic")
    assert contrast["interval"][0] > 0
    chosen = al.align(sets, responses, metrics=("ridge",), contrasts=[(sets[1].name, sets[0].name)], **QUICK).contrasts
    assert chosen[0]["difference"] > 0.3
    with pytest.raises(ValueError, match="'nobody' is neither a set nor a group"):
        al.align(sets, responses, metrics=("ridge",), contrasts=[("nobody", sets[0].name)], **QUICK)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"metrics": ("rsa",)}, "metrics must hold ridge"),
        ({"permutations": 0}, "at least 1"),
        ({"controls": {"nobody": []}}, "no feature set is named nobody"),
        ({"controls": {"x": [normal(29, 4)]}}, "at least one array with 30 stimuli"),
        ({"features": {"x": normal(30, 1)}, "metrics": ("ridge", "rsa")}, "no RSA of 'x'"),
        ({"lambdas": (0.0,)}, "lambdas must be positive"),
        ({"self_test_reliability": 2.0}, "reliability must lie"),
    ],
)
def test_align_names_the_wrong_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        al.align(**{"features": {"x": normal(30, 4)}, "responses": normal(30, 2), **QUICK, **arguments})


def test_align_wants_the_same_stimuli():
    with pytest.raises(ValueError, match="responses are to 31 stimuli, features of 30"):
        al.align({"x": normal(30, 4)}, normal(31, 2), **QUICK)
    with pytest.raises(ValueError, match="the same stimuli"):
        al.align({"x": normal(30, 4), "y": normal(29, 4)}, normal(30, 2), **QUICK)


def test_responses_are_read_from_files(tmp_path):
    repetitions = normal(3, 8, 2)
    np.savez(tmp_path / "a.npz", repetitions=repetitions, networks=["a", "b"], groups=np.arange(8) // 4)
    read = al.load_responses(tmp_path / "a.npz")
    assert np.allclose(read.values, repetitions.mean(0)) and read.networks == ["a", "b"]
    np.save(tmp_path / "b.npy", repetitions[0])
    assert np.array_equal(al.load_responses(tmp_path / "b.npy").values, repetitions[0])
    (tmp_path / "c.csv").write_text("group,left,right\n0,1,2\n0,3,4.5\n")
    table = al.load_responses(tmp_path / "c.csv")
    assert table.values.tolist() == [[1, 2], [3, 4.5]] and table.groups.tolist() == [0, 0]
    np.savez(tmp_path / "d.npz", response=repetitions)
    (tmp_path / "e.csv").write_text("left\nhigh\n")
    wrong = {"d.npz": "either 'responses'", "e.csv": "'left' holds no numbers", "f.mat": "no such file"}
    for name, words in wrong.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            al.load_responses(tmp_path / name)


def test_matched_masks_keep_the_counts_of_every_cell():
    mask = np.zeros((2, 3, 10), dtype=bool)
    mask[0, 1, :4] = mask[1, 2, 5:] = True
    masks = al.matched_masks(mask, 5, seed=1)
    assert all(np.array_equal(m.sum(-1), mask.sum(-1)) and not (m & mask).any() for m in masks)
    assert any((masks[0] != m).any() for m in masks[1:])
    with pytest.raises(ValueError, match="more units inside"):
        al.matched_masks(np.ones((1, 1, 3), dtype=bool), 1)
