"""Patching, removal, head gating and self-repair, on models whose truth was planted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_config, small_model

from micro import interventions as iv
from micro.analysis.circuits import (
    Component,
    GatingResult,
    PatchingResult,
    PromptPair,
    RemovalResult,
    RepairResult,
    components,
    patching,
    removal,
    self_repair,
)
from micro.analysis.circuits.gating import CLASSES, _Task
from micro.analysis.circuits.prompts import encode_pair
from micro.modeling import MiCRoForCausalLM
from micro.progress import Progress


@pytest.fixture(params=ALL_FOUR, ids="-".join)
def model(request):
    return small_model(*request.param)


def pairs(count=3, slots=6):
    clean, corrupt = random_ids(count, slots, seed=2), random_ids(count, slots, seed=3)
    return [
        PromptPair(a.tolist(), b.tolist(), [5 + i], [20 + i])
        for i, (a, b) in enumerate(zip(clean, corrupt, strict=True))
    ]


# ---- patching ---------------------------------------------------------------------------------------------------


def test_patching_everything_is_one_and_nothing_is_zero(model):
    if model.config.is_block:
        result = patching(model, None, pairs(), point="block_output", level="layer")
        last = [part["layer"] for part in result.components].index(1)
        np.testing.assert_allclose(result.effect[last], 1, atol=1e-9)  # routes are the clean ones
    first = patching(model, None, pairs(), point="residual", level="layer")
    np.testing.assert_allclose(first.effect[0], 1, atol=1e-9)
    same = [PromptPair(p.clean, p.clean, p.answer, p.wrong) for p in pairs()]
    with pytest.raises(ValueError, match="the same logits"):
        patching(model, None, same)


def test_cells_of_the_last_layer_at_the_last_slot_carry_all(model):
    result = patching(model, None, pairs(), point="residual", level="slot")
    last = [effect for part, effect in zip(result.components, result.effect, strict=True) if part["slot"] == 5]
    assert np.abs(np.asarray(last) - 1).max() > 1e-3  # other slots speak through attention
    with torch.no_grad():
        for layer in model.model.layers:
            (layer.blocks if model.config.is_block else layer.self_attn).v_proj.weight.zero_()
    result = patching(model, None, pairs(), point="residual", level="slot")
    for part, effect in zip(
        result.components, result.effect, strict=True
    ):  # without attention only the last slot counts
        np.testing.assert_allclose(effect, float(part["slot"] == 5), atol=1e-9)


def test_batches_of_interventions_are_the_single_ones(model):
    many = patching(model, None, pairs(1), point="heads", level="head", batch=7)
    one = patching(model, None, pairs(1), point="heads", level="head", batch=1)
    np.testing.assert_allclose(many.effect, one.effect, rtol=1e-9, atol=1e-12)


def test_the_screen_is_exact_where_the_model_is_linear_behind_the_point():
    """Behind the last layer's output stands the final norm only; a small difference is read linearly."""
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].blocks.gate_proj.weight.zero_()  # the last FFN gives 0
    ids = random_ids(1, 6, seed=2)[0].tolist()
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[60] = table[ids[-1]] + 1e-5 * torch.randn(32, dtype=torch.float64)
    pair = PromptPair(ids, [*ids[:-1], 60], [5], [20])
    result = patching(model, None, [pair], point="residual", level="slot")
    np.testing.assert_allclose(result.screen, result.effect, atol=2e-4)
    assert np.abs(result.effect).max() > 0.5


def test_the_screen_keeps_the_largest_components():
    model = small_model()
    whole = patching(model, None, pairs(), point="heads", level="head")
    top = patching(model, None, pairs(), point="heads", level="head", top=5)
    assert len(top.components) == 5
    assert top.settings["screened"] == len(whole.components) - 5
    at = [whole.components.index(c) for c in top.components]
    np.testing.assert_allclose(np.asarray(whole.effect)[at], top.effect)


def test_a_planted_copy_head_is_the_only_one_that_carries():
    model, head = copying_model()
    clean, corrupt = [7, 3, 4, 9], [8, 3, 4, 9]
    result = patching(model, None, [PromptPair(clean, corrupt, [7], [8])], point="heads", level="head")
    for part, effect in zip(result.components, result.effect, strict=True):
        expected = 1.0 if (part["layer"], part["head"]) == head and part["expert"] == 2 else 0.0
        assert effect[0] == pytest.approx(expected, abs=1e-6), part


