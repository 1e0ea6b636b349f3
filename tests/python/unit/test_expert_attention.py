"""Routed attention against the reference, and the invariants that a fast kernel breaks first."""

import pytest
import torch
from tolerances import RELATIVE
from torch import Tensor

from micro import ops
from micro.testing import reference

EXPERTS = 4


def problem(
    slots: int,
    *,
    batch: int = 2,
    start: int = 0,
    spare: int = 0,
    heads: int = 6,
    groups: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    k: int = 1,
    route: str = "mixed",
    mask: Tensor | None = None,
) -> dict[str, object]:
    """Random tensors with outliers and a plan; the last expert stays empty unless the routing says otherwise."""
    generator = torch.Generator().manual_seed(slots * 31 + head_dim)
    tokens = batch * slots
    keys = start + slots + spare

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        values[..., ::7] *= 4  # some scores dominate, as in trained models
        return values.to(dtype)

    if route == "one":
        ids = torch.full((tokens, 1), 2, dtype=torch.int32)
    else:
        ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:k] for _ in range(max(tokens, 1))])[
            :tokens
        ]
    own = None if mask is None or mask.dim() != 2 else mask[:, start : start + slots].reshape(-1)
    plan = reference.plan(ids.int(), EXPERTS, None, own)
    # Values as a projection lays them out, keys as a cache does.
    values = normal(EXPERTS, batch, keys, groups, head_dim).permute(1, 0, 3, 2, 4)
    return {
        "q": normal(tokens * k, heads, head_dim).requires_grad_(),
        "k": normal(batch, EXPERTS, groups, keys, head_dim).requires_grad_(),
        "v": values.requires_grad_(),
        "tokens": plan.tokens,
        "offsets": plan.offsets,
        "slots": slots,
        "start": start,
        "mask": mask,
    }


def assert_near(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    scale = max(scale, want.abs().max().item()) if want.numel() else scale
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=4 * RELATIVE[want.dtype])


def check(arguments: dict[str, object]) -> None:
    """Forward and all gradients against the reference in float64."""
    got = ops.expert_attention(**arguments)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    want = reference.expert_attention(**wide)
    assert_near(got, want.to(got.dtype))
    weight = torch.randn(want.shape, dtype=want.dtype).to(got.dtype)
    inputs = [arguments[name] for name in "qkv"]
    if not want.requires_grad:  # no row at all
        return
    grads = torch.autograd.grad(got, inputs, weight)
    wants = torch.autograd.grad(want, [wide[name] for name in "qkv"], weight.double())
    # Gradients of scores are differences of terms as large as those of grad_v; with one key only rounding is left.
    scale = max(1.0, *(w.abs().max().item() for w in wants))
    for g, w in zip(grads, wants, strict=True):
        assert_near(g, w.to(g.dtype), scale)


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("slots", [1, 31, 33, 65, 129])
def test_equals_the_reference_forward_and_backward(slots: int, dtype: torch.dtype) -> None:
    check(problem(slots, dtype=dtype, batch=1 if slots > 64 else 2))


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("head_dim", [1, 4, 8, 12, 24, 50, 64, 80, 128, 256])
def test_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    check(problem(19, head_dim=head_dim, dtype=dtype, batch=1))


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 4), (9, 3), (8, 1), (33, 1), (5, 1)])
def test_heads_share_keys(heads: int, groups: int) -> None:
    check(problem(21, heads=heads, groups=groups))
    check(problem(21, heads=heads, groups=groups, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("slots, start, spare", [(1, 0, 0), (1, 64, 0), (1, 200, 50), (5, 63, 7), (40, 100, 100)])
def test_a_cache_before_and_spare_slots_behind(slots: int, start: int, spare: int, dtype: torch.dtype) -> None:
    check(problem(slots, start=start, spare=spare, dtype=dtype))


def padded(batch: int, slots: int, side: str, start: int = 0, spare: int = 0) -> Tensor:
    """Row 1 has padding, row 0 none."""
    mask = torch.ones(batch, start + slots + spare, dtype=torch.bool)
    count = (start + slots) * 2 // 3
    if side == "left":
        mask[1, :count] = False
    else:
        mask[1, start + slots - count :] = False
    return mask


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("slots, start, spare", [(30, 0, 0), (100, 0, 3), (20, 90, 9)])
def test_padding(slots: int, start: int, spare: int, side: str, dtype: torch.dtype) -> None:
    check(problem(slots, start=start, spare=spare, mask=padded(2, slots, side, start, spare), dtype=dtype))


def test_a_query_at_a_padded_slot_sees_nothing_and_passes_nothing() -> None:
    arguments = problem(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 3] = False
    out = ops.expert_attention(**arguments | {"mask": mask})
    hidden = arguments["tokens"] == 3
    assert torch.equal(out[hidden], torch.zeros_like(out[hidden]))
    grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), [arguments[name] for name in "qkv"])
    assert grad_q[hidden].abs().sum() == 0
    assert grad_k[0, :, :, 3].abs().sum() == 0 and grad_v[0, :, :, 3].abs().sum() == 0
    assert grad_v[0, :, :, 2].abs().sum() > 0


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_pairwise_mask_replaces_the_causal_rule(kind: str, rows: int, dtype: torch.dtype) -> None:
    slots, start = 23, 60
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(rows, slots, start + slots, generator=generator) > 0.4
    mask[0, 5] = False  # sees nothing
    if kind == "float":
        bias = torch.randn(mask.shape, generator=generator)
        mask = bias.masked_fill(~mask, -torch.inf).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    check(problem(slots, start=start, mask=mask, dtype=dtype))


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_two_experts_per_token_and_all_on_one(dtype: torch.dtype) -> None:
    check(problem(20, k=2, dtype=dtype))
    check(problem(70, route="one", batch=1, dtype=dtype))


