import pytest
import torch
from near import assert_near

from micro import ops
from micro.testing import reference

WIDE = [torch.float32, torch.float64]


def inputs(tokens, layers=3, experts=4, k=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(layers, tokens, experts, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1).to(dtype)
    mask = torch.rand(tokens, generator=generator) < 0.7
    return probs.requires_grad_(), probs.topk(min(k, experts)).indices.int(), mask


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("tokens, experts", [(0, 4), (1, 1), (31, 4), (33, 3), (129, 8)])
def test_equals_the_reference_forward_and_backward(tokens, experts, dtype, masked, pooled):
    probs, ids, mask = inputs(tokens, experts=experts, dtype=dtype)
    mask = mask if masked else None
    got = ops.load_balancing_loss(probs, ids, mask, pooled=pooled)
    want = reference.load_balancing_loss(probs, ids, mask, pooled=pooled)
    assert_near(got, want)
    assert_near(*(torch.autograd.grad(0.7 * loss, probs)[0] for loss in (got, want)))


@pytest.mark.parametrize("pooled", [False, True])
def test_its_range_is_that_of_the_paper(pooled):
    """K where everything is even, E where one expert takes everything."""
    even = torch.full((2, 4, 4), 0.25)
    ids = torch.arange(4, dtype=torch.int32).view(1, 4, 1).expand(2, 4, 1)
    assert ops.load_balancing_loss(even, ids, pooled=pooled).item() == pytest.approx(1)
    greedy = torch.tensor([1.0, 0, 0, 0]).expand(2, 4, 4)
    assert ops.load_balancing_loss(greedy, torch.zeros_like(ids), pooled=pooled).item() == pytest.approx(4)


def test_the_pool_hides_one_sided_layers():
    """Layer l sends everything to expert l: even in the pool, as uneven as can be per layer."""
    ids = torch.arange(4, dtype=torch.int32).view(4, 1, 1).expand(4, 5, 1)
    probs = torch.nn.functional.one_hot(ids[..., 0].long(), 4).float()
    assert ops.load_balancing_loss(probs, ids, pooled=True).item() == pytest.approx(1)
    assert ops.load_balancing_loss(probs, ids, pooled=False).item() == pytest.approx(4)


def test_no_real_token_gives_zero():
    probs, ids, mask = inputs(5)
    loss = ops.load_balancing_loss(probs, ids, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def test_strides_do_not_matter():
    probs, ids, mask = inputs(6)
    strided = probs.transpose(0, 2).contiguous().transpose(0, 2).detach().requires_grad_()
    got, want = ops.load_balancing_loss(strided, ids, mask), ops.load_balancing_loss(probs, ids, mask)
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, strided)[0], torch.autograd.grad(want, probs)[0])


def test_first_derivatives_are_right_and_second_ones_are_refused():
    probs, ids, mask = inputs(5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda probs: ops.load_balancing_loss(probs, ids, mask), probs)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.load_balancing_loss(probs, ids, mask), probs, create_graph=True)


def test_opcheck():
    probs, ids, mask = inputs(5)
    torch.library.opcheck(torch.ops.micro.load_balancing_loss, (probs, ids, mask, False))
    torch.library.opcheck(torch.ops.micro.load_balancing_loss, (probs, ids))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"probs": torch.ones(2, 8)}, ValueError, r"probs must be \[L, T, E\]"),
        ({"probs": torch.ones(2, 3, 4).bfloat16()}, TypeError, "probs must be float32 or float64"),
        ({"ids": torch.zeros(2, 3, 1, dtype=torch.int64)}, TypeError, "ids must be int32"),
        ({"ids": torch.zeros(2, 4, 1, dtype=torch.int32)}, ValueError, r"ids must be \[2, 3, K\], got \[2, 4, 1\]"),
        ({"ids": torch.full((2, 3, 1), 4, dtype=torch.int32)}, ValueError, "outside"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must be \[3\], got \[4\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"probs": torch.ones(2, 3, 4), "ids": torch.zeros(2, 3, 1, dtype=torch.int32)}
    with pytest.raises(error, match=words):
        ops.load_balancing_loss(**arguments | change)
