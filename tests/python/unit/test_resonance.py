import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from small_models import small_model

from micro.analysis.steering.matrix import mean_change, sign_flips
from micro.analysis.steering.resonance import (
    ResonanceReport,
    TargetSuite,
    _permuted,
    cell_effects,
    cost_correlation,
    force,
    resonance,
    suppress,
    switch_top_cells,
    tunable_cells,
)

CELL = (2, 1)
LAYERS = 3


class Letters:
    """A tokenizer of 61 ids: even ids stand for the behaviour, odd ones for its absence."""

    pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [int(c) for c in text.split()]}


def prompts(parity, n=12, length=14, seed=0):
    generator = np.random.default_rng(seed + parity)
    return [" ".join(map(str, 4 + parity + 2 * generator.integers(0, 28, length))) for _ in range(n)]


def planted_model():
    """Column 0 of the stream says whether the token is even. Layer 2 sends even tokens to expert 1, whose FFN writes
    column 5 for them, and nothing before layer 2 sees it; the head makes even tokens likely where column 5 is high.
    """
    model = small_model(num_hidden_layers=LAYERS)
    even = torch.where(torch.arange(61) % 2 == 0, 1.0, -1.0).double()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2 * even
        for layer in model.model.layers:
            for name in ("o_proj", "down_proj"):
                getattr(layer.blocks, name).weight[:, [0, 5]] = 0
        for layer in model.model.layers[: CELL[0]]:
            layer.router.in_proj.weight[:, 0] = 0
            for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                getattr(layer.blocks, name).weight[..., 0] = 0
        layer = model.model.layers[CELL[0]]
        layer.router.in_proj.weight.zero_()
        layer.router.in_proj.weight[0, 0] = 1.0
        layer.router.out_proj.weight.zero_()
        layer.router.out_proj.weight[:, 0] = torch.tensor([-1.0, 3.0, -1.5, -2.0])
        blocks = layer.blocks
        for name in ("gate_proj", "up_proj"):
            weight = getattr(blocks, name).weight
            weight[1, 0] = 0
            weight[1, 0, 0] = 3.0
        blocks.down_proj.weight[1, 5] = 0
        blocks.down_proj.weight[1, 5, 0] = 3.0
        model.lm_head.weight[:, 5] = 1.5 * even
    return model


@pytest.fixture(scope="module")
def model():
    return planted_model()


@pytest.fixture(scope="module")
def report(model):
    return tunable_cells(model, Letters(), prompts(0), prompts(1), top=1, draws=11, permutations=499)


def test_the_planted_feature_is_recovered(report):
    assert report.ranked()[0] == report.ranked(by="mass_resonance")[0] == CELL
    assert np.array(report.rate_a)[CELL] == 1.0
    assert np.array(report.rate_b)[CELL] == 0.0
    assert np.array(report.p_family)[CELL] == 1 / 500
    assert np.array(report.rate_a).sum(1) == pytest.approx([1] * LAYERS)
    assert np.array(report.mass_b).sum(1) == pytest.approx([1] * LAYERS)


def test_suppressing_the_planted_cell_costs_the_behaviour_more_than_any_other(report):
    effects = {(e["switch"], e["set"]): np.array(e["effect"]) for e in report.effects}
    costs = effects["suppress", "a"]
    assert np.unravel_index(costs.argmin(), costs.shape) == CELL
    assert costs[CELL] < -0.5
    assert effects["suppress", "b"][CELL] == 0  # nobody goes there
    own = next(e for e in report.effects if (e["switch"], e["set"]) == ("suppress", "a"))
    assert np.array(own["q"])[CELL] < 0.05
    low, high = np.array(own["interval"])[CELL]
    assert low <= costs[CELL] <= high < 0


def test_top_cells_cost_more_than_random_ones(report):
    top = report.top
    assert [tuple(cell) for cell in top["cells"]] == [CELL]
    assert top["a"] == pytest.approx(float(np.array(report.effects[0]["effect"])[CELL]))
    assert top["a"] < top["random_a_low"] <= top["random_a"]
    assert top["p"] == top["p_selective"] == 1 / 12
    assert all(tuple(cell) != CELL for some in top["random_cells"] for cell in some)


