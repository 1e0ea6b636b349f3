import math

import pytest
import torch
from near import assert_near

from micro import ops
from micro.testing import reference


def inputs(tokens, shape=(3,), experts=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(*shape, tokens, experts, generator=generator, dtype=torch.float64)
    mask = torch.rand(tokens, generator=generator) < 0.7
    return logits.softmax(-1).to(dtype).requires_grad_(), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("tokens, experts", [(0, 4), (1, 1), (31, 4), (33, 3), (129, 8)])
def test_equals_the_reference_forward_and_backward(tokens, experts, shape, dtype, masked):
    probs, mask = inputs(tokens, shape, experts, dtype)
    mask = mask if masked else None
    got, want = ops.routing_entropy(probs, mask), reference.routing_entropy(probs, mask)
    assert_near(got, want)
    weight = torch.randn_like(want)
    assert_near(*(torch.autograd.grad(entropy, probs, weight)[0] for entropy in (got, want)))


def test_its_range_is_zero_to_log_e():
    assert ops.routing_entropy(torch.full((7, 4), 0.25)).item() == pytest.approx(math.log(4))
    assert ops.routing_entropy(torch.tensor([[0.0, 1.0, 0.0]])).item() == 0


def test_an_expert_that_cannot_be_chosen_does_not_move():
    logits = torch.tensor([[0.3, -torch.inf, 1.0]], requires_grad=True)
    ops.routing_entropy(logits.softmax(-1)).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0


def test_no_real_token_gives_zero():
    probs, mask = inputs(5)
    entropy = ops.routing_entropy(probs, torch.zeros_like(mask))
    entropy.sum().backward()
    assert torch.equal(entropy, torch.zeros(3))
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def test_strides_do_not_matter():
    probs, mask = inputs(6)
    strided = probs.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.routing_entropy(strided, mask), ops.routing_entropy(probs, mask))


def test_first_derivatives_are_right_and_second_ones_are_refused():
    probs, mask = inputs(5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda probs: ops.routing_entropy(probs, mask), probs)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.routing_entropy(probs, mask).sum(), probs, create_graph=True)


def test_opcheck():
    probs, mask = inputs(5)
    torch.library.opcheck(torch.ops.micro.routing_entropy, (probs, mask))
    torch.library.opcheck(torch.ops.micro.routing_entropy, (probs[0],))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"probs": torch.ones(8)}, ValueError, r"probs must be \[..., T, E\]"),
        ({"probs": torch.ones(3, 4).bfloat16()}, TypeError, "probs must be float32 or float64"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must be \[3\], got \[4\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"probs": torch.ones(2, 3, 4), "mask": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(error, match=words):
        ops.routing_entropy(**arguments | change)
