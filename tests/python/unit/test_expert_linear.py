"""Expert and stacked linear maps against the reference: few rows (own kernel) and many (matrix product)."""

import pytest
import torch
from tolerances import RELATIVE
from torch import Tensor

from micro import ops
from micro.testing import reference

EXPERTS = 4
COUNTS = {
    "none": [0, 0, 0, 0],
    "one row": [0, 1, 0, 0],
    "one each": [1, 1, 1, 1],
    "few": [2, 3, 0, 8],
    "around the crossover": [7, 8, 9, 0],
    "all on one": [0, 0, 33, 0],
    "many": [31, 0, 64, 129],
}


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)
    if values.numel():
        values[..., ::9] *= 10  # activations of real models have outliers
    return values.to(dtype).requires_grad_()


def assert_near(got: Tensor, want: Tensor) -> None:
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=4 * RELATIVE[got.dtype])


def check(got: Tensor, want: Tensor, inputs: tuple[Tensor, Tensor], wide: tuple[Tensor, Tensor]) -> None:
    """Values and gradients; `want` and `wide` are the same in float64."""
    assert_near(got, want)
    weight = torch.randn(want.shape, dtype=want.dtype).to(got.dtype)
    grads = torch.autograd.grad(got, inputs, weight)
    for g, w in zip(grads, torch.autograd.grad(want, wide, weight.double()), strict=True):
        assert_near(g, w)


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_() for t in tensors)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("width, out", [(8, 16), (33, 7), (576, 192), (1, 1), (129, 130)])
@pytest.mark.parametrize("case", COUNTS)
def test_expert_linear_equals_the_reference(case: str, width: int, out: int, dtype: torch.dtype) -> None:
    offsets = offsets_of(COUNTS[case])
    inputs = normal(int(offsets[-1]) + 3, width, dtype=dtype), normal(EXPERTS, out, width, dtype=dtype, seed=1)
    got = ops.expert_linear(*inputs, offsets)
    wide = doubles(*inputs)
    want = reference.expert_linear(*wide, offsets)
    assert torch.equal(got[offsets[-1] :], torch.zeros_like(got[offsets[-1] :]))
    check(got, want, inputs, wide)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("case", [None, "none", "one row", "few", "one each"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33])
def test_stacked_linear_equals_the_reference(tokens: int, case: str | None, shared: bool, dtype: torch.dtype) -> None:
    offsets = None if case is None else offsets_of(COUNTS[case])
    x = normal(1 if shared else EXPERTS, tokens, 40, dtype=dtype)
    inputs = x, normal(EXPERTS, 24, 40, dtype=dtype, seed=1)
    wide = doubles(*inputs)
    want = reference.stacked_linear(*wide, offsets)
    if want.requires_grad:
        check(ops.stacked_linear(*inputs, offsets), want, inputs, wide)


def test_an_expert_without_rows_gets_a_zero_gradient() -> None:
    x, weight = normal(9, 16, dtype=torch.float32), normal(EXPERTS, 8, 16, dtype=torch.float32)
    for y in (
        ops.expert_linear(x, weight, offsets_of([4, 0, 5, 0])),
        ops.stacked_linear(x[None], weight, offsets_of([4, 0, 5, 0])),
    ):
        (grad,) = torch.autograd.grad(y.sum(), weight)
        assert torch.equal(grad[[1, 3]], torch.zeros(2, 8, 16))
        assert grad[0].abs().sum() > 0 and grad[2].abs().sum() > 0


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_plain_head(rows: int, dtype: torch.dtype) -> None:
    hidden, head = normal(rows, 64, dtype=dtype), normal(1000, 64, dtype=dtype, seed=2)
    logits = ops.expert_linear(hidden, head[None], torch.tensor([0, rows], dtype=torch.int32))
    assert_near(logits, hidden.double() @ head.double().T)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_few_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    x, weight = normal(8, 200, dtype=dtype), normal(1, 50, 200, dtype=dtype)
    whole = ops.expert_linear(x, weight, torch.tensor([0, 8], dtype=torch.int32))
    for n in range(8):
        alone = ops.expert_linear(x[n : n + 1], weight, torch.tensor([0, 1], dtype=torch.int32))
        assert torch.equal(alone[0], whole[n])