def test_a_suppressed_cell_gets_no_token_and_a_forced_one_all(model):
    given = (Letters(), prompts(0, 3), prompts(1, 3))
    off = resonance(model, *given, controls=suppress([CELL, (0, 3)]), permutations=9)
    for rates in (off.rate_a, off.rate_b, off.mass_a, off.mass_b):
        assert rates[CELL[0]][CELL[1]] == rates[0][3] == 0
    on = resonance(model, *given, controls=force([CELL], LAYERS), permutations=9)
    assert on.rate_a[CELL[0]][CELL[1]] == on.rate_b[CELL[0]][CELL[1]] == 1
    assert on.rate_a[0] == resonance(model, *given, permutations=9).rate_a[0]


def test_a_cell_bias_of_zero_changes_no_bit_and_use_grows_with_it(model):
    ids = torch.tensor([Letters()(t)["input_ids"] for t in prompts(1, 4)])
    free = model(ids, use_cache=False).logits
    used = []
    for bias in (0.0, 2.0, 6.0, 12.0):
        table = torch.zeros(1, LAYERS, 1, 4)
        table[0, CELL[0], 0, CELL[1]] = bias
        out = model(ids, use_cache=False, bias=table, output_routing=True)
        used.append(float(out.routing.usage(by="layer")[CELL]))
        if bias == 0:
            assert torch.equal(out.logits, free)
    assert used[0] == 0
    assert np.all(np.diff(used) >= 0)
    assert used[-1] == 1


def test_permutation_p_values_hold_their_level_and_their_family():
    single, family = [], []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        cells = generator.normal(size=(20, 3, 4))
        p, q = _permuted([cells[:8], cells[8:]], 199, seed)
        single.append((p <= 0.05).mean())
        family.append((q <= 0.05).any())
    assert 0.03 < np.mean(single) < 0.07
    assert 0.01 < np.mean(family) < 0.1


def test_sign_flips_hold_their_level_and_find_a_shift():
    level = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        counts = generator.integers(1, 9, size=(15, 1)).astype(float)
        level.append(sign_flips(generator.normal(size=(2, 15, 1)), counts, 199, seed)[:, 0] <= 0.05)
    assert 0.02 < np.mean(level) < 0.085
    shifted = np.ones((1, 15, 1)) + 0.1 * generator.normal(size=(1, 15, 1))
    assert sign_flips(shifted, counts, 999, 0)[0, 0] < 0.01
    assert mean_change(shifted, counts)(np.ones(15))[0, 0] == pytest.approx(shifted.sum() / counts.sum())


def test_prompts_have_equal_weights_and_padding_does_not_count(model):
    one, other = "4 6 8 10", "5 7 9 11 13 15 17 19 21"
    together = resonance(model, Letters(), [one, other], prompts(1, 2), permutations=3)
    apart = [resonance(model, Letters(), [t, t], prompts(1, 2), permutations=3).mass_a for t in (one, other)]
    assert np.array(together.mass_a) == pytest.approx(np.mean(apart, 0), abs=1e-12)


def test_a_report_is_saved_loaded_and_drawn(report, tmp_path):
    report.save(tmp_path)
    again = ResonanceReport.load(tmp_path)
    assert again == report
    figure = again.plot()
    assert isinstance(figure, Figure)
    assert all(ax.get_ylim()[0] < ax.get_ylim()[1] for ax in figure.axes)  # layer 0 at the bottom
    assert tuple(report.table().iloc[0][["layer", "expert"]]) == (2, "social")
    for text in (
        "suppressed together (2 social)",
        "changes in nats per token",
        "rank correlation of resonance and cost",
    ):
        assert text in str(report)


