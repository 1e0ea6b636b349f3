"""``iv.variants``: interventions side by side against one by one."""

from __future__ import annotations

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model

from micro import interventions as iv
from micro.modeling import MiCRoCache


@pytest.fixture(params=ALL_FOUR, ids="-".join)
def model(request):
    return small_model(*request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids():
    return random_ids(1, 12)


@torch.no_grad()
def alone(model, ids, actions, prefix, **controls):
    cache = MiCRoCache(model.config)
    if prefix:
        model(ids[:, :prefix], past_key_values=cache)
    with model.intervene(*actions):
        return model(ids[:, prefix:], past_key_values=cache, **controls).logits[0]


def plans(model, ids):
    with torch.no_grad(), model.intervene(iv.read("ffn", name="f"), all_experts=True) as run:
        model(random_ids(1, 12, seed=4))
    source = run.reading("f")
    behind = slice(5, None)
    return [
        [],
        [iv.zero("heads", heads=[1], positions=behind)],
        [iv.scale("units", 0.3, experts="social", positions=[7, 8])],
        [iv.shift("residual", 0.5, layers=1, positions=[6]), iv.scale("block_output", 0.7, positions=[11])],
        [iv.replace("ffn", source=source, layers=[1], positions=behind)],
        [iv.resample("ffn", source, seed=5, positions=behind)],
        [iv.zero("units", rows=[1], positions=behind)],  # no such row: nothing
    ]


def test_side_by_side_is_one_by_one(model, ids):
    lists = plans(model, ids)
    for batch in (3, 8):
        got = iv.variants(model, ids, lists, batch=batch)
        assert got.shape == (7, 12 - 5, 61)
        for k, actions in enumerate(lists):
            assert torch.equal(got[k], alone(model, ids, actions, 5)), k
    assert torch.equal(got[0], got[6])


def test_a_shared_prefix_changes_no_bit(model, ids):
    lists = plans(model, ids)
    assert torch.equal(iv.variants(model, ids[0], lists, prefix=0)[:, 5:], iv.variants(model, ids, lists))


def test_controls_differ_from_row_to_row(model, ids):
    controls = [{}, {"ablate": "logic"}, {"bias": {"world": 3.0}}, {"keep": ["social", "language"]}, {"force": "world"}]
    lists = [[iv.scale("ffn", 1.0 + k / 10)] for k in range(5)]
    got = iv.variants(model, ids, lists, controls=controls, prefix=4, batch=5)
    for k, (actions, steering) in enumerate(zip(lists, controls, strict=True)):
        assert torch.equal(got[k], alone(model, ids, actions, 4, **steering)), k


def test_replayed_routes_are_those_of_the_record(model, ids):
    with torch.no_grad():
        plain = model(ids, output_routing=True)
        assert torch.equal(model(ids, replay=plain.routing).logits, plain.logits)  # replay alone changes no bit
    lists = [[], [iv.scale("residual", 1.2, layers=0)]]
    got = iv.variants(model, ids, lists, replay=plain.routing, prefix=0)
    assert torch.equal(got[0], plain.logits[0])
    assert torch.equal(got[1], alone(model, ids, lists[1], 0, replay=plain.routing))
    behind = iv.variants(model, ids, lists, replay=plain.routing, prefix=3)
    assert torch.equal(behind[0], plain.logits[0, 3:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actions": []}, "no lists"),
        ({"actions": [[iv.read("units")]]}, "read in model.intervene"),
        ({"prefix": 12}, "prefix is 12"),
        ({"controls": []}, "0 controls for 1"),
        ({"controls": [{"replay": 1}]}, "controls may hold"),
        ({"batch": 0}, "batch is 0"),
        ({"input_ids": random_ids(2, 4)}, "expected \\[S\\]"),
    ],
)
def test_wrong_calls_are_refused(arguments, message):
    given = {"input_ids": random_ids(1, 12), "actions": [[]]} | arguments
    with pytest.raises(ValueError, match=message):
        iv.variants(small_model(), **given)
