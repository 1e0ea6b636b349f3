"""Controls in all their forms, the order of operations, and every error of model.md 4.4."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from small_models import random_ids, small_model

import micro.steering
from micro.modeling import MiCRoForCausalLM, RoutingTrace, Steering

B, S, L, E = 2, 5, 2, 4


@pytest.fixture(scope="module")
def model() -> MiCRoForCausalLM:
    return small_model()


IDS = random_ids(B, S)


def route(model: MiCRoForCausalLM, **controls: object) -> RoutingTrace:
    with torch.no_grad():
        return model(IDS, output_routing=True, **controls).routing


def allowed_everywhere(trace: RoutingTrace) -> set[int]:
    return set(trace.ids.unique().tolist())


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights) and torch.equal(a.logits, b.logits)


# ---------------------------------------------------------------- forms
@pytest.mark.parametrize(
    "name", ["social", 1, "Social", "ToM", "tom", "theory of mind", "THEORY OF MIND", [1], {"ToM"}]
)
def test_every_name_of_an_expert(model: MiCRoForCausalLM, name: object) -> None:
    trace = route(model, ablate=name)
    assert bool(torch.isinf(trace.logits[..., 1]).all())
    assert bool(torch.isfinite(trace.logits[..., [0, 2, 3]]).all())
    assert torch.isfinite(trace.raw_logits).all()
    assert same(trace, route(model, keep=[0, 2, 3]))


@pytest.mark.parametrize("nothing", ["none", "", [], "None", ["none"], None, [[], []], {}, {1: "none"}])
def test_nothing_is_bit_identical_to_no_steering(model: MiCRoForCausalLM, nothing: object) -> None:
    assert same(route(model, ablate=nothing), route(model))


def test_a_flat_list_is_one_set_and_nested_lists_are_rows(model: MiCRoForCausalLM) -> None:
    one = route(model, ablate=["logic", "social"])
    assert bool(torch.isinf(one.logits[:, :, :, :2]).all())
    rows = route(model, ablate=[["logic"], {"world", "LN"}])
    assert bool(torch.isinf(rows.logits[:, 0, :, 0]).all()) and bool(torch.isinf(rows.logits[:, 1, :, 2:]).all())
    assert bool(torch.isfinite(rows.logits[:, 0, :, 1:]).all()) and bool(torch.isfinite(rows.logits[:, 1, :, :2]).all())
    kept = route(model, keep=[["logic"], ["world"]])
    assert kept.ids[:, 0].unique().tolist() == [0] and kept.ids[:, 1].unique().tolist() == [2]


def test_layers(model: MiCRoForCausalLM) -> None:
    trace = route(model, ablate={1: ["logic", "social", "world"]})
    assert trace.ids[1].unique().tolist() == [3]
    assert torch.equal(trace.ids[0], route(model).ids[0])
    kept = route(model, keep={0: "world"})
    assert kept.ids[0].unique().tolist() == [2] and bool(torch.isfinite(kept.logits[1]).all())
    forced = route(model, force={1: "logic"})
    assert forced.ids[1].unique().tolist() == [0] and torch.equal(forced.ids[0], route(model).ids[0])
    biased = route(model, bias={0: {"logic": 100.0}})
    assert biased.ids[0].unique().tolist() == [0] and torch.equal(biased.logits[1], biased.raw_logits[1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (B, 1, 1), (1, L, 1), (1, 1, S), (B, L, S)])
def test_full_forms_broadcast_every_axis(model: MiCRoForCausalLM, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    ablate = torch.rand(*shape, E, generator=generator) < 0.4
    ablate[..., 2] = False
    got = route(model, ablate=ablate)
    whole = ablate.expand(B, L, S, E).transpose(0, 1)
    assert torch.equal(torch.isinf(got.logits), whole)
    bias = torch.randn(*shape, E, generator=generator)
    got = route(model, bias=bias)
    assert torch.allclose(got.logits - got.raw_logits, bias.expand(B, L, S, E).transpose(0, 1).double(), atol=1e-12)
    force = torch.randint(-1, E, shape, generator=generator)
    got = route(model, force=force)
    whole_force = force.expand(B, L, S).transpose(0, 1)
    assert torch.equal(got.ids[..., 0][whole_force >= 0].long(), whole_force[whole_force >= 0])


def test_force_reports_zero_and_minus_infinity(model: MiCRoForCausalLM) -> None:
    for force in ("world", torch.tensor([2, 2, -1, 2, 2]).view(1, 1, 5)):
        trace = route(model, force=force)
        row = trace.logits[0, 0, 0]
        assert row.tolist() == [-float("inf"), -float("inf"), 0.0, -float("inf")]
        assert trace.probs[0, 0, 0].tolist() == [0, 0, 1, 0]
        assert float(trace.weights[0, 0, 0, 0]) == pytest.approx(1)
        assert torch.isfinite(trace.raw_logits).all()
    free = route(model, force=torch.full((1, 1, 1), -1))
    assert same(free, route(model))


def test_bias_zero_is_bit_identical(model: MiCRoForCausalLM) -> None:
    assert same(route(model, bias={"logic": 0.0}), route(model))
    assert same(route(model, bias=torch.zeros(1, 1, 1, E)), route(model))


def test_a_bias_that_is_no_number_is_named(model: MiCRoForCausalLM) -> None:
    with pytest.raises(TypeError, match="bias: the value of 'logic' must be a number, got 'a'"):
        Steering.make(model.config, bias={"logic": "a"})


def test_bias_of_minus_infinity_ablates(model: MiCRoForCausalLM) -> None:
    assert same(route(model, bias={"logic": -float("inf")}), route(model, ablate="logic"))


def test_fewer_allowed_experts_than_k(model: MiCRoForCausalLM) -> None:
    trace = route(model, keep=["social", "language"], experts_per_token=3)
    assert bool((trace.weights[..., 2] == 0).all())
    assert bool((trace.ids[..., 2] == 0).all()), "the surplus id is the lowest remaining one"
    two = route(model, keep=["social", "language"], experts_per_token=2)
    assert torch.equal(two.ids, trace.ids[..., :2])
    with torch.no_grad():
        a = model(IDS, keep=["social", "language"], experts_per_token=3).logits
        b = model(IDS, keep=["social", "language"], experts_per_token=2).logits
    assert torch.equal(a, b)


# ---------------------------------------------------------------- errors
def fails(model: MiCRoForCausalLM, words: str, kind: type[Exception] = ValueError, **controls: object) -> None:
    with pytest.raises(kind, match=words):
        model(IDS, **controls)


def test_unknown_names_list_the_known_ones(model: MiCRoForCausalLM) -> None:
    fails(model, "unknown expert 'logik'; known are 0 = logic, 1 = social", ablate="logik")
    fails(model, "unknown expert 'logic,social'", ablate="logic,social")
    fails(model, "unknown expert", force="x")
    fails(model, "unknown expert", bias={"x": 1.0})
    fails(model, r"expert 4 is outside 0\.\.3", ablate=4)
    fails(model, "expert -1 is outside", keep=[-1])
    fails(model, "is no expert", TypeError, ablate=[True])
    fails(model, "is no expert", TypeError, ablate=1.5)
    fails(model, r"layer 2 is outside 0\.\.1", ablate={2: "logic"})
    fails(model, "is no layer number", TypeError, ablate={"logic": 1})


def test_all_ablated_names_row_layer_slot(model: MiCRoForCausalLM) -> None:
    fails(model, "every expert is ablated at row 0, layer 0 .*slot 0", ablate=[0, 1, 2, 3])
    fails(model, "every expert is ablated", keep="none")
    ablate = torch.zeros(B, L, S, E, dtype=torch.bool)
    ablate[1, 1, 3] = True
    fails(model, "every expert is ablated at row 1, layer 1, slot 3", ablate=ablate)
    mask = torch.ones(B, S)
    mask[1, 3:] = 0
    with torch.no_grad():
        assert torch.isfinite(model(IDS, attention_mask=mask, ablate=ablate).logits).all(), "ignored at padding"


def test_contradictions(model: MiCRoForCausalLM) -> None:
    labels = torch.tensor([[0, 1, 2, 3, 0]] * B)
    fails(model, "ablate or keep, not both", ablate="logic", keep="social")
    fails(model, "the forced expert is ablated at row 0", force="logic", ablate="logic")
    fails(model, r"outside 0\.\.3", force=torch.full((1, 1, 1), 4))
    fails(model, "asks for an ablated expert at row 0, layer 0 .*slot 2", routing_labels=labels, ablate="world")
    fails(model, "bias has no meaning where labels", routing_labels=labels, bias={"logic": 1.0})
    fails(model, r"\+inf and NaN", bias={"logic": float("inf")})
    fails(model, r"\+inf and NaN", bias={"logic": float("nan")})
    fails(model, r"experts_per_token is 5, expected 1\.\.4", experts_per_token=5)
    fails(model, "experts_per_token is 0", experts_per_token=0)
    fails(model, "label 4 at row 1, slot 2", routing_labels=labels + torch.tensor([[0] * 5, [0, 0, 2, 0, 0]]))
    fails(model, "label -2", routing_labels=torch.full((B,), -2))
    fails(model, "route_by", route_by="chance")
    fails(model, 'route_by="labels" needs', route_by="labels")
    fails(model, "not both", routing_labels=labels, routing_weights=torch.ones(B, S, E))
    with torch.no_grad():
        plain = model(IDS, routing_labels=labels).logits
        assert torch.equal(model(IDS, routing_labels=labels, ablate="none").logits, plain)
        model(IDS, routing_labels=labels, ablate="logic", route_by="router")


def test_shapes_and_dtypes(model: MiCRoForCausalLM) -> None:
    fails(model, r"rank 3, expected 4: \[B\|1, L\|1, S\|1, E\]", ablate=torch.zeros(1, 1, E, dtype=torch.bool))
    fails(model, "rank 2, expected 3", force=torch.zeros(1, 1, dtype=torch.long))
    fails(model, "must be bool", TypeError, ablate=torch.zeros(1, 1, 1, E))
    fails(model, "must be floating", TypeError, bias=torch.zeros(1, 1, 1, E, dtype=torch.long))
    fails(model, "must hold integers", TypeError, force=torch.zeros(1, 1, 1))
    fails(model, "has shape", ablate=torch.zeros(1, 3, 1, E, dtype=torch.bool))
    fails(model, "given for 3 rows, the call has 2", ablate=torch.zeros(3, 1, 1, E, dtype=torch.bool))
    fails(model, "given for 3 rows", ablate=[["logic"], ["logic"], ["logic"]])
    fails(model, "S axis has 4 slots, this call has 5", ablate=torch.zeros(1, 1, 4, E, dtype=torch.bool))
    fails(model, "given for 4 slots", routing_labels=torch.zeros(B, 4, dtype=torch.long))
    fails(model, r"expected \[B,S\] or \[B\]", routing_labels=torch.zeros(B, S, E, dtype=torch.long))
    fails(model, "integer tensor", TypeError, routing_labels=torch.zeros(B, S))
    fails(model, "float tensor", TypeError, routing_weights=torch.zeros(B, S, E, dtype=torch.long))
    fails(model, "expected .*name: number", TypeError, bias=[1.0, 2.0])


@pytest.mark.parametrize("bad", [[0.0, 0, 0, 0], [-1.0, 2, 0, 0], [float("nan"), 1, 1, 1], [float("inf"), 1, 1, 1]])
def test_bad_rows_of_weights(model: MiCRoForCausalLM, bad: list[float]) -> None:
    rows = torch.ones(B, S, E)
    rows[1, 2] = torch.tensor(bad)
    fails(model, "routing_weights: row 1, slot 2", routing_weights=rows)
    mask = torch.ones(B, S)
    mask[1, :3] = 0
    with torch.no_grad():
        assert torch.isfinite(model(IDS, attention_mask=mask, routing_weights=rows).logits).all()


def test_labels_without_a_language_expert() -> None:
    model = small_model(num_experts=3)
    ids = random_ids(1, 4)
    model(ids, routing_labels=torch.tensor([[0, 1, 2, 0]]))
    with pytest.raises(
        ValueError, match=r"label -1 .it means the expert named language, and there is none. at row 0, slot 1"
    ):
        model(ids, routing_labels=torch.tensor([[0, -1, 2, 0]]))


def test_router_off_needs_labels() -> None:
    model = small_model(use_router=False)
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="use_router=False"):
        model(ids)
    model(ids, routing_labels=torch.tensor([2]))
    model(ids, route_by="router")


# ---------------------------------------------------------------- labels beside a router
def test_labels_by_router_only_feed_losses(model: MiCRoForCausalLM) -> None:
    labels = torch.randint(0, 4, (B, S))
    assert same(route(model, routing_labels=labels, route_by="router"), route(model))


# ---------------------------------------------------------------- replay
def test_replay_takes_choices_and_recomputes_scores(model: MiCRoForCausalLM) -> None:
    first = route(model, experts_per_token=2)
    assert same(route(model, experts_per_token=2, replay=first), first)
    forced = route(model, force="world")
    again = route(model, replay=forced)
    assert torch.equal(again.ids, forced.ids)
    assert torch.equal(again.raw_logits[0], route(model).raw_logits[0])
    other = route(model, replay=forced, bias={"world": 1.0})
    assert torch.equal(other.ids, forced.ids) and not torch.equal(other.probs, again.probs)
    fails(model, "experts per token", replay=first)
    fails(model, "every replayed expert is ablated at row 0", replay=forced, ablate="world")
    fails(model, "not among the replayed ones", replay=forced, force="logic")
    fails(model, "covers slots 0..2", replay=forced.slots(0, 3))
    fails(model, "expected a RoutingTrace", TypeError, replay=forced.ids)


# ---------------------------------------------------------------- context managers
def test_contexts_fill_the_arguments(model: MiCRoForCausalLM) -> None:
    before = route(model)
    with micro.steering.ablate("logic"):
        assert same(route(model), route_plain(model, ablate="logic"))
        with micro.steering.ablate(["social"]), micro.steering.bias({"world": 1.0}):
            with micro.steering.bias({"world": 2.0}):
                assert same(route(model), route_plain(model, ablate=["logic", "social"], bias={"world": 3.0}))
                inner = route(model, ablate="language", bias={"world": -3.0})
                assert same(inner, route_plain(model, keep="world"))
        with micro.steering.keep(["logic", "world"]):
            assert allowed_everywhere(route(model)) == {2}
        with micro.steering.force("social"), micro.steering.force("world"):
            assert allowed_everywhere(route(model)) == {2}
            assert allowed_everywhere(route(model, force="language")) == {3}
    assert same(route(model), before)


def route_plain(model: MiCRoForCausalLM, **controls: object) -> RoutingTrace:
    """Outside any context."""
    return contextvars.Context().run(lambda: route(model, **controls))


def test_contexts_end_on_every_way_out(model: MiCRoForCausalLM) -> None:
    before = route(model)
    with pytest.raises(KeyError):
        with micro.steering.force("world"):
            raise KeyError
    with pytest.raises(ValueError, match="unknown expert"):
        with micro.steering.ablate("nobody"):
            route(model)
    again = micro.steering.ablate("logic")
    with again, again:
        pass
    assert same(route(model), before)


def test_contexts_are_local_to_the_thread(model: MiCRoForCausalLM) -> None:
    before, seen = route(model), []
    with micro.steering.force("world"):
        thread = threading.Thread(target=lambda: seen.append(route(model)))
        thread.start()
        thread.join()
    assert same(seen[0], before)


# ---------------------------------------------------------------- the normalised object
def test_steering_object(model: MiCRoForCausalLM) -> None:
    made = Steering.make(model.config, ablate=["logic"], experts_per_token=2)
    assert same(route(model, steering=made), route(model, ablate="logic", experts_per_token=2))
    fails(model, r"do not also give \['ablate'\]", steering=made, ablate="social")
    fails(model, "expected a Steering", TypeError, steering={"ablate": "logic"})
    other = Steering.make(small_model(num_experts=3).config)
    fails(model, "other layers or experts", steering=other)