def test_no_row_at_all() -> None:
    arguments = problem(4)
    empty = {
        "q": torch.zeros(0, 6, 16, requires_grad=True),
        "tokens": torch.zeros(0, dtype=torch.int32),
        "offsets": torch.zeros(EXPERTS + 1, dtype=torch.int32),
    }
    out = ops.expert_attention(**arguments | empty)
    assert out.shape == (0, 6, 16)
    grad_k, grad_v = torch.autograd.grad(out.sum(), [arguments["k"], arguments["v"]])
    assert grad_k.abs().sum() == 0 and grad_v.abs().sum() == 0


def test_idle_rows_are_zero() -> None:
    arguments = problem(12)
    offsets = arguments["offsets"].clone()
    offsets[2:] = offsets[1]
    out = ops.expert_attention(**arguments | {"offsets": offsets})
    assert out[: offsets[1]].abs().sum() > 0
    assert torch.equal(out[offsets[1] :], torch.zeros_like(out[offsets[1] :]))
    (grad_q,) = torch.autograd.grad(out.sum(), arguments["q"])
    assert grad_q[offsets[1] :].abs().sum() == 0


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_slots_that_nobody_sees_are_not_read_and_get_no_gradient(dtype: torch.dtype) -> None:
    arguments = problem(10, start=5, spare=70, dtype=dtype)
    want = ops.expert_attention(**arguments)
    dirty = {name: arguments[name].detach().clone() for name in "kv"}
    for t in dirty.values():
        t[:, :, :, 15:] = torch.nan
        t.requires_grad_()
    got = ops.expert_attention(**arguments | dirty)
    assert torch.equal(got, want)
    for grad in torch.autograd.grad(got.sum(), list(dirty.values())):
        assert grad[:, :, :, 15:].abs().sum() == 0 and grad[:, 3].abs().sum() == 0
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_chunks_single_steps_and_batches_agree_bit_for_bit(dtype: torch.dtype) -> None:
    slots = 150
    whole = problem(slots, batch=2, dtype=dtype)
    out = ops.expert_attention(**whole)
    order = whole["tokens"].long()
    for begin, end in [(0, 90), (90, 149), (149, 150)]:
        for b in range(2):
            # The same queries as a call of their own: rows of the plan whose token lies in the chunk.
            keep = (order // slots == b) & (order % slots >= begin) & (order % slots < end)
            counts = [int(keep[whole["offsets"][e] : whole["offsets"][e + 1]].sum()) for e in range(EXPERTS)]
            part = ops.expert_attention(
                whole["q"][keep],
                whole["k"][b : b + 1, :, :, :end],
                whole["v"][b : b + 1, :, :, :end],
                (order[keep] % slots - begin).int(),
                torch.tensor([0, *counts]).cumsum(0).int(),
                slots=end - begin,
                start=begin,
            )
            assert torch.equal(part, out[keep])


def test_left_padding_changes_no_bit_of_a_row() -> None:
    # Whole key blocks of padding, so that the remaining blocks begin where they began.
    arguments = problem(40, start=0, batch=1, route="one")
    want = ops.expert_attention(**arguments)
    shift = 64
    k, v = (
        torch.cat(
            [torch.full_like(arguments[n][:, :, :, :1], torch.nan).expand(-1, -1, -1, shift, -1), arguments[n]], 3
        )
        for n in "kv"
    )
    mask = torch.ones(1, 104, dtype=torch.bool)
    mask[:, :shift] = False
    got = ops.expert_attention(**arguments | {"k": k, "v": v, "start": shift, "mask": mask})
    assert torch.equal(got, want)


def test_strides_do_not_matter() -> None:
    arguments = problem(9)
    want = ops.expert_attention(**arguments)
    strided = {name: arguments[name].detach().transpose(3, 4).contiguous().transpose(3, 4) for name in "kv"}
    assert torch.equal(ops.expert_attention(**arguments | strided), want)
    shared = arguments["k"].detach()[:, :1].expand(-1, EXPERTS, -1, -1, -1)
    same = ops.expert_attention(**arguments | {"k": shared})
    assert torch.equal(same, ops.expert_attention(**arguments | {"k": shared.contiguous()}))


def test_threads_change_no_bit() -> None:
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        arguments = problem(150, dtype=torch.bfloat16)
        out = ops.expert_attention(**arguments)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [arguments[n] for n in "qkv"])])
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_a_large_score_does_not_overflow() -> None:
    arguments = problem(40)
    out = ops.expert_attention(**arguments | {"scale": 1e4})
    assert torch.isfinite(out).all()
    assert_near(out, reference.expert_attention(**arguments | {"scale": 1e4}))


