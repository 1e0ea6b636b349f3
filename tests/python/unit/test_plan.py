import pytest
import torch
from op_cases import OPCHECKS, SIZES

from micro import ops
from micro.testing import reference


def pairs(tokens, k=2, experts=4, dtype=torch.float32):
    """The last expert stays empty; some weights are 0, of either sign, and some tokens are padded."""
    ids = torch.randint(0, max(1, experts - 1), (tokens, k), dtype=torch.int32)
    weights = torch.rand(tokens, k).to(dtype)
    weights[::5, -1] = 0
    weights[1::5, 0] = -0.0
    return ids, weights, torch.rand(tokens) < 0.8


def assert_same_plan(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.int32 and torch.equal(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_equals_the_reference(tokens, dtype):
    for k, experts in [(1, 1), (1, 4), (2, 4), (4, 4), (3, 65)]:
        ids, weights, mask = pairs(tokens, k, experts, dtype)
        for given in ((), (weights,), (weights, mask), (None, mask)):
            assert_same_plan(ops.plan(ids, experts, *given), reference.plan(ids, experts, *given))


def test_more_pairs_than_one_thread_counts_at_once():
    ids, weights, mask = pairs(40_000, 2)
    assert_same_plan(ops.plan(ids, 4, weights, mask), reference.plan(ids, 4, weights, mask))


def test_all_on_one_expert():
    plan = ops.plan(torch.full((9, 1), 2, dtype=torch.int32), 4)
    assert plan.offsets.tolist() == [0, 0, 0, 9, 9]
    assert plan.tokens.tolist() == list(range(9))


def test_idle_pairs_stand_behind_in_order():
    ids = torch.tensor([[1, 0], [0, 1], [1, 0]], dtype=torch.int32)
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    plan = ops.plan(ids, 2, weights, torch.tensor([True, True, False]))
    assert plan.offsets.tolist() == [0, 1, 3]
    assert plan.tokens.tolist() == [1, 0, 1, 0, 2, 2]
    assert plan.experts.tolist() == [0, 1, 1, 0, 1, 0]
    assert plan.inverse.tolist() == [[1, 3], [0, 2], [4, 5]]


def test_a_nan_weight_is_not_idle():
    plan = ops.plan(torch.zeros(2, 1, dtype=torch.int32), 1, torch.tensor([[float("nan")], [0.0]]))
    assert plan.offsets.tolist() == [0, 1]


def test_strides_and_wanted_gradients_do_not_matter():
    ids, weights, mask = pairs(12)
    want = ops.plan(ids, 4, weights, mask)
    strided = ops.plan(ids.t().contiguous().t(), 4, weights.t().contiguous().t(), mask)
    assert_same_plan(strided, want)
    recorded = ops.plan(ids, 4, weights.requires_grad_(), mask)
    assert_same_plan(recorded, want)
    assert not any(t.requires_grad for t in recorded)


def test_opcheck():
    ids, weights, mask = pairs(5)
    torch.library.opcheck(torch.ops.micro.plan.default, (ids, 4))
    torch.library.opcheck(torch.ops.micro.plan.default, (ids, 4, weights.requires_grad_(), mask), test_utils=OPCHECKS)


def test_one_compiled_graph_serves_all_lengths():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda *a: ops.plan(*a), backend=count, dynamic=True, fullgraph=True)
    for tokens in (3, 5, 8):
        ids, weights, mask = pairs(tokens)
        assert_same_plan(step(ids, 4, weights, mask), ops.plan(ids, 4, weights, mask))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"ids": torch.zeros(2, 1, dtype=torch.int64)}, TypeError, "ids must be Int, got Long"),
        ({"ids": torch.zeros(2, dtype=torch.int32)}, ValueError, r"ids must be \[T, K\], got \[2\]"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int32)}, ValueError, "at least one expert per token"),
        ({"ids": torch.tensor([[0], [4]], dtype=torch.int32)}, ValueError, "outside"),
        ({"ids": torch.tensor([[0], [-1]], dtype=torch.int32)}, ValueError, "outside"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"weights": torch.ones(2, 2)}, ValueError, r"weights must be \[2, 1\], got \[2, 2\]"),
        ({"weights": torch.ones(2, 1, dtype=torch.float16)}, TypeError, "expected float32, float64 or bfloat16"),
        ({"mask": torch.ones(2)}, TypeError, "mask must be Bool, got Float"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask must be \[2\], got \[3\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"ids": torch.zeros(2, 1, dtype=torch.int32), "num_experts": 4}
    with pytest.raises(error, match=words):
        ops.plan(**arguments | change)
