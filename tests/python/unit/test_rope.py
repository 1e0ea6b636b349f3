import pytest
import torch
from near import assert_near
from op_cases import SIZES
from tolerances import RELATIVE

from micro import ops
from micro.testing import reference

LLAMA3 = (32.0, 1.0, 4.0, 8192.0)


def problem(tokens, heads=3, head_dim=16, dtype=torch.float32, outer=()):
    x = torch.randn(*outer, tokens, heads, head_dim, dtype=torch.float64)
    x[..., ::5] *= 30
    positions = torch.randint(0, 3000, (tokens,))
    cos, sin = reference.rope_table(positions, reference.rope_frequencies(head_dim, 10000.0))
    return x.to(dtype).requires_grad_(), cos, sin


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("tokens", SIZES)
def test_equals_the_reference_forward_and_backward(tokens, dtype):
    for heads, head_dim, outer in [(1, 2, ()), (3, 16, (2,)), (2, 66, ()), (2, 128, (2, 3))]:
        x, cos, sin = problem(tokens, heads, head_dim, dtype, outer)
        got, want = ops.rope(x, cos, sin), reference.rope(x, cos, sin)
        assert torch.equal(got, want)
        upstream = torch.randn_like(want)
        assert_near(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_tokens_choose_the_row_of_the_table(dtype):
    x, _, _ = problem(40, dtype=dtype)
    _, cos, sin = problem(7)
    tokens = torch.randint(0, 7, (40,), dtype=torch.int32)
    got, want = ops.rope(x, cos, sin, tokens), reference.rope(x, cos, sin, tokens)
    assert torch.equal(got, want)
    upstream = torch.randn_like(want)
    assert_near(*(torch.autograd.grad(out, x, upstream)[0] for out in (got, want)))
    assert torch.equal(got, ops.rope(x, cos[tokens.long()], sin[tokens.long()]))


def test_position_zero_changes_nothing_and_the_gradient_turns_back():
    x, _, _ = problem(5, dtype=torch.float64)
    cos, sin = ops.rope_table(torch.zeros(5, dtype=torch.int64), ops.rope_frequencies(16, 1e4))
    assert torch.equal(ops.rope(x, cos, sin), x)
    angle = torch.rand(5, 8, dtype=torch.float64)
    y = ops.rope(x, angle.cos(), angle.sin())
    (back,) = torch.autograd.grad(y, x, y.detach())
    assert_near(back, x.detach())


def test_double_tables_serve_float_and_float_tables_serve_double():
    x, cos, sin = problem(4)
    assert torch.equal(ops.rope(x, cos.double(), sin.double()), ops.rope(x, cos, sin))
    wide = x.detach().double()
    assert torch.equal(ops.rope(wide, cos, sin), reference.rope(wide, cos, sin))


def test_strides_do_not_matter():
    x, cos, sin = problem(6)
    heads_first = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not heads_first.is_contiguous()
    assert torch.equal(ops.rope(heads_first, cos.t().contiguous().t(), sin), ops.rope(x, cos, sin))


@pytest.mark.parametrize("head_dim", [2, 8, 64, 66, 80, 128, 256])
@pytest.mark.parametrize("theta", [1.5, 10000.0, 500000.0, 1e6])
def test_frequencies_and_tables_equal_the_reference_bit_for_bit(head_dim, theta):
    for scaling in (None, LLAMA3, (8.0, 1.0, 4.0, 8192.0)):
        f = ops.rope_frequencies(head_dim, theta, scaling)
        assert f.dtype == torch.float32
        assert torch.equal(f, reference.rope_frequencies(head_dim, theta, scaling))
        positions = torch.tensor([0, 1, 7, 3000, 131071])
        for g, w in zip(ops.rope_table(positions, f), reference.rope_table(positions, f), strict=True):
            assert torch.equal(g, w)


def test_llama3_scaling_keeps_the_fast_and_divides_the_slow():
    plain, scaled = ops.rope_frequencies(64, 5e5), ops.rope_frequencies(64, 5e5, LLAMA3)
    wavelength = 2 * torch.pi / plain
    fast, slow = wavelength < 2048, wavelength > 8192
    assert torch.equal(scaled[fast], plain[fast])
    assert torch.equal(scaled[slow], plain[slow] / 32)
    between = scaled[~fast & ~slow]
    assert len(between) and (between < plain[~fast & ~slow]).all()


def test_tables_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=parameters
    )
    positions = torch.tensor([0, 5, 3000, 100000])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    got = ops.rope_table(positions, ops.rope_frequencies(64, 5e5, LLAMA3))
    assert torch.equal(got[0], cos[0, :, :32]) and torch.equal(got[1], sin[0, :, :32])


