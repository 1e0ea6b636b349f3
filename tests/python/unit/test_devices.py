"""Every operator on every device against its definition, forward and backward, in every dtype the device has."""

import pytest
import torch
from near import assert_near
from op_calls import CALLS, LAYERS_OF_OPS, STEPS, OpCall, ops, reference
from pretend_cuda import no_waits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The sums of a gradient are longer than those of a result, and it is made of rounded numbers.
GRADIENT_FACTOR = 16


def gradients(call: OpCall, module: object, dtype: torch.dtype, device: torch.device) -> tuple[list, list]:
    """Results and gradients, for fixed gradients of the floating results."""
    inputs = call.inputs(dtype, device)
    results = call(module, inputs)
    generator = torch.Generator().manual_seed(3)
    pairs = [
        (result, torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result))
        for result in results
        if result.requires_grad
    ]
    if pairs:
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    return results, [leaf.grad for leaf in call.leaves(inputs)] if pairs else []


def skip_unless_there(device: torch.device, dtype: torch.dtype, call: OpCall) -> None:
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("the CPU has no float16")
    if call.wide_only and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("takes probabilities, which are never narrow")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_operator_is_its_definition(call: OpCall, dtype: torch.dtype, device: torch.device) -> None:
    skip_unless_there(device, dtype, call)
    got, got_gradients = gradients(call, ops, dtype, device)
    want, want_gradients = gradients(call, reference, dtype, torch.device("cpu"))
    assert [t.device.type for t in got] == [device.type] * len(want)
    for mine, theirs in zip(got, want, strict=True):
        if mine.is_floating_point():
            finite = torch.isfinite(theirs)
            assert torch.equal(mine.detach().cpu()[~finite], theirs.detach()[~finite])
            assert_near(mine.detach().cpu()[finite], theirs.detach()[finite], dtype=dtype)
        else:
            assert torch.equal(mine.cpu(), theirs)
    for mine, theirs in zip(got_gradients, want_gradients, strict=True):
        assert mine.device.type == device.type
        assert_near(mine.cpu(), theirs, dtype=dtype, factor=GRADIENT_FACTOR)


# Narrow dtypes: a near-tie of the router falls either way, and the rows of a layer are then not comparable.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("call", LAYERS_OF_OPS, ids=str)
def test_a_layer_is_its_definition(call: OpCall, dtype: torch.dtype, device: torch.device) -> None:
    got, got_gradients = gradients(call, ops, dtype, device)
    want, want_gradients = gradients(call, reference, dtype, torch.device("cpu"))
    for mine, theirs in zip([*got, *got_gradients], [*want, *want_gradients], strict=True):
        assert mine.device.type == device.type
        if mine.is_floating_point():
            assert_near(mine.detach().cpu(), theirs.detach(), dtype=dtype, factor=GRADIENT_FACTOR)
        else:
            assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_adamw_is_its_definition(dtype: torch.dtype, device: torch.device) -> None:
    call = STEPS[dtype in (torch.bfloat16, torch.float16)]
    skip_unless_there(device, dtype, call)
    got, want = call.inputs(dtype, device), call.inputs(dtype)
    ops.adamw_step(**got)
    reference.adamw_step(**want)
    for name in ("parameters", "first_moments", "second_moments", "masters"):
        for mine, theirs in zip(got[name], want[name], strict=True):
            assert mine.device.type == device.type
            assert_near(mine.cpu(), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("call", [*CALLS, *LAYERS_OF_OPS], ids=str)
def test_nobody_waits_for_the_device(call: OpCall) -> None:
    dtype, device = torch.float32, torch.device("cuda")
    inputs = call.inputs(dtype, device)
    with no_waits():
        results = [result for result in call(ops, inputs) if result.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])


@pytest.mark.parametrize("call", [c for c in CALLS if not c.wide_only], ids=str)
def test_float16_is_refused_on_the_cpu(call: OpCall) -> None:
    inputs = call.inputs(torch.float16)
    if not any(isinstance(t, torch.Tensor) and t.dtype == torch.float16 for t in inputs.values()):
        pytest.skip("takes no floating tensor")
    with pytest.raises(TypeError, match="float32, float64 or bfloat16 \\(on CUDA float16 as well\\), got Half"):
        call(ops, inputs)
