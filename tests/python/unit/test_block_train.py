"""The training layer: the reference, the same bits as the separate operators, what it keeps, and when it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from near import assert_near
from op_cases import OPCHECKS
from small_models import random_ids, small_model
from torch import Tensor

from micro import ops
from micro.experts import BlockParameters
from micro.modeling import MiCRoForCausalLM
from micro.modeling import model as model_module
from micro.modeling.fused import FusedLayer
from micro.testing import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
POLICIES = ["save", "recompute"]
FAMILIES = pytest.mark.parametrize("olmo", [False, True], ids=["llama", "olmo2"])
EXPERTS, HIDDEN, HEADS, GROUPS, SIZE, INNER, ROUTER, TOKENS = 3, 6, 2, 1, 8, 5, 4, 6


def parameters(olmo: bool, dtype: torch.dtype = torch.float64) -> BlockParameters:
    generator = torch.Generator().manual_seed(3)

    def matrix(*shape: int, scale: float = 0.4) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

    def gain(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(EXPERTS, size, generator=generator)).to(dtype).requires_grad_()

    queries, keys = HEADS * SIZE, GROUPS * SIZE
    return BlockParameters(
        matrix(EXPERTS, queries, HIDDEN), matrix(EXPERTS, keys, HIDDEN), matrix(EXPERTS, keys, HIDDEN),
        matrix(EXPERTS, HIDDEN, queries), matrix(EXPERTS, INNER, HIDDEN), matrix(EXPERTS, INNER, HIDDEN),
        matrix(EXPERTS, HIDDEN, INNER), matrix(ROUTER, HIDDEN, scale=1), matrix(EXPERTS, ROUTER, scale=1),
        None if olmo else gain(HIDDEN), gain(HIDDEN),
        *((gain(HIDDEN), gain(queries), gain(keys)) if olmo else (None, None, None)),
    )  # fmt: skip


def problem(olmo: bool, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Two rows of three slots, the first padded on the left."""
    generator = torch.Generator().manual_seed(5)
    angles = torch.rand(TOKENS, SIZE // 2, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 0] = False
    return {
        "x": torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_(),
        "parameters": parameters(olmo, dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "heads": HEADS,
        "eps": 1e-5,
        "slots": 3,
        "mask": mask,
        "real": mask.reshape(-1),
    }


def fixed(t: Tensor, seed: int) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.dtype)


def total(results: tuple[Any, ...]) -> Tensor:
    """One number to differentiate, of everything that has a gradient."""
    y, raw, routing = results
    parts = [y, raw, routing.weights, routing.probs, routing.effective.masked_fill(routing.effective.isinf(), 0)]
    live = [part for part in parts if part is not None and part.requires_grad]
    return sum(
        ((part * fixed(part, i)).sum().double() for i, part in enumerate(live)), torch.zeros((), dtype=torch.double)
    )


# ---- the operator ---------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_is_the_definition(olmo: bool, k: int, policy: str) -> None:
    given = problem(olmo)
    leaves = [given["x"], *(p for p in given["parameters"] if p is not None)]
    real = given["real"]
    got = ops.block_train(**given, k=k, activations=policy)
    want = reference.block_train(**given, k=k, activations=policy)
    assert torch.equal(got[2].ids, want[2].ids)
    assert_near(got[0][real], want[0][real], factor=40)
    mine = torch.autograd.grad((got[0] * fixed(got[0], 1))[real].sum() + got[2].probs.square().sum(), leaves)
    theirs = torch.autograd.grad((want[0] * fixed(want[0], 1))[real].sum() + want[2].probs.square().sum(), leaves)
    for a, b in zip(mine, theirs, strict=True):
        assert_near(a, b, factor=400)  # a dozen operators in a row, each exact to 1e-12


@FAMILIES
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("rule", ["renormalized", "probability"])
def test_gradcheck(olmo: bool, k: int, rule: str) -> None:
    given = problem(olmo)
    x, own = given.pop("x"), given.pop("parameters")
    bias = torch.tensor([[0.2, -0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    names = [name for name, p in own._asdict().items() if p is not None]

    def layer(x: Tensor, bias: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        y, raw, routing = ops.block_train(
            x, own._replace(**dict(zip(names, values, strict=True))), k=k, bias=bias, weight_rule=rule, **given
        )
        assert raw is not None
        return y, raw, routing.weights, routing.probs, routing.effective

    torch.autograd.gradcheck(layer, (x, bias, *(p for p in own if p is not None)))


def test_rows_decide_without_a_gradient() -> None:
    given = problem(False)
    rows = torch.eye(EXPERTS, dtype=torch.float64)[torch.arange(TOKENS) % 2]
    y, raw, routing = ops.block_train(**given, rows=rows)
    assert raw is not None
    assert not any(t.requires_grad for t in routing)
    y.sum().backward(retain_graph=True)
    router = given["parameters"].router_in, given["parameters"].router_out
    assert all(r is not None and r.grad is not None and not r.grad.any() for r in router), "zero, not absent"
    for p in given["parameters"]:
        assert p is None or p.dim() < 3 or not p.grad[2].any(), "nobody went to the third expert"
    raw.sum().backward()
    assert all(r is not None and r.grad.any() for r in router)
    y, raw, _ = ops.block_train(**given, rows=rows, run_router=False)
    assert raw is None
    assert y.requires_grad


@FAMILIES
def test_only_what_is_wanted(olmo: bool) -> None:
    """Each gradient alone is the gradient among all."""
    given = problem(olmo)
    leaves = {"x": given["x"], **{n: p for n, p in given["parameters"]._asdict().items() if p is not None}}
    for k, policy in ((1, "save"), (2, "recompute"), (2, "save")):
        everything = total(ops.block_train(**given, k=k, activations=policy))
        want = dict(zip(leaves, torch.autograd.grad(everything, list(leaves.values())), strict=True))
        for name in leaves:
            alone = {n: t.detach().requires_grad_(n == name) for n, t in leaves.items()}
            own = given["parameters"]._replace(**{n: t for n, t in alone.items() if n != "x"})
            out = total(ops.block_train(**{**given, "x": alone["x"], "parameters": own}, k=k, activations=policy))
            assert torch.equal(torch.autograd.grad(out, alone[name])[0], want[name]), name


def test_a_loss_on_the_routers_alone() -> None:
    given = problem(False)
    _, raw, routing = ops.block_train(**given)
    assert raw is not None
    (raw.sum() + routing.probs.square().sum()).backward()
    assert given["x"].grad is not None
    assert given["parameters"].router_in.grad.any()
    assert given["parameters"].up_proj.grad is None, "no gradient came to y"


def test_no_token_is_real() -> None:
    for olmo in (False, True):
        given = {**problem(olmo), "real": torch.zeros(TOKENS, dtype=torch.bool), "mask": None}
        ops.block_train(**given, k=2)[0].sum().backward()
        assert not given["x"].grad.any()
        assert all(p is None or not p.grad.any() for p in given["parameters"])


def test_nothing_is_read_that_was_not_written() -> None:
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        for olmo in (False, True):
            given = problem(olmo)
            force = torch.tensor([0, 0, 0, 1, -1, 0], dtype=torch.int32)
            for policy in POLICIES:
                total(ops.block_train(**given, force=force, activations=policy)).backward()
            assert all(p is None or p.grad.isfinite().all() for p in (given["x"], *given["parameters"]))
    finally:
        torch.use_deterministic_algorithms(False)


def test_refusals() -> None:
    given = problem(False)

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.block_train(**{**given, **changes})

    own = given["parameters"]
    refused(ValueError, "activations must be save or recompute, got 'offload'", activations="offload")
    refused(ValueError, "folded router", parameters=own._replace(router_in=None, router_out=torch.zeros(3, 6).double()))
    refused(ValueError, "micro::block_train: q_proj must be", parameters=own._replace(q_proj=own.q_proj[:, :8]))
    refused(NotImplementedError, "rows have no gradient", rows=torch.rand(TOKENS, EXPERTS, requires_grad=True))
    (grad,) = torch.autograd.grad(ops.block_train(**given)[0].sum(), given["x"], create_graph=False)
    assert not grad.requires_grad
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(ops.block_train(**given)[0].sum(), given["x"], create_graph=True)


def test_shapes_without_memory() -> None:
    given = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in problem(True).items()}
    given["parameters"] = BlockParameters(*(None if t is None else t.to("meta") for t in given["parameters"]))
    y, raw, routing = ops.block_train(**given, k=2)
    assert raw is not None
    assert (y.shape, raw.shape, routing.ids.shape, routing.probs.shape) == ((6, 6), (6, 3), (6, 2), (6, 3))


@FAMILIES
def test_registration(olmo: bool) -> None:
    given = problem(olmo)
    call = (given["x"], list(given["parameters"]), *(given[n] for n in ("cos", "sin", "heads", "eps", "slots")))
    rest = (given["mask"], given["real"], 2, (None,) * 5, "renormalized", True)
    train, core = torch.ops.micro.block_train.default, torch.ops.micro.block_train_forward.default
    torch.library.opcheck(train, (*call, *rest, "save"), test_utils=OPCHECKS)
    with torch.no_grad():
        for policy in POLICIES:
            torch.library.opcheck(core, (*call, *rest, policy), test_utils=OPCHECKS)
            y, _, ids, weights, probs, effective, saved = core(*call, *rest, policy)
            decision = (ids, weights, probs, effective, saved)
            wanted = [True, *(p is not None for p in given["parameters"]), True]
            arguments = (torch.ones_like(y), None, None, probs, None, *call, given["mask"], None, False, "renormalized")
            torch.library.opcheck(
                torch.ops.micro.block_train_backward.default, (*arguments, *decision, wanted), test_utils=OPCHECKS
            )


# ---- in a model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer that was called: whether the training operator took it."""
    seen: list[bool] = []
    run, train = FusedLayer.run, ops.block_train

    def watched(*args: Any) -> Any:
        seen.append(False)
        return run(*args)

    def counted(*args: Any, **options: Any) -> Any:
        seen[-1] = True
        return train(*args, **options)

    monkeypatch.setattr(FusedLayer, "run", watched)
    monkeypatch.setattr(ops, "block_train", counted)
    return seen


Loss = Callable[[Any], Tensor]


def through_everything(out: Any) -> Tensor:
    losses = [(out.last_hidden_state * fixed(out.last_hidden_state, 0)).sum()]
    for tensors in (out.router_logits, out.router_probs, out.raw_router_logits):
        for i, t in enumerate(tensors):
            losses.append((t.masked_fill(t.isinf(), 0) * fixed(t, i)).sum())
    return sum(losses, torch.zeros(()))


def through_hidden(out: Any) -> Tensor:
    return (out.last_hidden_state * fixed(out.last_hidden_state, 0)).sum()


def gradients(model: MiCRoForCausalLM, ids: Tensor, loss: Loss, **call: Any) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    out = model.model(inputs_embeds=x, use_cache=False, raw_logits=True, **call)
    loss(out).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "x": x.grad, "y": out.last_hidden_state.detach()}


def assert_same(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, want in theirs.items():
        got = mine[name]
        assert (got is None) == (want is None), name
        assert want is None or torch.equal(got, want), name


@pytest.mark.parametrize("backbone", ["llama", "olmo2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_as_the_separate_operators(
    backbone: str, dtype: torch.dtype, k: int, policy: str, trained: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = small_model(backbone, "block", dtype=dtype).train(), random_ids(3, 9)
    model.model.activation_policy = policy
    padded = torch.ones(3, 9, dtype=torch.long)
    padded[0, :6] = 0
    cases: list[dict[str, Any]] = [
        {},
        {"attention_mask": padded},
        {"attention_mask": torch.ones(9, 9, dtype=torch.bool).tril()[None, None]},
        {"routing_labels": torch.randint(0, 4, (3, 9))},
        {"ablate": "social", "bias": {"logic": 0.5}},
        {"force": "world"},
    ]
    for call in cases:
        for loss in (through_hidden, through_everything):
            mine = gradients(model, ids, loss, experts_per_token=k, **call)
            with monkeypatch.context() as patch:
                patch.setattr(model_module, "can_fuse", lambda *_: False)
                theirs = gradients(model, ids, loss, experts_per_token=k, **call)
            assert_same(mine, theirs)
    assert trained == [True] * len(cases) * 2 * 2


STAGES = {
    "experts, labels": (lambda name: ".blocks." in name, {"routing_labels": torch.randint(0, 4, (2, 7))}),
    "routers, top 2": (lambda name: ".router." in name, {"experts_per_token": 2}),
    "all, top 1": (lambda name: True, {}),
    "one gain": (lambda name: name.endswith("layers.1.blocks.post_attention_norm.weight"), {}),
    "one matrix": (lambda name: name.endswith("layers.1.blocks.down_proj.weight"), {}),
}


@pytest.mark.parametrize("backbone", ["llama", "olmo2"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_freezes_has_no_gradient(
    backbone: str, stage: str, trained: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    learns, call = STAGES[stage]
    model, ids = small_model(backbone, "block", dtype=torch.float32).train(), random_ids(2, 7)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name))
    mine, theirs = [], []
    for results, fused in ((mine, True), (theirs, False)):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(model_module, "can_fuse", lambda *_: False)
            model.zero_grad(set_to_none=True)
            out = model(ids, labels=ids, use_cache=False, **call)
            out.loss.backward()
            results.extend(p.grad for p in model.parameters())
    for (name, _), a, b in zip(model.named_parameters(), mine, theirs, strict=True):
        assert (a is None) == (b is None) == (not learns(name)), name
        assert a is None or torch.equal(a, b), name
    assert any(trained)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_layer(reentrant: bool, trained: list[bool]) -> None:
    model, ids = small_model(dtype=torch.float32).train(), random_ids(2, 7)
    want = gradients(model, ids, through_everything)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    trained.clear()
    assert_same(gradients(model, ids, through_everything), want)
    assert trained == [not reentrant] * 2 + [True] * 2, "forward, and once more in the backward pass"


def saved_bytes(model: MiCRoForCausalLM, ids: Tensor, **call: Any) -> int:
    """Bytes that the layers keep, of tensors that are not parameters; each memory counts once."""
    kept: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = model.model.embed_tokens(ids).detach().requires_grad_()

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known and t.numel():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model.model(inputs_embeds=x, use_cache=False, **call)  # noqa: F841  (its graph holds what is counted)
    return sum(kept.values())


@pytest.mark.parametrize("backbone", ["llama", "olmo2"])
@pytest.mark.parametrize("k", [1, 2])
def test_keeps_what_the_formula_says(backbone: str, k: int) -> None:
    model, ids = small_model(backbone, dtype=torch.bfloat16).train(), random_ids(2, 50)
    c, tokens, layers, experts = model.config, 100, 2, 4
    hidden, inner, queries, keys = c.hidden_size, c.intermediate_size, 4 * 8, 2 * 8
    rows = tokens * k
    integers = 4 * (rows * 2 + experts + 1 + rows * 2)  # the plan and the ids
    decision = 2 * rows + 2 * 4 * tokens * experts  # weights, probabilities, effective logits
    attention = 2 * (2 * rows * queries + 2 * tokens * experts * keys) + 4 * rows * 4  # q, output, k, v, logsumexp
    layer = integers + decision + attention + 2 * tokens * hidden + 2 * rows * hidden  # and x, u
    of_model = 2 * tokens * hidden + 4 * tokens + 2 * 4 * tokens * 4  # the last norm's input and statistic; cos, sin
    learning = 2 * rows * hidden * (k > 1 or backbone == "olmo2")  # experts' outputs
    learning += 2 * tokens * c.router_hidden_size * (k > 1)  # between the router's maps
    for policy, more in (("recompute", 0), ("save", 2 * 2 * rows * inner + learning)):
        model.model.activation_policy = policy
        got = saved_bytes(model, ids, experts_per_token=k)
        assert got <= layers * (layer + more) + of_model
        assert got >= 0.95 * (layers * (layer + more) + of_model), "the formula is no loose bound"


def test_backward_hooks_and_autocast_see_the_modules(trained: list[bool]) -> None:
    model, ids = small_model(dtype=torch.float32).train(), random_ids(1, 4)
    called: list[int] = []
    handle = model.model.layers[1].blocks.up_proj.register_full_backward_hook(lambda *_: called.append(1))
    model(ids, use_cache=False).logits.sum().backward()
    assert (trained, called) == ([True, False], [1])
    handle.remove()
    trained.clear()
    with torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None):
        model(ids, use_cache=False).logits.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, use_cache=False).logits.sum().backward()
    assert trained == [], "neither call asked"
    model(ids).logits.sum().backward()
    assert trained == [True, True], "in training there is no cache"
    trained.clear()
    model(ids, use_cache=True).logits.sum().backward()
    assert not any(trained)


def test_an_unknown_policy_is_refused() -> None:
    model = small_model()
    model.model.activation_policy = "offload"
    with pytest.raises(ValueError, match="activations must be save or recompute"):
        model(random_ids(1, 4), use_cache=False)