def test_strides_do_not_matter() -> None:
    x, weight = normal(12, 16, dtype=torch.float32), normal(EXPERTS, 8, 16, dtype=torch.float32)
    offsets = offsets_of([1, 0, 11, 0])
    strided = x.detach().t().contiguous().t(), weight.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(ops.expert_linear(*strided, offsets), ops.expert_linear(x, weight, offsets))
    assert torch.equal(ops.stacked_linear(strided[0][None], strided[1]), ops.stacked_linear(x[None], weight))


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("name", ["expert_linear_backward", "stacked_linear_backward"])
def test_unwanted_gradients_are_not_computed(name: str, frozen: int) -> None:
    lead = (1,) if name.startswith("stacked") else ()
    experts = (EXPERTS,) if lead else ()
    grad_y, x, weight = torch.ones(*experts, 9, 8), torch.ones(*lead, 9, 16), torch.ones(EXPERTS, 8, 16)
    wanted = [frozen != 0, frozen != 1]
    grads = getattr(torch.ops.micro, name)(grad_y, x, weight, offsets_of([4, 0, 5, 0]), wanted)
    assert [g is not None for g in grads] == wanted


def test_first_derivatives_are_right_and_second_ones_are_refused() -> None:
    x, weight = normal(5, 6, dtype=torch.float64), normal(EXPERTS, 3, 6, dtype=torch.float64)
    offsets = offsets_of([2, 0, 2, 0])
    torch.autograd.gradcheck(lambda x, w: ops.expert_linear(x, w, offsets), (x, weight))
    torch.autograd.gradcheck(lambda x, w: ops.stacked_linear(x[None], w, offsets), (x, weight))
    for y in (ops.expert_linear(x, weight, offsets), ops.stacked_linear(x[None], weight, offsets)):
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_opcheck() -> None:
    x, weight = normal(5, 6, dtype=torch.float32), normal(EXPERTS, 3, 6, dtype=torch.float32)
    offsets = offsets_of([2, 0, 2, 0])
    torch.library.opcheck(torch.ops.micro.expert_linear, (x, weight, offsets))
    leaf = x.detach()[None].clone().requires_grad_()
    torch.library.opcheck(torch.ops.micro.stacked_linear, (leaf, weight, offsets))
    torch.library.opcheck(torch.ops.micro.stacked_linear, (leaf, weight, None))


def test_one_compiled_graph_serves_all_lengths() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def call(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return ops.expert_linear(x, weight, offsets) + ops.stacked_linear(x[None], weight, offsets).sum(0)

    step = torch.compile(call, backend=count, dynamic=True, fullgraph=True)
    weight, offsets = normal(EXPERTS, 3, 6, dtype=torch.float32), offsets_of([2, 0, 1, 0])
    for rows in (7, 9, 11):  # equal to no other size: the tracer takes equal sizes for one
        x = normal(rows, 6, dtype=torch.float32)
        assert torch.equal(step(x, weight, offsets), call(x, weight, offsets))
    assert len(graphs) == 1


def test_autocast_lowers_both() -> None:
    x, weight = normal(5, 6, dtype=torch.float32), normal(EXPERTS, 3, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.expert_linear(x, weight, offsets_of([2, 0, 2, 0])).dtype == torch.bfloat16
        assert ops.stacked_linear(x[None], weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.ones(4)}, ValueError, "x must be"),
        ({"weight": torch.ones(4, 3, 7)}, ValueError, r"weight must be \[E, out, 6\]"),
        ({"weight": torch.ones(4, 3, 6, dtype=torch.float64)}, TypeError, "weight is Double but x is Float"),
        ({"offsets": torch.zeros(5, dtype=torch.int64)}, TypeError, "offsets must be int32"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, ValueError, r"offsets must be \[5\]"),
        ({"offsets": torch.tensor([0, 3, 2, 4, 4], dtype=torch.int32)}, ValueError, "ascend"),
        ({"offsets": torch.tensor([1, 2, 2, 4, 4], dtype=torch.int32)}, ValueError, "ascend"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    arguments = {"x": torch.ones(4, 6), "weight": torch.ones(4, 3, 6), "offsets": offsets_of([1, 1, 1, 1])}
    with pytest.raises(error, match=words):
        ops.expert_linear(**arguments | change)
    stacked = arguments | change
    with pytest.raises(error, match=words):
        ops.stacked_linear(**stacked | {"x": stacked["x"][None]})


def test_offsets_beyond_the_rows_and_a_wrong_number_of_slices_are_refused() -> None:
    with pytest.raises(ValueError, match="ascend from 0 to at most the number of rows"):
        ops.expert_linear(torch.ones(3, 6), torch.ones(4, 3, 6), offsets_of([1, 1, 1, 1]))
    with pytest.raises(ValueError, match="x has 3 slices"):
        ops.stacked_linear(torch.ones(3, 2, 6), torch.ones(4, 3, 6))
