import math

import pytest
import torch
from near import assert_near
from op_cases import SIZES
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference


def problem(rows, columns=17, dtype=torch.float32):
    gate, up = torch.randn(2, rows, columns, dtype=torch.float64)
    gate[:, ::5] *= 30
    return gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("rows", SIZES)
def test_equals_the_reference_forward_and_backward(rows, dtype):
    for columns in (1, 17, 64):
        gate, up = problem(rows, columns, dtype)
        got, want = ops.swiglu(gate, up), reference.swiglu(gate, up)
        assert_near(got, want)
        upstream = torch.randn_like(want)
        for g, w in zip(*(torch.autograd.grad(out, (gate, up), upstream) for out in (got, want)), strict=True):
            assert_near(g, w)


def test_bfloat16_is_the_rounding_of_the_exact_value():
    gate, up = (t.detach() for t in problem(200, dtype=torch.bfloat16))
    exact = reference.swiglu(gate.double(), up.double())
    assert ((ops.swiglu(gate, up).double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-37).all()


def test_extremes():
    gate = torch.tensor([-1000.0, -88.5, 0.0, 88.5, 1000.0, math.inf, math.nan])
    for dtype in RELATIVE:
        y = ops.swiglu(gate.to(dtype), torch.ones(7, dtype=dtype))
        assert y[:3].abs().max() < 1e-30 and y[5] == math.inf and y[6].isnan()
        assert torch.equal(y[3:5], gate[3:5].to(dtype))


def test_sizes_and_strides_do_not_matter():
    gate, up = (t.detach() for t in problem(6))
    want = ops.swiglu(gate, up)
    strided = torch.stack([gate, up], -1)
    assert torch.equal(ops.swiglu(strided[..., 0], strided[..., 1]), want)
    assert torch.equal(ops.swiglu(gate.t(), up.t()), want.t())
    assert torch.equal(ops.swiglu(gate.view(2, 3, 17), up.view(2, 3, 17)), want.view(2, 3, 17))
    for i in (0, 5):  # the same value wherever an element stands in a vector
        assert torch.equal(ops.swiglu(gate[i, 3:4], up[i, 3:4]), want[i, 3:4])
    scalar = ops.swiglu(gate[0, 0], up[0, 0])
    assert scalar.shape == () and scalar == want[0, 0]


def test_first_derivatives_are_right_and_second_ones_are_refused():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(ops.swiglu, (gate, up))
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.swiglu(gate, up).sum(), gate, create_graph=True)


def test_opcheck():
    gate, up = problem(5)
    torch.library.opcheck(torch.ops.micro.swiglu.default, (gate, up))


def test_one_compiled_graph_serves_all_lengths():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda *a: ops.swiglu(*a) * 2, backend=count, dynamic=True, fullgraph=True)
    for rows in (3, 5, 8):
        gate, up = problem(rows)
        assert torch.equal(step(gate, up), ops.swiglu(gate, up) * 2)
    assert len(graphs) == 1


def test_autocast_takes_the_wider_type():
    gate, up = problem(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.swiglu(gate.bfloat16(), up.bfloat16()).dtype == torch.bfloat16
        mixed = ops.swiglu(gate.bfloat16(), up)
    assert mixed.dtype == torch.float32
    mixed.sum().backward()
    assert gate.grad.dtype == torch.float32


def test_forward_mode_is_refused_rather_than_dropped():
    gate, up = (t.detach() for t in problem(2))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        ops.swiglu(torch.autograd.forward_ad.make_dual(gate, up), up)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"gate": torch.ones(2, 8, dtype=torch.float16)}, TypeError, "expected float32, float64 or bfloat16"),
        ({"up": torch.ones(2, 8, dtype=torch.float64)}, TypeError, "up must be Float, got Double"),
        ({"up": torch.ones(8)}, ValueError, r"up must be \[2, 8\], got \[8\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    with pytest.raises(error, match=words):
        ops.swiglu(**{"gate": torch.ones(2, 8), "up": torch.ones(2, 8)} | change)
