"""Agreement of checkpoints, from decisions that the test plants."""

import numpy as np
import pytest
import torch
from small_models import small_model

from micro.analysis.routes.agreement_report import AgreementReport, _fresh_routers, _other_samples, agreement, compare
from micro.experts import NAMES
from micro.testing import tiny_tokenizer

E = 4


def decisions(generator, samples=40, layers=6, p=None):
    return [generator.choice(E, size=(layers, int(n)), p=p) for n in generator.integers(5, 30, size=samples)]


def changed(generator, given, share):
    """Each decision is drawn anew with this chance."""
    return [np.where(generator.uniform(size=d.shape) < share, generator.integers(0, E, size=d.shape), d) for d in given]


def test_equal_checkpoints_agree_and_unrelated_ones_do_not():
    generator = np.random.default_rng(0)
    a = decisions(generator)
    report = compare({"a": a, "b": a, "c": changed(generator, a, 1)}, NAMES, draws=300)
    same, other, _ = report.pairs
    assert (same["agreement"], same["kappa"], same["divergence"], same["variation"]) == (1, 1, 0, 0)
    assert same["correlation"] == pytest.approx([1] * E) and same["kappa_interval"] == [1, 1]
    low, high = other["kappa_interval"]
    assert low < 0 < high and abs(other["kappa"]) < 0.03 and other["agreement"] == pytest.approx(0.25, abs=0.02)


def test_kappa_recovers_the_share_that_was_kept():
    generator = np.random.default_rng(1)
    a = decisions(generator, samples=150)
    pair = compare({"a": a, "b": changed(generator, a, 0.4)}, NAMES, draws=300).pairs[0]
    assert pair["kappa"] == pytest.approx(0.6, abs=0.02)
    low, high = pair["kappa_interval"]
    assert low < 0.6 < high and high - low < 0.05
    assert pair["kappa_by_layer"] == pytest.approx([0.6] * 6, abs=0.04)


