import itertools

import numpy as np
import pytest
from planted_suites import Planted, model

from micro.analysis.ablations.report import ablation
from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.ablations.shapley import coalition, interactions, members, sampled_shapley, shapley_values
from micro.analysis.ablations.shapley_report import ShapleyReport, expert_shapley


def random_game(players, *, seed=0, shape=()):
    return np.random.default_rng(seed).normal(size=(1 << players, *shape))


def by_orders(values):
    """The definition over all N! orders, slow and plain."""
    players = len(values).bit_length() - 1
    total = np.zeros((players, *values.shape[1:]))
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        mask = 0
        for player in order:
            total[player] += values[mask | 1 << player] - values[mask]
            mask |= 1 << player
    return total / len(orders)


@pytest.mark.parametrize("players", [1, 2, 3, 4, 5])
def test_values_are_the_mean_over_all_orders_and_efficient(players):
    game = random_game(players, shape=(3,))
    phi = shapley_values(game)
    assert np.abs(phi - by_orders(game)).max() < 1e-9
    assert np.abs(phi.sum(0) - (game[-1] - game[0])).max() < 1e-9


def test_players_that_can_be_exchanged_get_the_same_and_a_dummy_its_own_worth():
    game = random_game(5, seed=1)
    masks = np.arange(32)
    swapped = (masks & ~0b00110) | (masks >> 1 & 1) << 2 | (masks >> 2 & 1) << 1
    symmetric = game + game[swapped]
    assert abs(np.diff(shapley_values(symmetric)[[1, 2]])[0]) < 1e-9
    dummy = game[masks & ~0b1000] + 0.7 * (masks >> 3 & 1)
    assert shapley_values(dummy)[3] == pytest.approx(0.7, abs=1e-9)
    assert np.abs(interactions(dummy)[3]).max() < 1e-9


def test_an_additive_game_gives_the_addends_and_no_interaction():
    worth = np.array([0.5, -2.0, 0.0, 3.25])
    game = np.array([sum(worth[members(mask)]) for mask in range(16)]) + 7
    assert np.abs(shapley_values(game) - worth).max() < 1e-9
    assert np.abs(interactions(game)).max() < 1e-9


def test_interactions_find_a_planted_pair_and_a_redundant_one():
    game = np.array([2.0 * ((m & 3) == 3) + 1.0 * bool(m & 12) for m in range(16)])
    index = interactions(game)
    assert index[0, 1] == pytest.approx(2.0, abs=1e-9)
    assert index[2, 3] == pytest.approx(-1.0, abs=1e-9)
    assert np.abs(index[:2, 2:]).max() < 1e-9
    assert np.array_equal(index, index.T)


def test_interactions_are_the_recursive_difference_of_values():
    """I_ij = phi_i of the game played with j, minus that of the game played without j."""
    game = random_game(4, seed=5)
    masks = np.arange(16)
    without = game[masks[(masks >> 3 & 1) == 0]]
    present = game[masks[(masks >> 3 & 1) == 1]]
    assert np.abs(interactions(game)[:3, 3] - (shapley_values(present) - shapley_values(without))).max() < 1e-9


@pytest.mark.parametrize("antithetic", [False, True])
def test_samples_converge_to_the_exact_values_within_their_errors(antithetic):
    players = 6
    game = random_game(players, seed=2, shape=(2,))
    asked = []

    def worth(group):
        asked.append(group)
        return game[coalition(list(group))]

    got = sampled_shapley(worth, players, permutations=2000, antithetic=antithetic, seed=3)
    exact = shapley_values(game)
    assert np.abs(got.values - exact).max() < 0.1
    assert (np.abs(got.values - exact) <= 4 * got.se).all() and got.se.max() < 0.05
    assert np.abs(got.values.sum(0) - (game[-1] - game[0])).max() < 1e-9
    assert len(asked) == len(set(asked)) == got.evaluations <= 64  # no coalition is asked for twice


def test_antithetic_orders_have_the_smaller_error_on_a_game_of_pairs():
    def worth(group):  # what a player adds grows with the number that came before
        return len(group) ** 2

    plain = sampled_shapley(worth, 8, permutations=200, antithetic=False)
    paired = sampled_shapley(worth, 8, permutations=200, antithetic=True)
    assert np.abs(paired.values - 8).max() < 1e-9 < np.abs(plain.values - 8).max()


def test_truncation_saves_evaluations_and_errs_by_no_more_than_its_bound():
    def worth(group):
        return min(len(group), 3) / 3 + 1e-4 * len(group)

    exact = sampled_shapley(worth, 12, permutations=40)
    short = sampled_shapley(worth, 12, permutations=40, truncate=2e-3)
    assert short.evaluations < exact.evaluations / 2
    assert np.abs(short.values - exact.values).max() <= 2e-3
    assert abs(short.values.sum() - exact.values.sum()) <= 2e-3