def test_first_derivatives_are_right_and_second_ones_are_refused() -> None:
    arguments = problem(5, batch=2, heads=2, groups=1, head_dim=8, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.expert_attention(**arguments | {"q": q, "k": k, "v": v})

    inputs = [arguments[name] for name in "qkv"]
    torch.autograd.gradcheck(run, inputs)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(run(*inputs).sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("unwanted", "qkv")
def test_only_wanted_gradients_are_computed(unwanted: str) -> None:
    arguments = problem(20)
    out = ops.expert_attention(**arguments)
    wants = dict(zip("qkv", torch.autograd.grad(out.sum(), [arguments[n] for n in "qkv"]), strict=True))
    frozen = arguments | {unwanted: arguments[unwanted].detach()}
    others = [n for n in "qkv" if n != unwanted]
    grads = torch.autograd.grad(ops.expert_attention(**frozen).sum(), [frozen[n] for n in others])
    for name, grad in zip(others, grads, strict=True):
        assert torch.equal(grad, wants[name])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5, dtype=torch.bool)])
def test_opcheck(mask: Tensor | None) -> None:
    a = problem(5, mask=mask)
    arguments = (a["q"], a["k"], a["v"], a["tokens"], a["offsets"], 5, 0, mask, None)
    torch.library.opcheck(torch.ops.micro.expert_attention, arguments)


def test_one_compiled_graph_serves_all_lengths() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def call(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        return ops.expert_attention(q, k, v, tokens, offsets, slots=k.shape[3]) * 2

    step = torch.compile(call, backend=count, dynamic=True, fullgraph=True)
    for slots in (7, 9, 11):  # equal to no other size: the tracer takes equal sizes for one
        a = problem(slots)
        arguments = [a[name] for name in ("q", "k", "v", "tokens", "offsets")]
        assert torch.equal(step(*arguments), call(*arguments))
    assert len(graphs) == 1


def test_autocast_lowers_all_three() -> None:
    arguments = problem(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.expert_attention(**arguments).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"q": torch.ones(8, 6, 12)}, ValueError, r"k must be \[B, E, G, J, 12\]"),
        ({"v": torch.ones(1, 4, 2, 9, 16)}, ValueError, "v must be like k"),
        ({"k": torch.ones(2, 4, 2, 4, 16, dtype=torch.float64)}, TypeError, "k is Double"),
        ({"q": torch.ones(8, 5, 16)}, ValueError, "5 query heads cannot share 2 key heads"),
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, TypeError, "tokens must be int32"),
        ({"tokens": torch.zeros(7, dtype=torch.int32)}, ValueError, r"tokens must be \[8\]"),
        ({"tokens": torch.zeros(8, dtype=torch.int32)}, ValueError, "ascend"),
        ({"tokens": torch.arange(8, dtype=torch.int32) + 1}, ValueError, r"\[0, B \* slots\)"),
        ({"offsets": torch.zeros(4, dtype=torch.int32)}, ValueError, r"offsets must be \[5\]"),
        ({"offsets": torch.tensor([0, 9, 9, 9, 9], dtype=torch.int32)}, ValueError, "offsets must ascend"),
        ({"start": 1}, ValueError, "start \\+ slots = 5"),
        ({"start": -1}, ValueError, "start must not be negative"),
        ({"slots": 0}, ValueError, "slots must be positive"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "the 4 key slots"),
        ({"mask": torch.ones(2, 4)}, TypeError, "must be bool"),
        ({"mask": torch.ones(3, 4, 4, dtype=torch.bool)}, ValueError, "2 or 1, 4, 4"),
        ({"mask": torch.ones(1, 4, 4, requires_grad=True)}, ValueError, "no gradient"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.ones(8, 6, 16),
        "k": torch.ones(2, 4, 2, 4, 16),
        "v": torch.ones(2, 4, 2, 4, 16),
        "tokens": torch.arange(8, dtype=torch.int32),
        "offsets": torch.tensor([0, 8, 8, 8, 8], dtype=torch.int32),
        "slots": 4,
    }
    with pytest.raises(error, match=words):
        ops.expert_attention(**arguments | change)


def test_a_head_size_beyond_the_largest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 \.\. 256"):
        ops.expert_attention(**problem(3, head_dim=264))
