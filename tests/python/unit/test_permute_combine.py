"""The way to plan order and back: permute and combine, which share their plans."""

import pytest
import torch
from near import assert_near
from op_cases import SIZES
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference


def problem(tokens, k=2, hidden=33, experts=4, dtype=torch.float32):
    """A plan with an expert without rows, idle weights and padded tokens; values with outliers."""
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k)
    weights = torch.rand(tokens, k).to(dtype)
    if k > 1:
        weights[::3, -1] = 0
    plan = ops.plan(ids.int(), experts, weights, torch.rand(tokens) < 0.8)
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    y = torch.randn(tokens * k, hidden, dtype=torch.float64)
    x[:, ::5] *= 30
    y[:, ::7] *= 30
    return plan, *(t.to(dtype).requires_grad_() for t in (x, y, weights))


def permute(x, plan, ops=ops):
    return ops.permute(x, plan.tokens, plan.offsets, plan.inverse)


def combine(y, weights, plan, ops=ops):
    return ops.combine(y, weights, plan.experts, plan.offsets, plan.inverse)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_equal_the_reference_forward_and_backward(tokens, dtype):
    for k, hidden, experts in [(1, 8, 1), (1, 64, 4), (2, 33, 4), (4, 300, 4), (3, 1, 9)]:
        plan, x, y, weights = problem(tokens, k, hidden, experts, dtype)
        got, want = permute(x, plan), permute(x, plan, reference)
        assert torch.equal(got, want)
        upstream = torch.randn_like(want)
        assert_near(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
        got, want = combine(y, weights, plan), combine(y, weights, plan, reference)
        assert torch.equal(got, want)  # every product and sum is rounded as in the definition
        upstream = torch.randn_like(want)
        for g, w in zip(*(torch.autograd.grad(out, (y, weights), upstream) for out in (got, want)), strict=True):
            assert_near(g, w)


def test_idle_rows_are_zero_and_get_exactly_zero():
    plan, x, y, weights = problem(40, 3)
    idle = torch.arange(120) >= plan.offsets[-1]
    assert idle.any()
    assert torch.equal(permute(x, plan)[idle], torch.zeros(int(idle.sum()), 33))
    y.data[idle] = float("nan")
    out = combine(y, weights, plan)
    assert out.isfinite().all()
    grad_y, grad_weights = torch.autograd.grad(out, (y, weights), torch.randn_like(out))
    assert torch.equal(grad_y[idle], torch.zeros(int(idle.sum()), 33))
    assert torch.equal(grad_weights[idle[plan.inverse.long()]], torch.zeros(int(idle.sum())))


def test_a_token_without_an_active_pair_combines_to_zero():
    ids = torch.zeros(3, 1, dtype=torch.int32)
    plan = ops.plan(ids, 2, None, torch.tensor([True, False, True]))
    out = combine(torch.ones(3, 5), torch.ones(3, 1), plan)
    assert out[:, 0].tolist() == [1, 0, 1]


def test_experts_are_added_in_ascending_order_whatever_their_rank():
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)  # row of each expert; 256 + 1 + 1 is 256
    weights = torch.ones(1, 3, dtype=torch.bfloat16)
    for ids in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        plan = ops.plan(torch.tensor([ids], dtype=torch.int32), 3)
        assert combine(y, weights, plan).item() == 256
        assert combine(y.flip(0), weights, plan).item() == 258


def test_weights_of_another_dtype_are_rounded_first_and_get_their_own_gradient():
    plan, _, y, _ = problem(6, 2, dtype=torch.bfloat16)
    weights = torch.rand(6, 2, requires_grad=True)
    out = combine(y, weights, plan)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, combine(y, weights.bfloat16(), plan))
    out.sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("wanted", ["y", "weights"])
def test_only_the_wanted_gradient_is_computed(wanted):
    plan, _, y, weights = problem(9)
    upstream = torch.randn(9, 33)
    both = dict(
        zip(("y", "weights"), torch.autograd.grad(combine(y, weights, plan), (y, weights), upstream), strict=True)
    )
    inputs = {"y": y.detach(), "weights": weights.detach()}
    inputs[wanted].requires_grad_()
    combine(**inputs, plan=plan).backward(upstream)
    assert torch.equal(inputs[wanted].grad, both[wanted])
    assert inputs["weights" if wanted == "y" else "y"].grad is None