def test_first_derivatives_are_right_and_second_ones_are_refused():
    x, cos, sin = problem(3, 2, 4, torch.float64)
    tokens = torch.tensor([2, 0, 1], dtype=torch.int32)
    torch.autograd.gradcheck(lambda x: ops.rope(x, cos, sin), (x,))
    torch.autograd.gradcheck(lambda x: ops.rope(x, cos, sin, tokens), (x,))
    upstream = torch.ones_like(x, requires_grad=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.rope(x, cos, sin), x, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="constants"):
        ops.rope(x, cos.requires_grad_(), sin)


def test_opcheck():
    x, cos, sin = problem(5)
    tokens = torch.tensor([0, 1, 1, 2, 4], dtype=torch.int32)
    torch.library.opcheck(torch.ops.micro.rope.default, (x, cos, sin))
    torch.library.opcheck(torch.ops.micro.rope.default, (x, cos, sin, tokens))
    torch.library.opcheck(torch.ops.micro.rope_table.default, (torch.arange(4), ops.rope_frequencies(8, 1e4)))


def test_one_compiled_graph_serves_all_lengths():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda *a: ops.rope(*a) * 2, backend=count, dynamic=True, fullgraph=True)
    for tokens in (5, 7, 9):  # not the number of heads: equal sizes would share a symbol
        x, cos, sin = problem(tokens)
        assert torch.equal(step(x, cos, sin), ops.rope(x, cos, sin) * 2)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.ones(2, 8)}, ValueError, r"x must be \[..., T, heads, D\], got \[2, 8\]"),
        ({"x": torch.ones(2, 1, 7)}, ValueError, "the last size of x must be even"),
        ({"x": torch.ones(2, 1, 8, dtype=torch.int32)}, TypeError, "expected float32, float64 or bfloat16"),
        ({"cos": torch.ones(2, 3)}, ValueError, r"cos must be \[2, 4\], got \[2, 3\]"),
        ({"sin": torch.ones(3, 4)}, ValueError, r"sin must be \[2, 4\], got \[3, 4\]"),
        ({"sin": torch.ones(2, 4).bfloat16()}, TypeError, "sin must be float32 or float64, got BFloat16"),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, TypeError, "tokens must be Int, got Long"),
        ({"tokens": torch.zeros(3, dtype=torch.int32)}, ValueError, r"tokens must be \[2\], got \[3\]"),
        ({"tokens": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, r"tokens must lie in \[0, 2\)"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"x": torch.ones(2, 1, 8), "cos": torch.ones(2, 4), "sin": torch.ones(2, 4)}
    with pytest.raises(error, match=words):
        ops.rope(**arguments | change)


def test_a_wrong_argument_of_the_table_is_named():
    f = ops.rope_frequencies(8, 1e4)
    for words, call in (
        ("head_dim must be a positive even number, got 7", lambda: ops.rope_frequencies(7, 1e4)),
        ("theta must be positive, got 0", lambda: ops.rope_frequencies(8, 0.0)),
        ("high must be greater than low", lambda: ops.rope_frequencies(8, 1e4, (32.0, 4.0, 1.0, 8192.0))),
        ("factor must be positive", lambda: ops.rope_frequencies(8, 1e4, (0.0, 1.0, 4.0, 8192.0))),
        ("scaling must be", lambda: ops.rope_frequencies(8, 1e4, (1.0, 2.0))),
        (r"position_ids must be \[P\]", lambda: ops.rope_table(torch.zeros(1, 2, dtype=torch.int64), f)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="position_ids must be Long, got Int"):
        ops.rope_table(torch.zeros(2, dtype=torch.int32), f)
    with pytest.raises(TypeError, match="frequencies must be Float, got Double"):
        ops.rope_table(torch.zeros(2, dtype=torch.int64), f.double())
