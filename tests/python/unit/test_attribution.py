import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small_models import ALL_FOUR, random_ids, small_model

from micro import interventions as iv
from micro.analysis.steering.attribution import AttributionReport, attribution, entanglement
from micro.analysis.steering.router_parts import RouterSplit, router_split


class Letters:
    """A tokenizer of 61 letters: enough for texts."""

    pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [3 + ord(c) % 58 for c in text]}


def texts(n, length=24, seed=0):
    generator = np.random.default_rng(seed)
    return ["".join(map(chr, generator.integers(97, 123, length))) for _ in range(n)]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("backbone, kind", ALL_FOUR)
def test_parts_sum_to_the_logits(backbone, kind, k):
    model = small_model(backbone, kind, num_hidden_layers=4, num_experts_per_tok=k)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    split = router_split(model, random_ids(2, 9), mask)
    assert split.logits.shape == (15, 4, 4)
    assert split.writes.shape == (4, 2, 15, k, 4, 4)
    assert split.error < 1e-9
    single = router_split(model.float(), random_ids(2, 9), mask)
    assert single.error < 1e-4
    assert float(single.logits.abs().max()) > 1  # the bound says something


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("backbone, kind", ALL_FOUR)
def test_heads_sum_to_attention(backbone, kind, k):
    model = small_model(backbone, kind, num_hidden_layers=3, num_experts_per_tok=k)
    split = router_split(model, random_ids(2, 6), heads=True)
    assert split.heads.shape == (3, 12, k, 4, 3, 4)
    assert torch.allclose(split.heads.sum(3), split.writes[:, 0], atol=1e-10)
    assert float(split.heads.abs().max()) > 0.1
    both = RouterSplit.cat([split, split])
    assert torch.equal(both.heads[:, 12:], split.heads)


@pytest.mark.parametrize("rule", ["probability", "straight_through"])
def test_parts_sum_under_other_weight_rules(rule):
    model = small_model(num_hidden_layers=3, num_experts_per_tok=2, weight_rule=rule)
    assert router_split(model, random_ids(2, 7)).error < 1e-9


def test_parts_sum_under_steering_with_fewer_experts_than_asked_for():
    model = small_model(num_hidden_layers=3, num_experts_per_tok=3)
    split = router_split(model, random_ids(2, 7), ablate=["logic", "social"])
    assert split.error < 1e-9
    assert set(split.ids.unique().tolist()) == {-1, 2, 3}


@pytest.mark.parametrize("backbone", ["llama", "olmo2"])
def test_removing_one_writer_moves_the_next_logit_by_its_part(backbone):
    model = small_model(backbone, num_hidden_layers=3)
    ids = random_ids(2, 8)
    split = router_split(model, ids)
    for expert in range(4):
        without = router_split(model, ids, actions=[iv.zero("ffn", layers=1, experts=expert)])
        moved = split.logits[:, 2] - without.logits[:, 2]
        fired = split.ids[1, :, 0] == expert
        assert torch.allclose(moved[fired], split.writes[1, 1, fired, 0, 2], atol=1e-10)
        assert float(moved[~fired].abs().max()) < 1e-10
        assert float(moved[fired].abs().max()) > 0.1


def planted_signal(layers=4):
    """The embedding carries one direction, +1 or -1 by the token; only layer 3's router reads it. No other writer
    touches the direction.
    """
    model = small_model(num_hidden_layers=layers)
    d = torch.zeros(32, dtype=torch.float64)
    d[0] = 1.0
    sign = torch.where(torch.arange(61) % 2 == 0, 1.0, -1.0).double()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = 3 * sign
        for layer in model.model.layers:
            layer.blocks.o_proj.weight[:, 0] = 0
            layer.blocks.down_proj.weight[:, 0] = 0
        router = model.model.layers[3].router
        router.in_proj.weight.zero_()
        router.in_proj.weight[0] = d
        router.out_proj.weight.zero_()
        router.out_proj.weight[:, 0] = torch.tensor([2.0, -2.0, 0.5, -0.5])
    return model


def test_a_planted_persistent_signal_is_found():
    model = planted_signal()
    report = attribution(model, Letters(), texts(6), random_readers=3, shifts=19)
    assert report.share[3][0] == pytest.approx(1.0, abs=1e-9)
    assert np.abs(np.array(report.share[3])[1:]).max() < 1e-9
    assert report.share_random_high[3][0] < 0.9
    assert np.array(report.share).sum(1) == pytest.approx([1] * 4)
    assert report.max_error < 1e-9
    influence = np.array(report.influence)
    assert influence[3].argmax() == 0
    # nobody writes into the past, nor into the layer's own router
    assert influence[0, 1:].max() == influence[1, 3:].max() == influence[2, 5:].max() == 0