def planted_prompts(seed, n=12, difference=0.0, coupling=0.0, linked=False):
    """Rates of softmax routers; a prompt loses ``coupling`` times its rate by a cell, whatever its label, and B
    differs from A by ``difference`` in both, each in its own way or, ``linked``, in the same cells.
    """
    generator = np.random.default_rng(seed)
    shift, other = generator.normal(size=(2, 3, 4)) * difference
    other = 5 * (shift - shift.mean(-1, keepdims=True)) if linked else other  # rates of a layer sum to 1
    rates, effects, counts = [], [], []
    for label in range(2):
        logits = 0.5 * generator.normal(size=(n, 3, 4)) + label * shift
        rates.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        noise = generator.normal(size=(n, 3, 4)) + generator.normal(size=(n, 1, 1)) + label * other
        counts.append(generator.integers(5, 20, n).astype(float))
        effects.append((-(coupling * rates[-1] + 0.1 * noise).reshape(n, -1)) * counts[-1][:, None])
    return rates, effects, counts


@pytest.mark.parametrize("plant", [{}, {"coupling": 0.3}, {"difference": 1.0}])
def test_the_rank_correlation_holds_its_level_though_cells_depend_on_each_other(plant):
    found = [cost_correlation(*planted_prompts(seed, **plant), draws=99, seed=seed) for seed in range(200)]
    assert np.mean([one["p"] <= 0.05 for one in found]) < 0.085
    mean = np.mean([one["random"] for one in found])
    assert mean > 0.2 if "coupling" in plant else abs(mean) < 0.05


def test_the_rank_correlation_is_spearmans_and_finds_what_is_planted():
    rates, effects, counts = planted_prompts(1, n=20, difference=1.0, linked=True)
    got = cost_correlation(rates, effects, counts, draws=499, seed=0)
    resonance = rates[0].mean(0) - rates[1].mean(0)
    cost = effects[1].sum(0) / counts[1].sum() - effects[0].sum(0) / counts[0].sum()
    assert got["rho"] == pytest.approx(scipy.stats.spearmanr(resonance.ravel(), cost).statistic)
    assert got["p"] < 0.02
    assert got["draws"] == 499


def test_the_rank_correlation_of_a_side_that_does_not_vary_is_none():
    rates, effects, counts = planted_prompts(0)
    flat = [np.zeros_like(x) for x in effects]
    assert cost_correlation(rates, flat, counts, draws=9) == {"rho": None, "p": None, "random": None, "draws": 0}


def test_the_rank_correlation_of_a_report_is_that_of_its_tables(report):
    found = {(e["switch"], e["set"]): np.array(e["effect"]) for e in report.effects}
    cost = found["suppress", "b"] - found["suppress", "a"]
    want = scipy.stats.spearmanr(np.ravel(report.resonance), cost.ravel()).statistic
    assert report.rank_correlation["rho"] == pytest.approx(want)
    assert report.rank_correlation["draws"] == 499
    assert 1 / 500 <= report.rank_correlation["p"] <= 1


class ShareSuite:
    """Half of the answers are right without steering, a quarter under any."""

    task, higher_is_better, names, records = "quiz", True, ["all"], 8

    def score(self, model, controls):
        return np.full((8, 1), 1.0 if controls else 2.0), np.full((8, 1), 4.0)


def test_differences_of_shares_are_points(model):
    found = cell_effects(model, ShareSuite(), draws=19)
    assert (found["unit"], found["score"], found["effect"][0][0]) == ("points", 0.5, -25.0)
    both = switch_top_cells(model, [CELL], ShareSuite(), ShareSuite(), draws=1)
    assert (both["unit"], both["a"]) == ("points", -25.0)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="a holds 1 usable input"):
        resonance(model, Letters(), ["4 6"], prompts(1))
    with pytest.raises(ValueError, match="switch must be"):
        cell_effects(model, TargetSuite(prompts(0, 2), Letters()), switch="swap")
    suite = TargetSuite(prompts(0, 2), Letters())
    with pytest.raises(ValueError, match="too many"):
        switch_top_cells(model, [(l, e) for l in range(3) for e in range(3)], suite, suite, draws=1)