def copying_model():
    """Layer 0, expert world, head 1 reads all tokens' embeddings into the last slot; nothing else happens. Every token
    has a 1 in column 0, by which the routers choose world.
    """
    torch.manual_seed(0)
    config = small_config(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    model = MiCRoForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        table = torch.randn(61, 32, dtype=torch.float64)
        table[:, 0] = 1
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.copy_(table)
        for layer in model.model.layers:
            layer.router.in_proj.weight[0, 0] = 1
            layer.router.out_proj.weight[2, 0] = 5
        blocks = model.model.layers[0].blocks
        blocks.v_proj.weight[2, 32:] = torch.eye(32)
        blocks.o_proj.weight[2, :, 32:] = torch.eye(32)
    return model, (0, 1)


def test_free_routes_take_each_runs_own(model):
    result = patching(model, None, pairs(), routes="free")
    assert np.isfinite(result.effect).all()
    assert result.settings["routes"] == "free"


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="equal, positive length"):
        encode_pair(PromptPair([1, 2], [1], [3], [4]), None, 0)
    with pytest.raises(ValueError, match="same token"):
        encode_pair(PromptPair([1], [2], [3], [3]), None, 0)
    with pytest.raises(ValueError, match="give a tokenizer"):
        encode_pair(PromptPair("a", "b", "c", "d"), None, 0)
    with pytest.raises(ValueError, match='belongs to the point "heads"'):
        components(small_config(), "ffn", "head")


# ---- removal ----------------------------------------------------------------------------------------------------


class LogitSuite:
    """Logit of a token at the last slot of fixed prompts, per task."""

    names = ("first", "second")
    records = 4

    def __init__(self):
        self.ids = random_ids(4, 6, seed=8)

    def score(self, model, controls):
        with torch.no_grad():
            out = model(self.ids, logits_to_keep=1, **controls).logits[:, 0]
        return out[:, [5, 9]].double().numpy(), np.ones((4, 2))


def test_removal_is_what_an_intervention_gives(model):
    suite = LogitSuite()
    result = removal(model, suite, only=[Component("heads", 1, None, 2)])
    plain = suite.score(model, {})[0].mean(0)
    with model.intervene(iv.zero("heads", layers=1, heads=[2])):
        expected = suite.score(model, {})[0].mean(0) - plain
    np.testing.assert_allclose(result.change[0], expected)
    assert result.intact == pytest.approx(plain.tolist())
    np.testing.assert_allclose(result.selectivity[0][0], expected[0] - expected[1])


def test_mean_and_resample_take_their_values_from_the_reference(model):
    ids = random_ids(1, 1, seed=4)  # one row: its mean and any draw are the row itself
    parts = [Component("ffn", 0)]
    options = {"point": "ffn", "only": parts, "reference": ids}
    results = [removal(model, LogitSuite(), how=how, **options) for how in ("mean", "resample")]
    with torch.no_grad(), model.intervene(iv.read("ffn", layers=0), all_experts=True) as run:
        model(ids)
    rows = run.reading("ffn").values
    plain = LogitSuite().score(model, {})[0].mean(0)
    with model.intervene(iv.replace("ffn", rows[None], layers=0)):
        expected = LogitSuite().score(model, {})[0].mean(0) - plain
    np.testing.assert_allclose(results[0].change[0], expected, atol=1e-12)
    np.testing.assert_allclose(results[0].change, results[1].change, atol=1e-12)
    with pytest.raises(ValueError, match="needs reference"):
        removal(model, LogitSuite(), point="ffn", only=parts, how="mean")


# ---- head gating ------------------------------------------------------------------------------------------------


class PlantedTask(_Task):
    """Head (0,0,0) is needed, (0,1,1) harms, the rest does nothing."""

    def __init__(self):
        self.shape = (1, 2, 2)
        self.work = [{"labels": torch.zeros(1, 2, dtype=torch.long)}]

    def _batch_loss(self, batch, gates):
        return 2 * (1 - gates[0, 0, 0]) + 2 * gates[0, 1, 1]


@pytest.mark.parametrize("seed", range(5))
def test_needed_harmful_and_idle_heads_get_their_labels(seed):
    task = PlantedTask()
    with Progress("t", total=1, enabled=False) as bar:
        start = task.fit(None, 0.0, 60, 0.2, seed, bar)
        plus, minus = (task.fit(start, strength, 150, 0.2, seed, bar) for strength in (0.2, -0.2))
    result = GatingResult(
        ["a", "b"], [start.sigmoid().tolist()], [plus.sigmoid().tolist()], [minus.sigmoid().tolist()], {}, {}, 1
    )
    labels = [CLASSES[i] for i in result.labels().flatten()]
    assert labels == ["facilitating", "irrelevant", "irrelevant", "interfering"]