def planted_split(tokens=400, layers=3, seed=0):
    """Noise everywhere; in layer 0 expert 1 writes +2 into expert 3 of layer 2."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, 2, tokens, 1, layers, 4)
    writes = torch.randn(shape, generator=generator, dtype=torch.float64)
    for writer in range(layers):
        writes[writer, :, :, :, : writer + 1] = 0
    ids = torch.randint(4, (layers, tokens, 1), generator=generator)
    writes[0, 1, :, 0, 2, 3] += 2.0 * (ids[0, :, 0] == 1)
    zero = torch.zeros(tokens, layers, 4, dtype=torch.float64)
    row = torch.arange(tokens) // 20
    return RouterSplit(zero, zero, writes, ids, row, torch.arange(tokens) % 20)


def test_the_planted_promotion_is_found_and_noise_is_not():
    effect, p, rate = entanglement(planted_split(), 4, 199, seed=1)
    assert rate.sum(1) == pytest.approx([1, 1, 1])
    assert np.unravel_index(np.nanargmax(effect), effect.shape) == (0, 1, 2, 3)
    assert effect[0, 1, 2, 3] == pytest.approx(2.0 * 0.75, abs=0.5)  # centred over the four experts
    assert p[0, 1, 2, 3] == 1 / 200
    assert np.isnan(effect[1, :, :2]).all()
    noise = p[1, :, 2].ravel()
    assert (noise < 0.05).mean() < 0.3


def runs(generator, rows, width):
    """[rows, 20, width]: values that stay for five tokens, from a random place of the circle on."""
    values = torch.randn(rows, 4, width, generator=generator, dtype=torch.float64).repeat_interleave(5, 1)
    moves = torch.randint(20, (rows,), generator=generator).tolist()
    return torch.stack([row.roll(move, 0) for row, move in zip(values, moves, strict=True)])


def test_p_values_hold_their_level_where_choices_are_autocorrelated():
    small = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        split = planted_split(tokens=200, seed=seed)
        split.ids[1, :, 0] = runs(generator, 10, 4).argmax(-1).flatten()
        split.writes[1, 0, :, 0, 2] = 3 * runs(generator, 10, 4).flatten(0, 1)
        _, p, _ = entanglement(split, 4, 99, seed=seed)
        small.append((p[1, :, 2] <= 0.05).mean())
    assert 0.02 < np.mean(small) < 0.09


def test_a_report_is_saved_loaded_and_drawn(tmp_path):
    report = attribution(small_model(num_hidden_layers=3), Letters(), texts(4), shifts=9, random_readers=2)
    report.save(tmp_path)
    again = AttributionReport.load(tmp_path)
    assert again == report
    figure = again.plot()
    assert isinstance(figure, Figure)
    assert all(ax.get_ylim()[0] < ax.get_ylim()[1] for ax in figure.axes)  # depth grows upward
    assert "parts sum to the logits" in str(report)
    assert len(report.cells()) <= 4 * 4 * 3
    assert report.table().share.groupby(report.table().layer).sum().tolist() == pytest.approx([1, 1, 1])


def test_shares_do_not_depend_on_batches():
    model, given = small_model(num_hidden_layers=3), texts(9)
    runs = [attribution(model, Letters(), given, max_tokens=n, shifts=0, random_readers=2) for n in (24, 1000)]
    for field in ("influence", "share", "share_random_high", "entanglement"):
        one, other = (np.array(getattr(run, field), dtype=float) for run in runs)
        assert one == pytest.approx(other, abs=1e-9, nan_ok=True)
    split = router_split(model, torch.tensor([Letters()(t)["input_ids"] for t in given]))
    keep = split.slot < 23
    parts = torch.cat([split.embedding[None], split.writes.sum(3).flatten(0, 1)])[:, keep]
    parts = parts - parts.mean(-1, keepdim=True)
    assert np.array(runs[0].influence) == pytest.approx(parts.var(1, correction=0).mean(-1).T.numpy(), abs=1e-9)


def test_what_is_left_out_and_refused():
    model = small_model()
    few = attribution(model, Letters(), texts(8), token_limit=30, max_tokens=48, shifts=0, random_readers=0)
    assert few.tokens == 46  # two rows of 23 predicting tokens
    assert set(np.array(few.share_random).ravel()) == {None}
    assert "random" not in str(few)
    assert isinstance(few.plot(), Figure)
    with pytest.raises(ValueError, match="data is empty"):
        attribution(model, Letters(), [])
    with pytest.raises(ValueError, match="positions must be one of predicting, all"):
        attribution(model, Letters(), texts(1), positions="last")
    with pytest.raises(ValueError, match="none of the 1 inputs"):
        attribution(model, Letters(), ["a"])