@pytest.mark.parametrize("shape", [(), (3,), (0,), (1,), (12, 2)])
def test_a_table_that_is_not_whole_is_refused(shape):
    with pytest.raises(ValueError, match=r"2\*\*N coalitions"):
        shapley_values(np.zeros(shape))


def test_bits_and_members_are_inverse():
    assert [members(m) for m in (0, 1, 6, 15)] == [[], [0], [1, 2], [0, 1, 2, 3]]
    assert all(coalition(members(m)) == m for m in range(64))


# ---------------------------------------------------------------- of experts
def values_of(function, **attributes):
    return expert_shapley(model(), Planted(function, **attributes), draws=300)


def test_experts_get_what_was_planted():
    """Removing logic costs 3 nats, language 1; social distracts by half a nat; world does nothing."""

    def loss(gone, record):
        return 2 + record / 10 + gone[0] @ [3.0, -0.5, 0.0, 1.0]

    report = values_of(loss, names=["a", "b"])
    everybody = -2.45
    # Nobody is worth -ln V, all four together v(all): what the addends do not explain is shared alike.
    rest = (everybody + np.log(100) - 3.5) / 4
    for r in range(2):
        assert report.values[r] == pytest.approx([3 + rest, -0.5 + rest, rest, 1 + rest], abs=1e-9)
        assert sum(report.values[r]) == pytest.approx(everybody + np.log(100), abs=1e-9)
        assert report.worth[r][0] == pytest.approx(-np.log(100)) and report.worth[r][15] == pytest.approx(everybody)
    assert list(report.table()["alone"][:4]) == pytest.approx([3, -0.5, 0, 1])


def test_differences_between_experts_do_not_depend_on_what_nobody_is_worth():
    game = random_game(4, seed=4)

    def share(gone, record):
        return game[sum(1 << e for e in range(4) if not gone[0, e])]

    low, high = (values_of(share, higher_is_better=True, chance=chance) for chance in (0.0, 0.5))
    assert np.subtract(high.values, low.values) == pytest.approx(np.full((1, 4), -12.5))
    assert low.units == ["points"]
    exact = 100 * np.where(np.arange(16) > 0, game, 0.0)
    assert np.abs(shapley_values(exact) - low.values[0]).max() < 1e-9
    assert np.abs(interactions(exact) - low.interactions[0]).max() < 1e-9


def test_intervals_cover_the_uncertainty_of_records():
    effect = np.random.default_rng(0).normal(1.0, 0.5, size=50)
    report = values_of(lambda gone, record: effect[record] * gone[0, 2], records=50)
    others = [e for e in range(4) if e != 2]
    widths = np.diff(np.asarray(report.interval[0]), axis=1)[:, 0]
    assert widths[2] == pytest.approx(2 * 1.96 * effect.std(ddof=1) / 50**0.5 * 0.75, rel=0.2)
    assert (widths[2] > 2.5 * widths[others]).all()
    low, high = report.interval[0][2]
    assert low < report.values[0][2] < high
    far = report.table().iloc[2]
    assert far["distance_low"] < far["distance"] < far["distance_high"]
    assert list(report.table()["distance"]) == pytest.approx(np.array([-1, -1, 3, -1]) * effect.mean() / 4)


def test_what_all_experts_share_does_not_blur_their_distances():
    base = np.random.default_rng(0).normal(3, 2, size=30)  # records differ much, in all conditions alike
    report = values_of(lambda gone, record: base[record] + gone[0] @ [1.0, 0, 0, 0], records=30)
    assert np.diff(report.interval[0]).min() > 0.2
    assert np.diff(report.distance_interval[0]).max() < 1e-9


def test_scores_of_all_sets_are_those_of_the_ablation():
    suite, store, one = Planted(lambda gone, record: gone[0].sum()), ScoreStore(), model()
    ablation(one, suite, "all", draws=10, store=store)
    assert len(suite.calls) == 15
    report = expert_shapley(one, suite, draws=10, store=store)
    assert len(suite.calls) == 15
    assert len(set(np.round(report.values[0], 12))) == 1


def test_a_suite_must_say_what_nobody_is_worth(tmp_path):
    with pytest.raises(ValueError, match="chance"):
        values_of(lambda gone, record: 1.0, higher_is_better=True)
    report = values_of(lambda gone, record: gone[0, 0] * 1.0, names=["a", "b"])
    report.save(tmp_path)
    assert ShapleyReport.load(tmp_path) == report
    assert len((tmp_path / "shapley_interactions.csv").read_text().splitlines()) == 13
    assert len(report.plot().axes) == 2 and len(report.interaction_table()) == 12