def test_auxiliary_losses_and_noise_are_none_of_the_gates_business():
    ids = random_ids(3, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    plain = _Task(small_model(), [batch], {})
    noisy = small_model(jitter_noise=0.1, loss_coefficients={"load_balancing_loss": 0.5}).train()
    loss = _Task(noisy, [batch], {}).loss(torch.ones(plain.shape))
    assert loss == pytest.approx(plain.loss(torch.ones(plain.shape)))
    assert noisy.training


def test_a_model_in_training_mode_gives_the_same_circuits():
    plain, noisy = small_model(), small_model(jitter_noise=0.1).train()
    assert self_repair(noisy, None, prompts()) == self_repair(plain, None, prompts())
    assert patching(noisy, None, pairs()).effect == patching(plain, None, pairs()).effect
    assert noisy.training


def test_pairs_that_the_model_hardly_tells_apart_do_not_decide_the_mean():
    model = small_model()
    twin = pairs(1)[0]
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table[60] = table[twin.clean[-1]] + 1e-5
    near = PromptPair(twin.clean, [*twin.clean[:-1], 60], twin.answer, twin.wrong)
    result = patching(model, None, [*pairs(3), near])
    assert result.excluded == 1
    assert len(result.clean) == 3


def test_the_gates_loss_is_the_models(model):
    ids = random_ids(3, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    task = _Task(model, [batch], {})
    with torch.no_grad():
        assert task.loss(torch.ones(task.shape)) == pytest.approx(float(model(**batch).loss))
        layer = model.model.layers[0]
        o_proj = (layer.blocks if model.config.is_block else layer.self_attn).o_proj
        gates = torch.ones(task.shape)
        gates[0, :, 1] = 0
        gated = task.loss(gates)
        o_proj.weight.unflatten(-1, (4, 8))[..., 1, :] = 0
        assert gated == pytest.approx(float(model(**batch).loss))


# ---- self-repair ------------------------------------------------------------------------------------------------


def prompts(count=3):
    return [(row.tolist(), [7 + i]) for i, row in enumerate(random_ids(count, 6, seed=6))]


@pytest.fixture(params=[b for b in ALL_FOUR if b != ("olmo2", "ffn")], ids="-".join)
def repairable(request):
    return small_model(*request.param)


def test_total_is_direct_minus_what_every_later_write_compensates(repairable):
    result = self_repair(repairable, None, prompts())
    for part in ("attention", "ffn"):
        left = np.asarray(result.direct[part]) - np.asarray(result.compensation[part]).sum(1)
        np.testing.assert_allclose(result.total_replayed[part], left, atol=1e-9)


def test_without_later_layers_total_is_direct(repairable):
    result = self_repair(repairable, None, prompts(), parts=["ffn"], layers=[1])
    np.testing.assert_allclose(result.total_replayed["ffn"], result.direct["ffn"], atol=1e-9)
    np.testing.assert_allclose(result.total_free["ffn"], result.direct["ffn"], atol=1e-9)
    assert result.table()["layer"].tolist() == [1]  # the layer that was removed, not its place in the list


def test_a_planted_backup_unit_repairs_what_is_removed():
    """Layer 0 writes the target; layer 1 writes it only where layer 0 did not."""
    model = small_model(num_experts=4, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 4.0
        model.lm_head.weight[7, 1] = 1.0
        for layer, gate_of_target in ((0, 0.0), (1, -8.0)):
            blocks = model.model.layers[layer].blocks
            blocks.gate_proj.weight[:, 0, 0] = 1.0
            blocks.gate_proj.weight[:, 0, 1] = gate_of_target
            blocks.up_proj.weight[:, 0, 0] = 1.0
            blocks.down_proj.weight[:, 1, 0] = 1.0
    result = self_repair(model, None, [([1, 2, 3], [7])], parts=["ffn"])
    replayed, free = result.repaired("ffn")
    assert result.direct["ffn"][0] > 0
    assert replayed[0] > 0.8
    assert free[0] == pytest.approx(replayed[0])  # the router sees no difference
    assert result.compensation["ffn"][0][1] > 0


# ---- results ----------------------------------------------------------------------------------------------------


def test_results_print_draw_and_come_back_from_disk(tmp_path):
    model = small_model()
    gates = np.random.default_rng(0).random((2, 2, 4, 4)).tolist()
    gating = GatingResult(
        list(model.config.expert_names), gates, gates, gates, {"intact": [1.0]}, {"irrelevant": [1.0]}, 2
    )
    for result, kind in [
        (patching(model, None, pairs(2)), PatchingResult),
        (removal(model, LogitSuite(), point="ffn", level="cell"), RemovalResult),
        (self_repair(model, None, prompts(2)), RepairResult),
        (gating, GatingResult),
    ]:
        result.save(tmp_path)
        assert kind.load(tmp_path) == result
        json.loads((tmp_path / f"{result.name}.json").read_text())
        assert len(str(result)) > 50
        figure = result.plot()
        figure.savefig(tmp_path / f"{result.name}.png")
        assert all(ax.get_ylim()[0] < ax.get_ylim()[1] for ax in figure.axes)  # layer 0 at the bottom of maps
