import pytest
import torch
from near import assert_near
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference


def inputs(rows, hidden=16, vocabulary=50, dtype=torch.float32, every=3):
    """Every `every`-th row has no target; some hidden values are outliers."""
    generator = torch.Generator().manual_seed(rows * 31 + vocabulary)
    h = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    h[:, ::5] *= 6
    weight = 0.5 * torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[::every] = -100
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(0, 7), (1, 1), (2, 5), (31, 16), (33, 129), (129, 50)])
def test_equals_the_reference_forward_and_backward(rows, vocabulary, dtype):
    h, weight, targets = inputs(rows, vocabulary=vocabulary, dtype=dtype, every=2)
    got, want = ops.cross_entropy(h, weight, targets), reference.cross_entropy(h, weight, targets)
    assert_near(got, want, dtype=dtype)
    for g, w in zip(
        torch.autograd.grad(0.3 * got, (h, weight)), torch.autograd.grad(0.3 * want, (h, weight)), strict=True
    ):
        assert_near(g, w)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_many_chunks_are_one_sum(dtype):
    """A vocabulary so large that 32 MiB of logits hold a few rows only."""
    h, weight, targets = inputs(37, hidden=2, vocabulary=400_000, dtype=dtype)
    got, want = ops.cross_entropy(h, weight, targets), reference.cross_entropy(h, weight, targets)
    assert_near(got, want, dtype=dtype)
    for g, w in zip(torch.autograd.grad(got, (h, weight)), torch.autograd.grad(want, (h, weight)), strict=True):
        assert_near(g, w, factor=8)


def test_no_target_gives_zero_and_zero_gradients():
    h, weight, targets = inputs(5)
    loss = ops.cross_entropy(h, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(h.grad, torch.zeros_like(h))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_without_target_cost_nothing_and_get_zero():
    h, weight, targets = inputs(9)
    with torch.no_grad():
        h[targets == -100] = torch.nan
    ops.cross_entropy(h, weight, targets).backward()
    assert torch.equal(h.grad[targets == -100], torch.zeros(3, 16))
    assert weight.grad.isfinite().all()


def test_another_ignore_index():
    h, weight, targets = inputs(6)
    shifted = torch.where(targets == -100, 7, torch.where(targets == 7, 8, targets))
    got = ops.cross_entropy(h, weight, shifted, ignore_index=7)
    assert_near(got, reference.cross_entropy(h, weight, shifted, ignore_index=7))


def test_what_is_frozen_gets_no_gradient():
    h, weight, targets = inputs(9)
    call = torch.ops.micro.cross_entropy_forward
    _, grad_hidden, grad_weight = call(h.detach(), weight.detach(), targets, -100, [True, False])
    assert grad_hidden.shape == h.shape
    assert grad_weight.numel() == 0
    want = torch.autograd.grad(reference.cross_entropy(h, weight, targets), (h, weight))
    for frozen in (0, 1):
        arguments = [h.detach(), weight.detach()]
        arguments[1 - frozen].requires_grad_()
        (got,) = torch.autograd.grad(ops.cross_entropy(*arguments, targets), arguments[1 - frozen])
        assert_near(got, want[1 - frozen])


def test_a_tied_head_adds_both_gradients():
    embedding = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.tensor([1, 2, 2, 9]), torch.tensor([2, 2, 9, -100])
    for function in (ops, reference):
        loss = function.cross_entropy(torch.tanh(embedding[ids]), embedding, targets)
        (gradient,) = torch.autograd.grad(loss, embedding)
        if function is ops:
            got = gradient
    assert_near(got, gradient)


def test_strides_do_not_matter():
    h, weight, targets = inputs(6)
    want = ops.cross_entropy(h, weight, targets)
    strided = h.detach().t().contiguous().t(), weight.detach().t().contiguous().t()
    spread = torch.stack([targets, targets], 1)[:, 0]
    assert not spread.is_contiguous()
    assert_near(ops.cross_entropy(*strided, spread), want.detach())


def test_a_second_backward_of_the_same_graph_gives_the_same():
    h, weight, targets = inputs(6)
    loss = ops.cross_entropy(h, weight, targets)
    first = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (h, weight))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (h, weight))


def test_infinite_logits_and_nan():
    """A logit of minus infinity has probability 0; NaN reaches the loss."""
    h = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [-torch.inf], [1.0]])
    loss = ops.cross_entropy(h, weight, torch.tensor([0]))
    assert_near(loss, torch.log(1 + torch.tensor(1.0).exp()))
    assert ops.cross_entropy(h, torch.tensor([[0.0], [torch.nan]]), torch.tensor([0])).isnan()


def test_first_derivatives_are_right_and_second_ones_are_refused():
    h, weight, targets = inputs(5, hidden=4, vocabulary=7, dtype=torch.float64)
    torch.autograd.gradcheck(lambda h, weight: ops.cross_entropy(h, weight, targets), (h, weight))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.cross_entropy(h, weight, targets), h, create_graph=True)


def test_opcheck():
    h, weight, targets = inputs(5)
    torch.library.opcheck(torch.ops.micro.cross_entropy, (h, weight, targets, -100))


def test_autocast_uses_its_type():
    h, weight, targets = inputs(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.cross_entropy(h, weight, targets)
    want = ops.cross_entropy(h.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(got, want)


def test_the_result_does_not_depend_on_the_number_of_threads():
    h, weight, targets = inputs(33, vocabulary=3000)
    with torch.no_grad():
        losses = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            losses.append(ops.cross_entropy(h, weight, targets))
        torch.set_num_threads(1)
    assert_near(losses[0], losses[1])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": torch.ones(2, 3, 8)}, ValueError, r"hidden must be \[T, H\]"),
        ({"weight": torch.ones(5, 9)}, ValueError, r"weight must be \[V, 8\], got \[5, 9\]"),
        ({"weight": torch.ones(5, 8, dtype=torch.float64)}, TypeError, "weight is Double but hidden is Float"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, TypeError, "targets must be int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets must be \[2\], got \[3\]"),
        ({"targets": torch.tensor([0, 5])}, ValueError, r"a target lies outside \[0, 5\)"),
        ({"targets": torch.tensor([0, -1])}, ValueError, "is not ignore_index"),
        ({"hidden": torch.ones(2, 8).half(), "weight": torch.ones(5, 8).half()}, TypeError, "expected float32"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"hidden": torch.ones(2, 8), "weight": torch.ones(5, 8), "targets": torch.tensor([0, 4])}
    with pytest.raises(error, match=words):
        ops.cross_entropy(**arguments | change)
