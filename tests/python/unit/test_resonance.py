import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small_models import small_model

from micro.analysis.resonance import (
    ResonanceReport,
    TargetSuite,
    _permuted,
    cell_effects,
    force,
    resonance,
    suppress,
    switch_top_cells,
    tunable_cells,
)
from micro.analysis.steering_matrix import mean_change, sign_flips

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
    assert isinstance(again.plot(), Figure)
    assert tuple(report.table().iloc[0][["layer", "expert"]]) == (2, "social")
    assert "suppressed together (2 social)" in str(report)
    assert -1 <= report.rank_correlation["rho"] <= 1


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="a holds 1 usable input"):
        resonance(model, Letters(), ["4 6"], prompts(1))
    with pytest.raises(ValueError, match="switch must be"):
        cell_effects(model, TargetSuite(prompts(0, 2), Letters()), switch="swap")
    suite = TargetSuite(prompts(0, 2), Letters())
    with pytest.raises(ValueError, match="too many"):
        switch_top_cells(model, [(l, e) for l in range(3) for e in range(3)], suite, suite, draws=1)
