import pytest
import torch
from near import assert_near

from micro import ops
from micro.testing import reference

OPTIONS = {"step": 3, "learning_rate": 1e-2, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "gradient_scale": 0.5}


def inputs(shapes=((5, 3), (1,), (0,), (40_000,)), dtype=torch.float32):
    """Parameters, gradients, moments and, for bfloat16, masters; the second moment is not negative."""
    generator = torch.Generator().manual_seed(7)
    low = dtype == torch.bfloat16
    wide = torch.float32 if low else dtype

    def random(of, factor=1.0):
        return [factor * torch.randn(s, generator=generator, dtype=torch.float64).to(of) for s in shapes]

    values = random(wide)
    masters = values if low else []
    parameters = [v.to(dtype) for v in values] if low else values
    return [parameters, random(dtype, 3.0), random(wide, 0.1), [v.square() for v in random(wide, 0.1)], masters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_the_reference(dtype):
    got, want = inputs(dtype=dtype), inputs(dtype=dtype)
    ops.adamw_step(*got, **OPTIONS)
    reference.adamw_step(*want, **OPTIONS)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_near(x, y)


def test_a_bfloat16_parameter_is_the_rounding_of_its_master():
    arguments = inputs(dtype=torch.bfloat16)
    before = [p.clone() for p in arguments[0]]
    ops.adamw_step(*arguments, **OPTIONS)
    for parameter, master in zip(arguments[0], arguments[4], strict=True):
        assert torch.equal(parameter, master.bfloat16())
    assert not torch.equal(before[0], arguments[0][0])


def test_a_zero_gradient_still_decays():
    """An expert without tokens: its moments shrink and weight decay applies (model.md 2.10.3)."""
    arguments = inputs(shapes=((9,),))
    arguments[1][0].zero_()
    before = [a[0].clone() for a in arguments[:4]]
    ops.adamw_step(*arguments, **OPTIONS)
    assert torch.equal(arguments[2][0], before[2] * 0.8)
    assert not torch.equal(arguments[0][0], before[0])


def test_gradients_of_another_layout_and_transposed_parameters():
    want, got = inputs(shapes=((6, 4),)), inputs(shapes=((6, 4),))
    got = [[t.t().contiguous().t() for t in tensors] for tensors in got]
    got[1] = [t.contiguous() for t in got[1]]
    ops.adamw_step(*want, **OPTIONS)
    ops.adamw_step(*got, **OPTIONS)
    assert torch.equal(got[0][0], want[0][0])
    assert torch.equal(got[2][0], want[2][0])


def test_the_result_does_not_depend_on_the_number_of_threads():
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        arguments = inputs(shapes=((100_000,), (7, 7)))
        ops.adamw_step(*arguments, **OPTIONS)
        results.append((arguments[0][0], ops.gradient_norm(arguments[1])))
    torch.set_num_threads(1)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_autograd_notices_the_change():
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        ops.adamw_step([weight], [weight.clone()], [torch.zeros(3)], [torch.zeros(3)], [], step=1, learning_rate=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do():
    ops.adamw_step([], [], [], [], [], step=1, learning_rate=0.1)


def test_opcheck():
    torch.library.opcheck(torch.ops.micro.adamw_step, tuple(inputs(shapes=((3,),))), OPTIONS)
    torch.library.opcheck(torch.ops.micro.gradient_norm, (inputs(shapes=((3,),))[1],))


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"step": 0}, ValueError, "step must be at least 1"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must not be negative"),
        ({"beta1": 1.0}, ValueError, r"beta1 must lie in \[0, 1\)"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must not be negative"),
        ({"gradients": []}, ValueError, "got 1 parameters, 0 gradients"),
        ({"gradients": [torch.ones(4)]}, ValueError, r"gradients\[0\] must be \[3\], got \[4\]"),
        ({"gradients": [torch.ones(3).double()]}, TypeError, r"gradients\[0\] must be Float"),
        ({"second_moments": [torch.ones(3).double()]}, TypeError, r"second_moments\[0\] must be Float, got Double"),
        ({"masters": [torch.ones(3)]}, TypeError, "masters belong to parameters of 16 bits"),
        ({"parameters": [torch.ones(3).bfloat16()]}, TypeError, "parameters of 16 bits need float32 masters"),
        ({"parameters": [torch.ones(6)[::2]]}, ValueError, r"parameters\[0\] must be dense"),
        ({"parameters": [torch.ones(3, requires_grad=True)]}, RuntimeError, "under no_grad"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    ones = {name: [torch.ones(3)] for name in ("parameters", "gradients", "first_moments", "second_moments")}
    with pytest.raises(error, match=words):
        ops.adamw_step(**ones | {"masters": [], "step": 1, "learning_rate": 0.1} | change)


def test_parameters_of_two_devices_are_refused():
    ones = [torch.ones(3), torch.ones(3, device="meta")]
    with pytest.raises(ValueError, match=r"parameters\[1\] is on meta but parameters\[0\] is on cpu"):
        ops.adamw_step(ones, ones, ones, ones, [], step=1, learning_rate=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_norm_equals_the_reference(dtype):
    gradients = inputs(dtype=dtype)[1]
    assert_near(ops.gradient_norm(gradients), reference.gradient_norm(gradients))
    assert_near(ops.gradient_norm([gradients[0].t()[::2]]), reference.gradient_norm([gradients[0].t()[::2]]))


def test_the_norm_neither_overflows_nor_hides_what_is_not_finite():
    large = torch.full((100,), 3e38)
    assert ops.gradient_norm([large]).item() == pytest.approx(3e39, rel=1e-6)
    for bad in (torch.nan, torch.inf):
        assert not ops.gradient_norm([torch.ones(50), torch.tensor([1.0, bad])]).isfinite()
    assert ops.gradient_norm([torch.zeros(0)]).item() == 0
    with pytest.raises(ValueError, match="at least one tensor"):
        ops.gradient_norm([])
