import pytest
import torch
from near import assert_near
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference


def inputs(tokens, layers=3, experts=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(layers, tokens, experts, generator=generator, dtype=torch.float64)
    mask = torch.rand(tokens, generator=generator) < 0.7
    return logits.to(dtype).requires_grad_(), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("tokens, experts", [(0, 4), (1, 1), (31, 4), (33, 3), (129, 8)])
def test_equals_the_reference_forward_and_backward(tokens, experts, dtype, masked):
    logits, mask = inputs(tokens, experts=experts, dtype=dtype)
    mask = mask if masked else None
    got, want = ops.z_loss(logits, mask), reference.z_loss(logits, mask)
    assert_near(got, want, dtype=dtype)
    assert_near(*(torch.autograd.grad(0.7 * loss, logits)[0] for loss in (got, want)))


def test_no_real_token_gives_zero():
    logits, mask = inputs(5)
    loss = ops.z_loss(logits, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_strides_do_not_matter_and_an_impossible_expert_changes_nothing():
    logits, mask = inputs(6)
    want = ops.z_loss(logits, mask)
    assert torch.equal(ops.z_loss(logits.transpose(0, 2).contiguous().transpose(0, 2), mask), want)
    impossible = torch.cat([logits, torch.full((3, 6, 1), -torch.inf)], -1)
    assert_near(ops.z_loss(impossible, mask), want)


def test_first_derivatives_are_right_and_second_ones_are_refused():
    logits, mask = inputs(5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda logits: ops.z_loss(logits, mask), logits)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.z_loss(logits, mask), logits, create_graph=True)


def test_opcheck():
    logits, mask = inputs(5)
    torch.library.opcheck(torch.ops.micro.z_loss, (logits, mask))
    torch.library.opcheck(torch.ops.micro.z_loss, (logits,))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": torch.ones(2, 8)}, ValueError, r"logits must be \[L, T, E\]"),
        ({"logits": torch.ones(2, 3, 4).half()}, TypeError, "logits must be float32, float64 or bfloat16"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must be \[3\], got \[4\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"logits": torch.ones(2, 3, 4), "mask": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(error, match=words):
        ops.z_loss(**arguments | change)
