"""What must hold for every routing decision, whatever the logits."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micro import ops

MANY = settings(deadline=None, max_examples=60)

# Few distinct values, so that ties happen; infinities and NaN among them.
VALUES = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.5, 30.0, -200.0, math.inf, -math.inf, math.nan])
FINITE = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.5, -3.0])


@st.composite
def problems(draw, values=FINITE):
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    numbers = draw(st.lists(values, min_size=tokens * experts, max_size=tokens * experts))
    return torch.tensor(numbers, dtype=torch.float32).view(tokens, experts), k


def bits(draw, count):
    return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)


@MANY
@given(problems(VALUES))
def test_every_id_lies_inside_and_none_comes_twice(problem):
    logits, k = problem
    ids = ops.route(logits, k).ids
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert all(len(set(row)) == k for row in ids.tolist())


@MANY
@given(problems())
def test_the_choice_is_the_largest_first(problem):
    logits, k = problem
    ids, weights, probs, _ = ops.route(logits, k)
    chosen = probs.gather(1, ids.long())
    assert (chosen.diff(dim=1) <= 0).all()
    left_out = probs.scatter(1, ids.long(), -1)
    assert (left_out.amax(1) <= chosen[:, -1]).all()
    assert torch.allclose(weights.sum(1), torch.ones(len(weights)))


@MANY
@given(problems(), st.data())
def test_a_banned_expert_is_never_picked_while_others_are_allowed(problem, data):
    logits, k = problem
    experts = logits.shape[1]
    ablate = bits(data.draw, experts)
    ablate[data.draw(st.integers(0, experts - 1))] = False
    allowed = int((~ablate).sum())
    ids, weights, probs, _ = ops.route(logits, k, ablate=ablate[None])
    banned = ablate[ids.long()]
    assert not banned[:, : min(k, allowed)].any()
    assert (weights[banned] == 0).all() and (probs[:, ablate] == 0).all()
    plan = ops.plan(ids, experts, weights)  # what is banned is idle: nothing is computed for it
    assert not ablate[plan.experts[: int(plan.offsets[-1])].long()].any()


@MANY
@given(problems(), st.data())
def test_relabelling_experts_permutes_the_decision(problem, data):
    _, k = problem
    tokens, experts = problem[0].shape
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    logits = torch.randn(tokens, experts, generator=generator)  # without ties: they go by label
    order = torch.tensor(data.draw(st.permutations(range(experts))))
    plain, relabelled = ops.route(logits, k), ops.route(logits[:, order], k)
    assert torch.equal(order[relabelled.ids.long()], plain.ids.long())
    assert torch.allclose(relabelled.weights, plain.weights, atol=1e-6)
    assert torch.allclose(relabelled.probs, plain.probs[:, order], atol=1e-6)


@MANY
@given(problems(), st.data())
def test_a_plan_is_a_permutation_sorted_by_expert(problem, data):
    logits, k = problem
    tokens, experts = logits.shape
    routing = ops.route(logits, k)
    idle = bits(data.draw, tokens * k).view(tokens, k)
    mask = bits(data.draw, tokens)
    plan = ops.plan(routing.ids, experts, routing.weights.masked_fill(idle, 0), mask)
    rows = plan.inverse.flatten().long()
    assert torch.equal(rows.sort().values, torch.arange(tokens * k))
    assert torch.equal(plan.tokens[rows], torch.arange(tokens).repeat_interleave(k).int())
    assert torch.equal(plan.experts[rows], routing.ids.flatten())
    active = int(plan.offsets[-1])
    assert active == int((~idle & mask[:, None]).sum())
    bounds = plan.offsets.tolist()
    assert bounds[0] == 0 and bounds == sorted(bounds)
    for e in range(experts):
        part = slice(bounds[e], bounds[e + 1])
        assert (plan.experts[part] == e).all()
        assert (plan.tokens[part].diff() > 0).all()  # slot order


@MANY
@given(problems(), st.integers(1, 40))
def test_what_is_permuted_comes_back_combined(problem, hidden):
    logits, k = problem
    tokens, experts = logits.shape
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    routing = ops.route(logits.double(), k)
    plan = ops.plan(routing.ids, experts, routing.weights)
    xs = ops.permute(x, plan.tokens, plan.offsets, plan.inverse)
    out = ops.combine(xs, routing.weights, plan.experts, plan.offsets, plan.inverse)
    assert torch.allclose(out, x, rtol=1e-7, atol=1e-7)  # the weights sum to 1 up to the 1e-9 of the renormalisation
    one = ops.route(logits, 1)
    plan = ops.plan(one.ids, experts, one.weights)
    single = x.float()
    xs = ops.permute(single, plan.tokens, plan.offsets, plan.inverse)
    assert torch.equal(ops.combine(xs, one.weights, plan.experts, plan.offsets, plan.inverse), single)


@MANY
@given(st.integers(0, 9), st.integers(1, 4), st.sampled_from([2, 6, 64]), st.integers(0, 100_000))
def test_a_rotation_keeps_lengths_and_only_distances_matter(tokens, heads, head_dim, shift):
    f = ops.rope_frequencies(head_dim, 10000.0)
    x = torch.randn(tokens, heads, head_dim, dtype=torch.float64)
    positions = torch.arange(tokens)
    angle, shifted = (p[:, None].double() * f.double() for p in (positions, positions + shift))
    plain, moved = (ops.rope(x, a.cos(), a.sin()) for a in (angle, shifted))
    assert torch.allclose(plain.norm(dim=-1), x.norm(dim=-1))
    scores = [torch.einsum("shd,thd->hst", y, y) for y in (plain, moved)]
    assert torch.allclose(scores[0], scores[1], atol=1e-8)