def test_y_is_kept_only_for_the_weights():
    plan, _, y, weights = problem(9)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        combine(y, weights.detach(), plan)
        assert y.shape not in kept
        combine(y, weights, plan)
        assert y.shape in kept


def test_strides_do_not_matter():
    plan, x, y, weights = problem(12)
    with torch.no_grad():
        assert torch.equal(permute(x.t().contiguous().t(), plan), permute(x, plan))
        strided = combine(y.t().contiguous().t(), weights.t().contiguous().t(), plan)
        assert torch.equal(strided, combine(y, weights, plan))
    expanded = torch.randn(33).expand(12, 33)
    for out in (permute(x, plan)[:12], combine(y, weights, plan)):
        for g, w in zip(
            torch.autograd.grad(out, (x, y, weights), expanded, retain_graph=True, allow_unused=True),
            torch.autograd.grad(out, (x, y, weights), expanded.contiguous(), allow_unused=True),
            strict=True,
        ):
            assert (g is None and w is None) or torch.equal(g, w)


def test_first_derivatives_are_right_and_second_ones_are_refused():
    plan, x, y, weights = problem(6, 2, 3, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: permute(x, plan), (x,))
    torch.autograd.gradcheck(lambda y, w: combine(y, w, plan), (y, weights))
    for out, inputs in ((permute(x, plan).sum(), x), (combine(y, weights, plan).sum(), y)):
        upstream = torch.ones((), dtype=torch.float64, requires_grad=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(out, inputs, upstream, create_graph=True)


def test_opcheck():
    plan, x, y, weights = problem(5)
    torch.library.opcheck(torch.ops.micro.permute.default, (x, plan.tokens, plan.offsets, plan.inverse))
    torch.library.opcheck(torch.ops.micro.combine.default, (y, weights, plan.experts, plan.offsets, plan.inverse))
    torch.library.opcheck(
        torch.ops.micro.combine.default, (y, weights.detach(), plan.experts, plan.offsets, plan.inverse)
    )


def test_one_compiled_graph_serves_all_lengths():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda x, w, plan: combine(permute(x, plan), w, plan), backend=count, dynamic=True, fullgraph=True
    )
    for tokens in (3, 5, 8):
        plan, x, _, weights = problem(tokens)
        assert torch.equal(step(x, weights, plan), combine(permute(x, plan), weights, plan))
    assert len(graphs) == 1


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.ones(2, 8, dtype=torch.float16)}, TypeError, "expected float32, float64 or bfloat16"),
        ({"x": torch.ones(8)}, ValueError, r"x must be \[T, H\], got \[8\]"),
        ({"x": torch.ones(3, 8)}, ValueError, r"inverse must be \[3, 1\], got \[2, 1\]"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, TypeError, "tokens must be Int, got Long"),
        ({"tokens": int32(0)}, ValueError, r"tokens must be \[2\], got \[1\]"),
        ({"tokens": int32(0, 2)}, ValueError, r"tokens must lie in \[0, 2\)"),
        ({"offsets": int32(0)}, ValueError, "at least one expert"),
    ],
)
def test_a_wrong_argument_of_permute_is_named(change, error, words):
    arguments = {
        "x": torch.ones(2, 8),
        "tokens": int32(0, 1),
        "offsets": int32(0, 2),
        "inverse": int32(0, 1)[:, None],
    }
    with pytest.raises(error, match=words):
        ops.permute(**arguments | change)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"y": torch.ones(3, 8)}, ValueError, r"y must be \[2, 8\], got \[3, 8\]"),
        ({"weights": torch.ones(2)}, ValueError, r"weights must be \[T, K\], got \[2\]"),
        (
            {"weights": torch.ones(2, 1, dtype=torch.int32)},
            TypeError,
            "weights must be a floating-point tensor, got Int",
        ),
        ({"experts": int32(0)}, ValueError, r"experts must be \[2\], got \[1\]"),
        ({"inverse": int32(0, 2)[:, None]}, ValueError, r"inverse must lie in \[0, 2\)"),
        ({"offsets": torch.zeros(2)}, TypeError, "offsets must be Int, got Float"),
    ],
)
def test_a_wrong_argument_of_combine_is_named(change, error, words):
    arguments = {
        "y": torch.ones(2, 8),
        "weights": torch.ones(2, 1),
        "experts": int32(0, 0),
        "offsets": int32(0, 2),
        "inverse": int32(0, 1)[:, None],
    }
    with pytest.raises(error, match=words):
        ops.combine(**arguments | change)