def test_kappa_is_that_of_a_contingency_table():
    generator = np.random.default_rng(2)
    a = decisions(generator, layers=2, p=[0.7, 0.1, 0.1, 0.1])
    b = changed(generator, a, 0.5)
    got = compare({"a": a, "b": b}, NAMES, draws=20).pairs[0]
    for layer in range(2):
        x, y = (np.concatenate([d[layer] for d in side]) for side in (a, b))
        table = np.array([[np.mean((x == i) & (y == j)) for j in range(E)] for i in range(E)])
        chance = table.sum(1) @ table.sum(0)
        assert got["kappa_by_layer"][layer] == pytest.approx((np.trace(table) - chance) / (1 - chance))
        p, q = table.sum(1), table.sum(0)
        m = (p + q) / 2
        divergence = (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2
        assert got["divergence_by_layer"][layer] == pytest.approx(divergence)
        assert got["variation_by_layer"][layer] == pytest.approx(np.abs(p - q).sum() / 2)


def test_usage_may_agree_where_tokens_do_not():
    """Why kappa is reported and not usage alone: shuffled tokens keep the usage."""
    generator = np.random.default_rng(3)
    a = decisions(generator, samples=200)
    pair = compare({"a": a, "b": [generator.permuted(d, axis=1) for d in a]}, NAMES, draws=100).pairs[0]
    assert pair["divergence"] == 0 and pair["correlation"] == pytest.approx([1] * E)
    assert abs(pair["kappa"]) < 0.1  # not 0: a short sample keeps its own usage


def test_divergence_of_opposite_routers_is_its_maximum():
    zero, one = [np.zeros((3, 5), int)] * 4, [np.ones((3, 5), int)] * 4
    pair = compare({"a": zero, "b": one}, NAMES, draws=20).pairs[0]
    assert pair["divergence"] == pytest.approx(np.log(2)) and pair["variation"] == 1 and pair["agreement"] == 0
    constant = compare({"a": zero, "b": zero}, NAMES, draws=20).pairs[0]
    assert constant["kappa"] is None and constant["correlation"] == [None] * E  # chance agreement is 1: no kappa


def test_correlation_over_samples_is_pearsons():
    generator = np.random.default_rng(4)
    a, b = [], []
    for _ in range(30):
        p = generator.dirichlet(np.ones(E))
        a.append(generator.choice(E, size=(3, 25), p=p))
        b.append(generator.choice(E, size=(3, 25), p=p))
    got = compare({"a": a, "b": b}, NAMES, draws=50).pairs[0]["correlation"]
    shares = [np.array([[np.mean(d == e) for e in range(E)] for d in side]) for side in (a, b)]
    want = [np.corrcoef(shares[0][:, e], shares[1][:, e])[0, 1] for e in range(E)]
    assert got == pytest.approx(want) and min(got) > 0.8


def test_the_null_of_other_samples_sees_what_positions_alone_explain():
    generator = np.random.default_rng(5)
    by_position = [np.tile(np.arange(20) % E, (3, 1)) for _ in range(12)]  # the same route for every text
    null = _other_samples("a", by_position, E, 5, 0)
    assert null["kappa"] == 1  # so a kappa of 1 between checkpoints would mean nothing here
    null = _other_samples("a", decisions(generator, samples=60), E, 10, 0)
    assert abs(null["kappa"]) < 0.05 and 0 < null["divergence"] < 0.01
    assert null["kappa_interval"][0] <= null["kappa"] <= null["kappa_interval"][1]


def test_other_samples_are_never_the_sample_itself():
    one_each = [np.full((2, 6), i % E) for i in range(E)]  # every sample has its own expert
    assert _other_samples("a", one_each, E, 30, 0)["agreement"] == 0


def test_checkpoints_on_other_slots_are_refused():
    with pytest.raises(ValueError, match="same samples"):
        compare({"a": [np.zeros((2, 3))], "b": [np.zeros((2, 4))]}, NAMES)
    with pytest.raises(ValueError, match="no sample"):
        compare({"a": [np.zeros((2, 0))], "b": [np.zeros((2, 0))]}, NAMES)


# ---------------------------------------------------------------------- with models


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


TEXTS = ["The sum of 12 and 7 is 19.", "Mia feels sad because she thinks that Tom forgot.", "Rivers carry sand."]


def model_of(tokenizer, seed=0):
    return small_model(dtype=torch.float32, seed=seed, vocab_size=len(tokenizer))


def test_a_checkpoint_agrees_with_itself_and_less_with_fresh_routers(tokenizer, tmp_path):
    model, other = model_of(tokenizer), model_of(tokenizer, seed=1)
    other.save_pretrained(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    given = {"start": model, "again": model, "other": tmp_path}
    report = agreement(given, tokenizer, TEXTS, null_draws=3, fresh_routers=2, draws=30)
    assert report.pairs[0]["agreement"] == 1
    assert report.pairs[1]["agreement"] == report.pairs[2]["agreement"] < 1
    assert [n["second"] for n in report.nulls] == ["other samples", "fresh router"]
    assert report.nulls[1]["agreement"] < 1 and report.nulls[1]["draws"] == 2
    for name, value in model.state_dict().items():  # the routers are what they were
        assert torch.equal(value, before[name]), name
    assert report.tokens == sum(len(tokenizer(t)["input_ids"]) - 1 for t in TEXTS)
    report.save(tmp_path / "out")
    assert AgreementReport.load(tmp_path / "out") == report
    assert len(report.table()) == 5 and "fresh router" in str(report)
    assert len(report.plot().axes) == 2


def test_fresh_routers_are_not_those_of_an_upcycled_model_of_the_same_seed(tokenizer):
    model = model_of(tokenizer)
    model.reset_routers(torch.Generator().manual_seed(0))
    start = model.model.layers[0].router.in_proj.weight.clone()
    seen = []
    for draw in range(2):
        with _fresh_routers(model, 0, draw):
            seen.append(model.model.layers[0].router.in_proj.weight.clone())
    assert not torch.equal(seen[0], start) and not torch.equal(seen[0], seen[1])
    with _fresh_routers(model, 0, 1):
        assert torch.equal(model.model.layers[0].router.in_proj.weight, seen[1])


def test_one_checkpoint_or_other_experts_are_refused(tokenizer):
    model = model_of(tokenizer)
    with pytest.raises(ValueError, match="at least two"):
        agreement({"a": model}, tokenizer, TEXTS)
    two = small_model(dtype=torch.float32, vocab_size=len(tokenizer), num_experts=2)
    with pytest.raises(ValueError, match="b has other layers or experts"):
        agreement({"a": model, "b": two}, tokenizer, TEXTS, fresh_routers=0)
