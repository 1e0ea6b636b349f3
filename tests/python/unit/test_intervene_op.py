import pytest
import torch
from near import assert_near
from op_cases import SIZES
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference

EXPERTS, WIDTH = 4, 19
CHANGES = ("zero", "scale", "shift", "replace")


def problem(rows, change, dtype=torch.float64, *, value=(EXPERTS, WIDTH), indexed=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        drawn = torch.randn(*shape, generator=g, dtype=torch.float64)
        drawn.view(-1)[::7] *= 30
        return drawn.to(dtype)

    touched = torch.rand(rows, generator=g) > 0.3
    return {
        "x": numbers(rows, WIDTH),
        "change": change,
        "touched": touched,
        "experts": torch.where(touched, torch.randint(0, EXPERTS, (rows,), generator=g), -1).int(),
        "columns": torch.rand(EXPERTS, WIDTH, generator=g) > 0.3,
        "value": None if change == "zero" else numbers(*value),
        "index": torch.randint(0, value[0], (rows,), generator=g) if indexed else None,
    }


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", SIZES)
def test_equals_the_reference_bit_for_bit(rows, change, dtype):
    for value in ((EXPERTS, WIDTH), (1, 1), (EXPERTS, 1), (1, WIDTH)):
        given = problem(rows, change, dtype, value=value)
        assert torch.equal(ops.intervene(**given), reference.intervene(**given))
    if change != "zero":
        given = problem(rows, change, dtype, value=(70, WIDTH), indexed=True)
        assert torch.equal(ops.intervene(**given), reference.intervene(**given))


@pytest.mark.parametrize("change", CHANGES)
def test_everything_may_be_left_out(change):
    given = problem(9, change, value=(1, WIDTH))
    short = {name: given[name] for name in ("x", "change", "value")}
    assert torch.equal(ops.intervene(**short), reference.intervene(**short))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("indexed", [False, True])
def test_gradients(change, indexed):
    given = problem(11, change, value=(70 if indexed else EXPERTS, WIDTH), indexed=indexed and change != "zero")
    leaves = [t.requires_grad_() for t in (given["x"], given["value"]) if t is not None]

    def run(*values):
        return ops.intervene(**given | dict(zip(("x", "value"), values, strict=False)))

    torch.autograd.gradcheck(run, leaves)
    want = torch.autograd.grad(reference.intervene(**given).square().sum(), leaves, allow_unused=True)
    got = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        assert_near(g, torch.zeros_like(g) if w is None else w)


def test_a_gate_alone_has_its_gradient_and_x_none():
    given = problem(33, "scale", value=(EXPERTS, 1))
    gate = given["value"].requires_grad_()
    ops.intervene(**given).sum().backward()
    changed = given["touched"][:, None] & given["columns"][given["experts"].clamp(min=0)]
    for e in range(EXPERTS):
        mine = changed & (given["experts"] == e)[:, None]
        torch.testing.assert_close(gate.grad[e, 0], (given["x"] * mine).sum())
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.intervene(**given).square().sum(), gate, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("change", CHANGES)
def test_opcheck(change):
    given = problem(7, change)
    given["x"].requires_grad_()
    order = ("x", "change", "touched", "experts", "columns", "value", "index")
    torch.library.opcheck(torch.ops.micro.intervene.default, tuple(given[name] for name in order))


def test_strides_do_not_matter():
    given = problem(9, "scale")
    want = ops.intervene(**given)
    wide = torch.stack([given["x"], given["x"]], -1)
    assert torch.equal(ops.intervene(**given | {"x": wide[..., 0]}), want)
    assert torch.equal(ops.intervene(**given | {"value": given["value"].t().contiguous().t()}), want)


def test_one_compiled_graph_serves_all_lengths():
    step = torch.compile(lambda given: ops.intervene(**given) * 2, backend="aot_eager", dynamic=True, fullgraph=True)
    for rows in (3, 5, 8):
        given = problem(rows, "shift")
        assert torch.equal(step(given), ops.intervene(**given) * 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"change": "double"}, ValueError, "change is 'double'"),
        ({"value": None}, ValueError, "value must be given"),
        ({"change": "zero"}, ValueError, "value must not be given to zero"),
        ({"touched": torch.ones(8)}, TypeError, "touched must be Bool"),
        ({"experts": torch.zeros(7, dtype=torch.int32)}, ValueError, r"experts must be \[8\]"),
        ({"experts": torch.full((8,), 4, dtype=torch.int32)}, ValueError, r"outside \[0, E'\)"),
        ({"columns": torch.ones(EXPERTS, 3, dtype=torch.bool)}, ValueError, "columns must be"),
        ({"value": torch.ones(EXPERTS, 3, dtype=torch.float64)}, ValueError, "value must be"),
        ({"value": torch.ones(EXPERTS, WIDTH)}, TypeError, "value must be"),
        ({"index": torch.full((8,), EXPERTS)}, ValueError, "an index outside the rows of value"),
        ({"x": torch.ones(8, WIDTH, dtype=torch.int64)}, TypeError, "expected float32, float64 or bfloat16"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    given = problem(8, "scale") | {"touched": torch.ones(8, dtype=torch.bool)}
    given["experts"] = given["experts"].clamp(min=0)
    with pytest.raises(error, match=message):
        ops.intervene(**given | change)


# ---- moments --------------------------------------------------------------------------------------------------------


def state(experts, width, *, scatter=False):
    wide = {"dtype": torch.float64}
    parts = [torch.zeros(experts, **wide), torch.zeros(experts, width, **wide), torch.zeros(experts, width, **wide)]
    return [*parts, torch.zeros(experts, width, width, **wide) if scatter else None]


def two_passes(x, num_experts, touched, experts):
    """Of all rows at once: count, mean, sums of squares and of products of deviations."""
    wide, width = x.double(), x.shape[1]
    count, mean = wide.new_zeros(num_experts), wide.new_zeros(num_experts, width)
    scatter = wide.new_zeros(num_experts, width, width)
    for e in range(num_experts):
        own = wide[(experts == e) & touched]
        if len(own):
            count[e], mean[e] = len(own), own.mean(0)
            scatter[e] = (own - mean[e]).T @ (own - mean[e])
    return count, mean, scatter.diagonal(dim1=1, dim2=2), scatter


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("rows", SIZES)
def test_moments_equal_the_reference(rows, dtype):
    given = problem(rows, "zero", dtype)
    x = given["x"] + 1000  # far from 0: sums of squares would lose nine digits
    where = {"touched": given["touched"], "experts": given["experts"]}
    got = state(EXPERTS, WIDTH, scatter=True)
    cut = rows // 3
    for part in (slice(0, cut), slice(cut, None)):
        ops.moments_(x[part], *got, **{name: t[part] for name, t in where.items()})
    definition = state(EXPERTS, WIDTH, scatter=True)
    reference.moments_(x, *definition, **where)
    for want in (definition, two_passes(x, EXPERTS, **where)):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-7)


def test_moments_do_not_depend_on_the_cut_into_calls():
    given = problem(100, "zero")
    where = {"touched": given["touched"], "experts": given["experts"]}
    whole, parts = state(EXPERTS, WIDTH), state(EXPERTS, WIDTH)
    ops.moments_(given["x"], *whole, **where)
    for n in range(100):
        ops.moments_(given["x"][n : n + 1], *parts, **{name: t[n : n + 1] for name, t in where.items()})
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True))


def test_infinite_rows_stay_with_their_expert():
    x = torch.zeros(3, 2, dtype=torch.float64)
    x[1] = torch.inf
    got = state(2, 2, scatter=True)
    ops.moments_(x, *got, experts=torch.tensor([0, 1, 0], dtype=torch.int32))
    assert bool(got[3][0].isfinite().all())


def test_wrong_moments_are_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match="count must be Double"):
        ops.moments_(x, torch.zeros(1), *state(1, 2)[1:])
    with pytest.raises(ValueError, match="mean must be"):
        ops.moments_(x, *state(1, 3))
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        ops.moments_(x, *state(1, 2), experts=torch.ones(3, dtype=torch.int32))
    torch.library.opcheck(torch.ops.micro.moments_.default, (x, *state(1, 2)))
