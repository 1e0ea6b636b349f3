import math

import pytest
import torch
from near import assert_near
from op_cases import OPCHECKS, SIZES
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference

RULES = ["renormalized", "probability", "straight_through"]


def scores(tokens, experts=4, dtype=torch.float32):
    z = torch.randn(tokens, experts, dtype=torch.float64) * 2
    z[::5] *= 10  # some tokens are sure
    z[::7, 1:3] = 0.5  # ties
    return z.to(dtype).requires_grad_()


def assert_same_routing(got, want, factor=4):
    assert torch.equal(got.ids, want.ids)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert torch.equal(g.isinf(), w.isinf())
        assert_near(*(t.detach().nan_to_num(nan=math.nan, neginf=0) for t in (g, w)), factor=factor)


def gradients(routing, inputs, seed=3):
    """Of a weighted sum of all three differentiable outputs."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for out in routing[1:]:
        finite = torch.where(out.isfinite(), out, 0).double()
        total = total + (finite * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("weight_rule", RULES)
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_equals_the_reference_forward_and_backward(tokens, dtype, weight_rule):
    for experts, k in [(1, 1), (4, 1), (4, 2), (4, 4), (37, 5)]:
        z = scores(tokens, experts, dtype)
        got = ops.route(z, k, weight_rule=weight_rule)
        want = reference.route(z, k, weight_rule=weight_rule)
        assert_same_routing(got, want)
        assert_near(gradients(got, z)[0], gradients(want, z)[0], factor=16)


@pytest.mark.parametrize("weight_rule", RULES)
@pytest.mark.parametrize("one_row", [False, True])
def test_steering_equals_the_reference(weight_rule, one_row):
    tokens, experts = 33, 5
    z = scores(tokens, experts, torch.float64)
    rows = 1 if one_row else tokens
    bias = torch.randn(rows, experts, dtype=torch.float64, requires_grad=True)
    ablate = torch.rand(rows, experts) < 0.4
    ablate[:, 4] = False
    force = torch.randint(-1, experts, (rows,), dtype=torch.int32)
    for steering in (
        {"bias": bias},
        {"bias": bias, "ablate": ablate},
        {"bias": bias, "ablate": ablate, "force": force},
    ):
        got = ops.route(z, 2, weight_rule=weight_rule, **steering)
        want = reference.route(z, 2, weight_rule=weight_rule, **steering)
        assert_same_routing(got, want)
        for g, w in zip(gradients(got, (z, bias)), gradients(want, (z, bias)), strict=True):
            assert_near(g, w, factor=16)


def test_the_bias_gets_its_gradient_in_its_own_dtype_and_shape():
    z = scores(9, 4, torch.bfloat16).detach()
    bias = torch.zeros(1, 4, requires_grad=True)
    ops.route(z, 2, bias=bias).probs[:, 0].sum().backward()
    assert bias.grad.shape == (1, 4) and bias.grad.dtype == torch.float32
    p = torch.softmax(z.float(), -1)
    want = (p * (torch.eye(4)[0] - p[:, :1])).sum(0, keepdim=True)
    assert_near(bias.grad, want)


def test_a_single_renormalized_expert_gives_the_router_exactly_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        z = scores(64, 4, dtype)
        routing = ops.route(z, 1)
        assert torch.equal(routing.weights, torch.ones_like(routing.weights))
        routing.weights.backward(torch.randn(64, 1).to(dtype))
        assert torch.equal(z.grad, torch.zeros_like(z))


def test_two_renormalized_experts_are_a_sigmoid_of_their_difference():
    z = scores(20, 4, torch.float64)
    routing = ops.route(z, 2)
    delta = torch.randn(20, 2, dtype=torch.float64)
    (grad,) = torch.autograd.grad(routing.weights, z, delta)
    first, second = z.detach().gather(1, routing.ids.long()).unbind(1)
    w = torch.sigmoid(first - second)
    slope = w * (1 - w) * (delta[:, 0] - delta[:, 1])
    want = torch.zeros_like(grad).scatter(1, routing.ids.long(), torch.stack([slope, -slope], 1))
    assert_near(grad, want, factor=1e4)  # up to the 1e-9 of the renormalisation


def test_a_chosen_expert_of_probability_zero_gets_no_gradient_and_makes_no_nan():
    z = torch.tensor([[0.0, -math.inf, -1000.0, 1.0]], requires_grad=True)
    for weight_rule in RULES:
        routing = ops.route(z, 4, weight_rule=weight_rule)
        assert routing.ids.tolist() == [[3, 0, 1, 2]]
        assert routing.weights[0, 2:].tolist() == [0, 0]
        (grad,) = torch.autograd.grad(routing.weights, z, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        assert grad.isfinite().all()
        assert grad[0, 1:3].tolist() == [0, 0]


def test_ablation_equals_a_logit_of_minus_infinity():
    z = scores(40).detach()
    ablate = torch.rand(40, 4) < 0.5
    ablate[:, 2] = False
    got = ops.route(z, 2, ablate=ablate)
    want = ops.route(z.masked_fill(ablate, -math.inf), 2)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    assert (got.effective[ablate] == -math.inf).all()
    by_bias = ops.route(z, 2, bias=torch.zeros(40, 4).masked_fill(ablate, -math.inf))
    assert torch.equal(by_bias.probs, got.probs)


def test_force_wins_over_bias_and_ablation():
    z = scores(6)
    force = torch.tensor([-1, 0, 1, 2, 3, -1], dtype=torch.int32)
    routing = ops.route(
        z, 2, force=force, bias=torch.full((1, 4), 5.0), ablate=torch.tensor([[True, False, False, False]])
    )
    held = force >= 0
    assert torch.equal(routing.ids[held, 0], force[held])
    assert torch.equal(routing.weights[held], torch.tensor([[1.0, 0.0]]).expand(4, 2))
    assert torch.equal(routing.probs[held], torch.eye(4))
    assert torch.equal(routing.effective[held], torch.eye(4).log())
    (grad,) = torch.autograd.grad((routing.probs * torch.randn(6, 4)).sum(), z)
    assert torch.equal(grad[held], torch.zeros(4, 4)) and (grad[~held] != 0).any()


def test_rows_replace_the_softmax_and_one_hot_rows_leave_the_second_weight_exactly_zero():
    rows = torch.eye(4)[[2, 0, 3, 1]]
    for logits in (scores(4, dtype=torch.bfloat16), None):
        routing = ops.route(logits, 2, rows=rows)
        assert routing.weights.dtype == (torch.bfloat16 if logits is not None else torch.float32)
        assert routing.weights.tolist() == [[1, 0]] * 4
        assert routing.ids[:, 0].tolist() == [2, 0, 3, 1]
        assert torch.equal(routing.probs, rows) and torch.equal(routing.effective, rows)
        assert not routing.weights.requires_grad
    assert_same_routing(ops.route(None, 3, rows=rows / 2 + 0.1), reference.route(None, 3, rows=rows / 2 + 0.1))


def test_rows_win_over_steering():
    rows = torch.rand(5, 4)
    force = torch.zeros(5, dtype=torch.int32)
    got = ops.route(scores(5), 2, rows=rows, force=force, ablate=torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(got.probs, rows)


@pytest.mark.parametrize("weight_rule", RULES)
def test_replay_takes_the_ids_and_recomputes_the_rest(weight_rule):
    z = scores(30, 6, torch.float64)
    replay = torch.stack([torch.randperm(6)[:3] for _ in range(30)]).int()
    got = ops.route(z, 3, replay=replay, weight_rule=weight_rule)
    want = reference.route(z, 3, replay=replay, weight_rule=weight_rule)
    assert torch.equal(got.ids, replay)
    assert_same_routing(got, want)
    assert_near(gradients(got, z)[0], gradients(want, z)[0], factor=1e3)
    again = ops.route(z, 3, replay=ops.route(z, 3).ids, weight_rule=weight_rule)
    assert torch.equal(again.weights, ops.route(z, 3, weight_rule=weight_rule).weights)


@pytest.mark.parametrize("experts, k", [(4, 1), (4, 4), (33, 7)])
def test_no_id_ever_lies_outside(experts, k):
    z = torch.randn(50, experts)
    z[10:30][torch.rand(20, experts) < 0.3] = math.nan
    z[20:40][torch.rand(20, experts) < 0.3] = -math.inf
    z[40] = math.inf
    z[41] = -math.inf
    z[42] = math.nan
    ids, weights, probs, _ = ops.route(z, k)
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    broken = probs.isnan().any(1)
    assert broken[40:43].all()
    assert ids[broken].tolist() == [list(range(k))] * int(broken.sum())
    assert weights[broken].isnan().all() and weights[~broken].isfinite().all()


def test_nan_ranks_below_minus_infinity():
    rows = torch.tensor([[math.nan, -math.inf, 0.5, math.nan], [math.nan, 0.0, math.nan, math.nan]])
    assert ops.route(None, 4, rows=rows).ids.tolist() == [[2, 1, 0, 3], [1, 0, 2, 3]]


def test_ties_go_to_the_lower_id():
    assert ops.route(torch.zeros(2, 9), 5).ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert ops.route(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]]), 4).ids.tolist() == [[1, 2, 4, 0]]


def test_strides_do_not_matter():
    z = scores(12).detach()
    want = ops.route(z, 2)
    for g, w in zip(ops.route(z.t().contiguous().t(), 2), want, strict=True):
        assert torch.equal(g, w)
    bias = torch.randn(4, 12)
    steered = ops.route(z, 2, bias=bias.t(), ablate=torch.zeros(4, 1, dtype=torch.bool).t())
    assert torch.equal(steered.ids, ops.route(z, 2, bias=bias.t().contiguous()).ids)


@pytest.mark.parametrize("weight_rule", ["renormalized", "probability"])
def test_first_derivatives_are_right_and_second_ones_are_refused(weight_rule):
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z, b: tuple(ops.route(z, 2, bias=b, weight_rule=weight_rule)[1:]), (z, bias))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.route(z, 2).probs[:, 0].sum(), z, create_graph=True)


def test_rows_that_want_a_gradient_are_refused():
    with pytest.raises(NotImplementedError, match="rows have no gradient"):
        ops.route(None, 1, rows=torch.rand(3, 4, requires_grad=True))


def test_opcheck():
    z, bias = scores(5), torch.randn(1, 4, requires_grad=True)
    ablate, force = torch.zeros(5, 4, dtype=torch.bool), torch.tensor([-1, 2, -1, 0, 1], dtype=torch.int32)
    for arguments in (
        (z, 2),
        (z, 2, None, bias, ablate, force, None, "probability"),
        (None, 1, torch.rand(5, 4)),
        (z, 1, None, None, None, None, force.abs()[:, None], "straight_through"),
    ):
        torch.library.opcheck(torch.ops.micro.route.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("weight_rule", RULES)
def test_traced_gradients_are_the_same(weight_rule):
    def step(z, bias):
        return ops.route(z, 2, bias=bias, weight_rule=weight_rule)

    traced = torch.compile(step, backend="aot_eager", dynamic=True, fullgraph=True)
    bias = torch.randn(1, 4, requires_grad=True)
    for tokens in (5, 9):
        z = scores(tokens)
        for g, w in zip(gradients(traced(z, bias), (z, bias)), gradients(step(z, bias), (z, bias)), strict=True):
            assert torch.equal(g, w)


def test_one_compiled_graph_serves_all_lengths():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    ablate = torch.tensor([[False, True, False, False]])
    step = torch.compile(lambda z: ops.route(z, 2, ablate=ablate)[1] * 2, backend=count, dynamic=True, fullgraph=True)
    for tokens in (3, 5, 8):
        z = scores(tokens)
        assert torch.equal(step(z), ops.route(z, 2, ablate=ablate)[1] * 2)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": torch.ones(2, 4, dtype=torch.float16)}, TypeError, "expected float32, float64 or bfloat16"),
        ({"logits": torch.ones(2, 3, 4)}, ValueError, r"logits must be \[T, E\], got \[2, 3, 4\]"),
        ({"logits": None}, ValueError, "logits or rows must be given"),
        ({"k": 0}, ValueError, "k must lie in 1 .. E = 4, got 0"),
        ({"k": 5}, ValueError, "k must lie in 1 .. E = 4, got 5"),
        ({"rows": torch.ones(3, 4)}, ValueError, r"rows must be \[2, 4\], got \[3, 4\]"),
        ({"bias": torch.ones(3, 4)}, ValueError, r"bias must be \[2, 4\] or have one row, got \[3, 4\]"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[T, E\] or \[1, E\], got \[4\]"),
        ({"bias": torch.ones(2, 4).bfloat16()}, TypeError, "bias must be float32 or float64"),
        ({"ablate": torch.ones(2, 4)}, TypeError, "ablate must be Bool, got Float"),
        ({"ablate": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"ablate must be \[2, 4\]"),
        ({"force": torch.zeros(2, dtype=torch.int64)}, TypeError, "force must be Int, got Long"),
        ({"force": torch.tensor([0, 4], dtype=torch.int32)}, ValueError, "force must hold -1 or an expert"),
        ({"force": torch.tensor([-2], dtype=torch.int32)}, ValueError, "force must hold -1 or an expert"),
        ({"replay": torch.tensor([[0], [-1]], dtype=torch.int32)}, ValueError, "replay an expert"),
        ({"replay": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"replay must be \[2, 1\], got \[2, 2\]"),
        ({"weight_rule": "softmax"}, ValueError, "weight_rule must be renormalized, probability or straight_through"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"logits": torch.ones(2, 4), "k": 1} | change
    with pytest.raises(error, match=words):
        ops.route(arguments.pop("logits"), arguments.pop("k"), **arguments)
