"""``model.intervene``: what actions see and change, against the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model

from micro import interventions as iv
from micro.interventions import Moments

POINTS = iv.POINTS


@pytest.fixture(params=ALL_FOUR, ids="-".join)
def model(request):
    return small_model(*request.param)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("all_experts", [False, True])
def test_a_hooked_model_is_the_unhooked_one(model, ids, dtype, all_experts):
    model.to(dtype)
    plain = logits(model, ids)
    with model.intervene(*[iv.read(p) for p in POINTS], all_experts=all_experts):
        assert torch.equal(logits(model, ids), plain)
    with model.intervene():
        assert torch.equal(logits(model, ids), plain)
    assert torch.equal(logits(model, ids), plain)


def test_reading_the_residual_stream_gives_the_hidden_states(model, ids):
    with torch.no_grad(), model.intervene(iv.read("residual")) as run:
        hidden = model.model(ids, output_hidden_states=True).hidden_states
    reading = run.reading("residual")
    for layer in range(2):
        at = reading.at(layer)
        assert torch.equal(at.values, hidden[layer].flatten(0, 1))
        assert at.row.tolist() == [0] * 9 + [1] * 9
        assert at.slot.tolist() == [*range(9)] * 2
    assert torch.equal(model.model.norm(reading.at(2).values), hidden[-1].flatten(0, 1))


def test_block_outputs_of_the_chosen_experts_make_the_next_residual(ids):
    model = small_model("llama", "block")
    with torch.no_grad(), model.intervene(iv.read("block_output"), iv.read("residual")) as run:
        routing = model(ids, output_routing=True).routing
    out, residual = run.reading("block_output"), run.reading("residual")
    for layer in range(2):
        mine = out.at(layer)
        at = mine.row * 9 + mine.slot
        torch.testing.assert_close(residual.at(layer + 1).values[at], mine.values)  # weights are 1 to rounding
        assert torch.equal(mine.expert, routing.ids[layer].flatten()[at].long())


def test_all_experts_shows_every_expert_on_every_token(ids):
    model = small_model("olmo2", "block")
    with torch.no_grad(), model.intervene(iv.read("block_output"), all_experts=True) as run:
        model(ids)
    for expert in range(4):
        reading = run.reading("block_output").at(0, expert)
        with torch.no_grad(), model.intervene(iv.read("residual", layers=1)) as forced:
            model(ids, force=["logic", "social", "world", "language"][expert])
        assert len(reading) == 18
        torch.testing.assert_close(reading.values, forced.reading("residual").values)
    chosen = run.reading("block_output").at(0)
    assert int(chosen.chosen.sum()) == 18


def test_padding_never_appears(model, ids):
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad(), model.intervene(*[iv.read(p, name=p) for p in POINTS], all_experts=True) as run:
        model(ids, attention_mask=mask)
    for point in POINTS:
        reading = run.reading(point)
        assert not bool(((reading.row == 0) & (reading.slot >= 5)).any())
        assert {(r, s) for r, s in zip(reading.row.tolist(), reading.slot.tolist(), strict=True)} == {
            (r, s) for r in range(2) for s in range(5 if r == 0 else 9)
        }


def test_zeroed_heads_are_zeroed_columns_of_the_output_matrix(model, ids):
    with model.intervene(iv.zero("heads", heads=[1, 3], layers=1)):
        changed = logits(model, ids)
    layer = model.model.layers[1]
    o_proj = (layer.blocks if model.config.is_block else layer.self_attn).o_proj
    with torch.no_grad():
        o_proj.weight.unflatten(-1, (4, 8))[..., [1, 3], :] = 0
    torch.testing.assert_close(changed, logits(model, ids))


def test_scaled_units_of_one_expert_are_scaled_columns_of_its_matrix(model, ids):
    with model.intervene(iv.scale("units", 1.7, experts="social", units=[0, 39])):
        changed = logits(model, ids)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.blocks.down_proj.weight[1][:, [0, 39]] *= 1.7
    torch.testing.assert_close(changed, logits(model, ids))


def test_router_shift_is_a_bias(model, ids):
    bias = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    with model.intervene(iv.shift("router", bias)):
        changed = logits(model, ids)
    assert torch.equal(changed, logits(model, ids, bias={"logic": 0.5, "social": -1.0, "world": 2.0}))


def test_replacing_the_first_residual_by_another_runs_gives_that_run(model, ids):
    other = random_ids(2, 9, seed=5)
    with torch.no_grad(), model.intervene(iv.read("residual", layers=0)) as run:
        model(other)
    with model.intervene(iv.replace("residual", source=run.reading("residual"))):
        changed = logits(model, ids)
    assert torch.equal(changed, logits(model, other))


def test_positions_and_rows_limit_an_action(model, ids):
    where = torch.zeros(2, 9, dtype=torch.bool)
    where[1, 4:] = True
    plain = logits(model, ids)
    for positions in (where, slice(4, None), [4, 5, 6, 7, 8]):
        with model.intervene(iv.zero("ffn", rows=[1], positions=positions)):
            changed = logits(model, ids)
        assert torch.equal(changed[0], plain[0])
        assert torch.equal(changed[1, :4], plain[1, :4])
        assert not torch.equal(changed[1, 4], plain[1, 4])


def test_decoding_meets_the_same_slots(model, ids):
    with model.intervene(iv.scale("block_output", 0.5, positions=slice(6, None))):
        whole = logits(model, ids)
        with torch.no_grad():
            first = model(ids[:, :7], use_cache=True)
            second = model(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)


def test_resampled_rows_come_from_the_source(ids):
    model = small_model("llama", "block")
    with torch.no_grad(), model.intervene(iv.read("units")) as run:
        model(random_ids(4, 9, seed=3))
    source = run.reading("units")
    actions = [iv.resample("units", source, seed=1), iv.read("units", name="after")]
    with torch.no_grad(), model.intervene(*actions) as after:
        model(ids)
    reading = after.reading("after")
    for layer, expert in {(int(a), int(b)) for a, b in zip(reading.layer, reading.expert, strict=True)}:
        mine, pool = reading.at(layer, expert).values, source.at(layer, expert).values
        assert bool((mine[:, None] == pool[None]).all(-1).any(-1).all())
    with torch.no_grad(), model.intervene(*actions) as again:
        model(ids)
    assert torch.equal(again.reading("after").values, reading.values)


def test_moments_are_those_of_the_rows_read(model, ids):
    actions = [iv.moments("units", covariance=True, name="m"), iv.read("units", name="r")]
    with torch.no_grad(), model.intervene(*actions, all_experts=True) as run:
        model(ids[:, :5])
        model(ids[:, 5:])
    moments, reading = run.moments("m"), run.reading("r")
    for layer in range(2):
        for expert in range(4):
            rows = reading.at(layer, expert).values.numpy()
            assert moments.count[layer, expert] == len(rows) == 18
            np.testing.assert_allclose(moments.mean[layer, expert], rows.mean(0), atol=1e-12)
            np.testing.assert_allclose(moments.variance[layer, expert], rows.var(0, ddof=1), atol=1e-12)
            np.testing.assert_allclose(moments.covariance[layer, expert], np.cov(rows.T), atol=1e-12)


def test_merged_moments_are_those_of_everything():
    rows = torch.randn(40, 3, dtype=torch.float64)
    parts = [Moments.zeros(1, 1, 3, covariance=True, device=rows.device) for _ in range(2)]
    parts[0].add(0, 0, rows[:13])
    parts[1].add(0, 0, rows[13:])
    whole = parts[0].merge(parts[1])
    torch.testing.assert_close(whole.variance[0, 0], rows.var(0))
    torch.testing.assert_close(whole.covariance[0, 0], rows.T.cov())


def test_gates_have_the_gradient_of_finite_differences(model, ids):
    gates = torch.rand(2, 4 if model.config.is_block else 1, 4, 1, dtype=torch.float64, requires_grad=True)

    def loss(g):
        with model.intervene(iv.scale("heads", g)):
            return model(ids, labels=ids).loss

    loss(gates).backward()
    moved = gates.detach().clone()
    for at in [(0, 0, 1, 0), (1, -1, 3, 0)]:
        up, down = moved.clone(), moved.clone()
        up[at] += 1e-6
        down[at] -= 1e-6
        with torch.no_grad():
            slope = (loss(up) - loss(down)) / 2e-6
        torch.testing.assert_close(gates.grad[at], slope, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_what_was_read_predicts_a_small_shift(model, ids):
    def loss(*actions):
        with model.intervene(*actions) as run:
            return model(ids, labels=ids).loss, run

    value, run = loss(iv.read("ffn", layers=0, keep_graph=True))
    (part,) = run.parts("ffn")
    (gradient,) = torch.autograd.grad(value, part.values)
    step = torch.randn(32, dtype=torch.float64) * 1e-6
    up, down = (loss(iv.shift("ffn", sign * step, layers=0))[0] for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2, (gradient @ step).sum(), rtol=1e-5, atol=1e-12)
    assert torch.equal(value, model(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.zero("nowhere"), "point is 'nowhere'"),
        (lambda: iv.zero("units", heads=[0]), "heads are columns"),
        (lambda: iv.zero("units", units=[40]), "units: 40 does not exist"),
        (lambda: iv.zero("units", layers=2), "layers: 2 does not exist"),
        (lambda: iv.zero("residual", experts="logic"), "belong to tokens"),
        (lambda: iv.zero("units", experts="maths"), "maths"),
        (lambda: iv.scale("units", torch.ones(3)), "does not fit"),
        (lambda: iv.zero("units", units=torch.ones(3, dtype=torch.bool)), "a mask has shape"),
        (lambda: iv.replace("units"), "give value or source"),
        (lambda: iv.zero("units", positions=[3, -1]), "positions: expected numbers from 0 on"),
        (lambda: iv.zero("units", positions=slice(-2, None)), "positions: expected numbers from 0 on"),
        (lambda: iv.zero("units", positions=slice(0, 4, 0)), "step 0"),
        (lambda: iv.zero("units", rows=[-1]), "rows: expected numbers from 0 on"),
        (lambda: iv.read("units", experts="logic", keep_graph=True), "takes whole rows"),
    ],
)
def test_wrong_actions_are_refused(make, message, ids):
    model = small_model()
    with pytest.raises(ValueError, match=message), model.intervene(make()):
        pass


def test_a_name_that_an_action_without_one_would_get_is_refused(ids):
    actions = [iv.read("units"), iv.read("units"), iv.read("ffn", name="units_1")]
    with (
        pytest.raises(ValueError, match="action 1 would be named 'units_1', as another is"),
        small_model().intervene(*actions),
    ):
        pass


def test_two_open_blocks_and_missing_names_are_refused(ids):
    model = small_model()
    with model.intervene(iv.read("units")) as run:
        with model.intervene(iv.read("ffn")), pytest.raises(ValueError, match=r"two model\.intervene blocks"):
            model(ids)
        with pytest.raises(ValueError, match="nothing was read"):
            run["units"]
        with pytest.raises(KeyError, match="no action named"):
            run["ffn"]
