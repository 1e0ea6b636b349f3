import pytest
import torch
from near import assert_near
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference


def inputs(tokens, layers=3, experts=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(layers, tokens, experts, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, experts, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.7
    return logits.to(dtype).requires_grad_(), labels, mask


@pytest.mark.parametrize("weights", [None, (1.0, 0.0, 0.5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("tokens, experts", [(0, 4), (1, 1), (31, 4), (33, 3), (129, 8)])
def test_equals_the_reference_forward_and_backward(tokens, experts, dtype, masked, weights):
    logits, labels, mask = inputs(tokens, experts=experts, dtype=dtype)
    options = {"mask": mask if masked else None, "layer_weights": None if weights is None else torch.tensor(weights)}
    got = ops.label_loss(logits, labels, **options)
    want = reference.label_loss(logits, labels, **options)
    assert_near(got, want, dtype=dtype)
    assert_near(*(torch.autograd.grad(0.7 * loss, logits)[0] for loss in (got, want)))


@pytest.mark.parametrize("why", ["no label", "no real token", "no layer"])
def test_nothing_to_learn_from_gives_zero(why):
    logits, labels, mask = inputs(5)
    if why == "no label":
        loss = ops.label_loss(logits, torch.full_like(labels, -1), mask)
    elif why == "no real token":
        loss = ops.label_loss(logits, labels, torch.zeros_like(mask))
    else:
        loss = ops.label_loss(logits, labels, mask, layer_weights=torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_micro_batches_add_up():
    logits, labels, mask = inputs(12, dtype=torch.float64)
    parts = [ops.label_loss(logits[:, s], labels[s], mask[s]) for s in (slice(0, 5), slice(5, 12))]
    assert_near(sum(parts), ops.label_loss(logits, labels, mask))


def test_strides_do_not_matter():
    logits, labels, mask = inputs(6)
    strided = logits.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.label_loss(strided, labels, mask), ops.label_loss(logits, labels, mask))


def test_first_derivatives_are_right_and_second_ones_are_refused():
    logits, labels, mask = inputs(5, dtype=torch.float64)
    torch.autograd.gradcheck(lambda logits: ops.label_loss(logits, labels, mask), logits)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.label_loss(logits, labels, mask), logits, create_graph=True)


def test_opcheck():
    logits, labels, mask = inputs(5)
    torch.library.opcheck(torch.ops.micro.label_loss, (logits, labels, mask, torch.tensor([1.0, 2.0, 3.0])))
    torch.library.opcheck(torch.ops.micro.label_loss, (logits, labels))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": torch.ones(2, 8)}, ValueError, r"logits must be \[L, T, E\]"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, TypeError, "labels must be int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels must be \[3\], got \[4\]"),
        ({"labels": torch.tensor([0, 4, -1])}, ValueError, "labels must be expert ids below E"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must be \[3\], got \[4\]"),
        ({"layer_weights": torch.ones(3)}, ValueError, r"layer_weights must be \[2\], got \[3\]"),
        ({"layer_weights": torch.ones(2, dtype=torch.int64)}, TypeError, "layer_weights must be a floating type"),
        (
            {"layer_weights": torch.ones(2, device="meta")},
            ValueError,
            "layer_weights are on meta but logits are on cpu",
        ),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"logits": torch.ones(2, 3, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=words):
        ops.label_loss(**arguments | change)
