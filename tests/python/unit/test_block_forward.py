"""The fused layer: the reference, the same bits as the separate operators, and when a model must not use it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from near import assert_near
from op_cases import OPCHECKS
from small_models import ALL_FOUR, KINDS, random_ids, small_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from micro import ops
from micro.experts import BlockParameters
from micro.modeling import MiCRoCache, MiCRoForCausalLM
from micro.modeling import model as model_module
from micro.modeling.ffn_block import MiCRoAttention
from micro.modeling.fused import FusedLayer
from micro.testing import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
EXPERTS, HIDDEN, HEADS, GROUPS, SIZE, INNER, ROUTER = 4, 24, 4, 2, 8, 40, 16


def parameters(olmo: bool, whole: bool, dtype: torch.dtype, *, folded: bool = False) -> BlockParameters:
    generator = torch.Generator().manual_seed(3)
    axis = (EXPERTS,) if whole else ()

    def matrix(*shape: int, scale: float = 0.2) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def gain(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(*axis, size, generator=generator)).to(dtype)

    queries, keys = HEADS * SIZE, GROUPS * SIZE
    router = matrix(ROUTER, HIDDEN, scale=0.6), matrix(EXPERTS, ROUTER, scale=0.6)
    if folded:
        wide = torch.promote_types(dtype, torch.float32)
        router = None, router[1].to(wide) @ router[0].to(wide)
    return BlockParameters(
        matrix(*axis, queries, HIDDEN), matrix(*axis, keys, HIDDEN), matrix(*axis, keys, HIDDEN),
        matrix(*axis, HIDDEN, queries), matrix(EXPERTS, INNER, HIDDEN), matrix(EXPERTS, INNER, HIDDEN),
        matrix(EXPERTS, HIDDEN, INNER), *router, None if olmo else gain(HIDDEN), gain(HIDDEN),
        *((gain(HIDDEN), gain(queries), gain(keys)) if olmo else (None, None, None)),
    )  # fmt: skip


def problem(olmo: bool, whole: bool, dtype: torch.dtype = torch.float64, *, folded: bool = False) -> dict[str, Any]:
    """Two rows of four slots behind three cached ones, the first row padded on the left."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.promote_types(dtype, torch.float32)
    angles = torch.rand(8, SIZE // 2, generator=generator, dtype=wide)
    shape = (2, EXPERTS if whole else 1, GROUPS, 9, SIZE)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :4] = False
    return {
        "x": torch.randn(8, HIDDEN, generator=generator).to(dtype),
        "parameters": parameters(olmo, whole, dtype, folded=folded),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "heads": HEADS,
        "whole_block": whole,
        "eps": 1e-5,
        "slots": 4,
        "start": 3,
        "keys": torch.randn(shape, generator=generator).to(dtype),
        "values": torch.randn(shape, generator=generator).to(dtype),
        "mask": mask,
        "real": mask[:, 3:].reshape(-1),
    }


@pytest.mark.parametrize("olmo", [False, True], ids=["llama", "olmo2"])
@pytest.mark.parametrize("whole", [True, False], ids=["block", "ffn"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("folded", [False, True], ids=["two_maps", "folded"])
def test_is_the_definition(olmo: bool, whole: bool, k: int, folded: bool) -> None:
    mine, theirs = problem(olmo, whole, folded=folded), problem(olmo, whole, folded=folded)
    got, raw, routing = ops.block_forward(**mine, k=k)
    want, want_raw, want_routing = reference.block_forward(**theirs, k=k)
    assert torch.equal(routing.ids, want_routing.ids)
    real = mine["real"]
    assert_near(got[real], want[real], factor=40)
    assert_near(raw[real], want_raw[real], factor=40)
    assert_near(routing.probs[real], want_routing.probs[real], factor=40)
    for name in ("keys", "values"):
        assert_near(mine[name], theirs[name], factor=40)
        assert not torch.equal(mine[name][:, :, :, 3:7], problem(olmo, whole)[name][:, :, :, 3:7]), "written in place"
        assert torch.equal(mine[name][:, :, :, 7:], problem(olmo, whole)[name][:, :, :, 7:])


def test_rows_and_no_cache() -> None:
    given = problem(False, True)
    rows = torch.eye(EXPERTS, dtype=torch.float64)[torch.arange(8) % 3]
    free = {**given, "start": 0, "keys": None, "values": None, "mask": None, "real": None}
    got, raw, routing = ops.block_forward(**free, rows=rows, run_router=False)
    want, nothing, _ = reference.block_forward(**free, rows=rows, run_router=False)
    assert raw is None
    assert nothing is None
    assert_near(got, want, factor=40)
    assert torch.equal(routing.probs, rows)
    assert ops.block_forward(**free, rows=rows)[1] is not None


def test_refusals() -> None:
    given = problem(False, True)

    def refused(kind: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            ops.block_forward(**{**given, **changes})

    own = given["parameters"]
    refused(ValueError, "q_proj must be", parameters=own._replace(q_proj=own.q_proj[:, :8]))
    refused(TypeError, "up_proj must be", parameters=own._replace(up_proj=own.up_proj.float()))
    refused(ValueError, "input_norm", parameters=own._replace(input_norm=None))
    refused(ValueError, "gate_proj is missing", parameters=own._replace(gate_proj=None))
    refused(ValueError, "slots must divide", slots=3)
    refused(ValueError, "start > 0 needs keys", keys=None, values=None)
    refused(ValueError, "at least 10 slots", start=6, mask=None)
    refused(ValueError, "mask must be", mask=torch.ones(2, 9, dtype=torch.bool))
    refused(ValueError, "multiple of 8", cos=given["cos"][:, :3])
    refused(ValueError, "k must lie", k=5)
    refused(ValueError, "weight_rule", weight_rule="largest")
    refused(ValueError, "force must hold", force=torch.tensor([4], dtype=torch.int32))
    refused(RuntimeError, "requires a gradient", x=given["x"].requires_grad_())
    with torch.no_grad():
        ops.block_forward(**given)


def test_shapes_without_memory() -> None:
    given = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in problem(True, True).items()}
    given["parameters"] = BlockParameters(*(None if t is None else t.to("meta") for t in given["parameters"]))
    y, raw, routing = ops.block_forward(**given, k=2)
    assert (y.shape, raw.shape, routing.ids.shape, routing.probs.shape) == ((8, 24), (8, 4), (8, 2), (8, 4))


def test_registration() -> None:
    given = problem(False, True)
    order = ("cos", "sin", "heads", "whole_block", "eps", "slots", "start", "keys", "values", "mask", "real")
    steering = (None, None, None, None, None)
    arguments = (given["x"], list(given["parameters"]), *(given[n] for n in order), 1, steering, "renormalized", True)
    torch.library.opcheck(torch.ops.micro.block_forward.default, arguments, test_utils=OPCHECKS)


# ---- in a model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every layer that was called: whether it went through the operator."""
    seen: list[bool] = []
    run = FusedLayer.run

    def watched(*args: Any) -> Any:
        done = run(*args)
        seen.append(done is not None)
        return done

    monkeypatch.setattr(FusedLayer, "run", watched)
    return seen


def outputs(model: MiCRoForCausalLM, ids: Tensor, mask: Tensor | None, k: int, **controls: Any) -> list[Tensor]:
    """All that three calls on one cache give, and the cache."""
    cache, out = MiCRoCache(model.config), []
    for first, last in ((0, 5), (5, 8), (8, 9)):
        part = None if mask is None else mask[:, :last]
        steer = {n: v[:, first:last] if isinstance(v, Tensor) else v for n, v in controls.items()}
        done = model(
            ids[:, first:last], attention_mask=part, past_key_values=cache, experts_per_token=k, output_routing=True,
            output_hidden_states=True, **steer,
        )  # fmt: skip
        routing = done.routing
        out += [done.logits, *done.hidden_states, routing.ids, routing.weights, routing.probs, routing.logits]
        out.append(routing.raw_logits)
    return out + [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_same_bits_as_the_separate_operators(
    backbone: str, kind: str, dtype: torch.dtype, k: int, fused: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = small_model(backbone, kind, dtype=dtype), random_ids(3, 9)
    padded = torch.ones(3, 9, dtype=torch.long)
    padded[0, :6] = 0
    cases: list[tuple[Tensor | None, dict[str, Any]]] = [
        (None, {}),
        (padded, {}),
        (None, {"routing_labels": torch.randint(0, 4, (3, 9))}),
        (None, {"ablate": "social", "bias": {"logic": 0.5}}),
        (None, {"force": "world"}),
    ]
    with torch.no_grad():
        for mask, controls in cases:
            mine = outputs(model, ids, mask, k, **controls)
            with monkeypatch.context() as patch:
                patch.setattr(model_module, "can_fuse", lambda *_: False)
                theirs = outputs(model, ids, mask, k, **controls)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert fused == [True] * len(cases) * 3 * 2


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_same_bits_without_a_cache_and_with_fast_numerics(
    backbone: str, kind: str, fused: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(2, 7)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    for numerics in ("reference", "fast"):
        model = small_model(backbone, kind, dtype=torch.bfloat16, numerics=numerics)
        for mask in (None, causal, torch.where(causal, 0.0, -1e9)):
            with torch.inference_mode():
                mine = model(ids, attention_mask=mask, use_cache=False, output_routing=True)
                with monkeypatch.context() as patch:
                    patch.setattr(model_module, "can_fuse", lambda *_: False)
                    theirs = model(ids, attention_mask=mask, use_cache=False, output_routing=True)
            assert torch.equal(mine.logits, theirs.logits)
            assert torch.equal(mine.routing.raw_logits, theirs.routing.raw_logits)
    assert fused == [True] * 12


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_gradients_are_recorded(kind: str, fused: list[bool]) -> None:
    model, ids = small_model(kind=kind), random_ids(1, 4)
    model(ids, use_cache=False).logits.sum().backward()
    assert model.model.layers[0].router.out_proj.weight.grad is not None
    model.requires_grad_(False)
    fused.clear()
    model(ids, use_cache=False)
    assert fused == [True, True], "with the grad mode on, but nothing to differentiate"
    model.model.layers[1].blocks.up_proj.requires_grad_(True)
    model(ids, use_cache=False).logits.sum().backward()
    assert fused == [True, True, True, kind == "block"]
    assert model.model.layers[1].blocks.up_proj.weight.grad is not None


def test_hooks_and_parametrizations_run(fused: list[bool]) -> None:
    ids = random_ids(1, 4)
    for kind, names in {
        "block": ("router", "router.in_proj", "blocks.down_proj", "blocks.k_proj", "blocks.input_norm"),
        "ffn": ("router.out_proj", "self_attn", "self_attn.q_proj", "input_layernorm", "blocks.up_proj"),
    }.items():
        model = small_model(kind=kind)
        with torch.no_grad():
            want = model(ids).logits
            for name in names:
                module, called = model.model.layers[1].get_submodule(name), []
                for register in (module.register_forward_hook, module.register_forward_pre_hook):
                    handle = register(lambda *_, called=called: called.append(1))
                    assert torch.equal(model(ids).logits, want)
                    handle.remove()
                own = module.forward
                module.forward = lambda *a, own=own, called=called, **k: (called.append(1), own(*a, **k))[1]
                assert torch.equal(model(ids).logits, want)
                del module.forward
                assert len(called) >= 3, name
            fused.clear()
            assert torch.equal(model(ids).logits, want)
            assert fused == [True, True], "without hooks the operator is back"
            with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
                model(ids)
            assert fused == [True, True], "a global hook sees every module"
            torch.nn.utils.parametrize.register_parametrization(
                model.model.layers[0].blocks.up_proj, "weight", torch.nn.Tanh(), unsafe=True
            )
            assert not torch.equal(model(ids).logits, want)
            assert fused[2:] == [False, True]


def test_adapters_apply(fused: list[bool]) -> None:
    peft = pytest.importorskip("peft")
    ids = random_ids(1, 4)
    for kind, target in (("block", "out_proj"), ("ffn", "q_proj")):
        model = small_model(kind=kind, dtype=torch.float32)
        with torch.no_grad():
            want = model(ids).logits
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
            ).eval()
            fused.clear()
            assert not torch.equal(adapted(input_ids=ids).logits, want)
            assert fused == [False, False]
            with adapted.disable_adapter():
                assert torch.equal(adapted(input_ids=ids).logits, want)
            merged = adapted.merge_and_unload()
            fused.clear()
            merged(ids)
            assert fused == [True, True]


def test_other_calls_take_the_separate_operators(fused: list[bool]) -> None:
    model, ids = small_model(dtype=torch.float32), random_ids(1, 4)
    with torch.no_grad():
        want = model(ids).logits
        fused.clear()
        stock = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        assert torch.equal(stock, want)
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        with FlopCounterMode(display=False) as counted:
            model(ids)
        assert counted is not None
        model(ids.to(torch.int32))
        model.generate(ids, max_new_tokens=3, do_sample=False, routing_labels=torch.tensor([[0, 1, 2, 3]]))
    assert fused == [True] * len(fused)
    assert len(fused) == 2 + 3 * 2, "the first three never asked"
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    fused.clear()
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, want)
    assert fused == []


def test_a_failed_call_leaves_the_cache_as_it_was() -> None:
    model, ids = small_model(), random_ids(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :4]).past_key_values
        before = [t.clone() for layer in cache.layers for t in (layer.keys, layer.values)]
        layer = model.model.layers[0]
        layer.fused.heads, kept = (3, 2, 8), layer.fused.heads
        with pytest.raises(ValueError, match="query heads"):
            model(ids[:, 4:], past_key_values=cache)
        layer.fused.heads = kept
        assert cache.length == 4
        after = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        done = model(ids[:, 4:], past_key_values=cache).logits
        assert torch.equal(done, model(ids).logits[:, 4:])


def test_copies_are_models_of_their_own() -> None:
    model, ids = small_model(), random_ids(1, 4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(ids).logits
        twin.model.layers[0].blocks.up_proj.weight.zero_()
        assert not torch.equal(twin(ids).logits, want)
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_modules_and_writes_past_autograd_are_seen(kind: str, fused: list[bool]) -> None:
    ids = random_ids(1, 4)
    other = small_model(kind=kind, seed=5).model.layers[0]
    for name in ("blocks", "router", "blocks.up_proj") + (("self_attn", "self_attn.k_proj") if kind == "ffn" else ()):
        model = small_model(kind=kind)
        layer = model.model.layers[0]
        with torch.no_grad():
            before = model(ids).logits
            layer.set_submodule(name, other.get_submodule(name))
            fused.clear()
            got = model(ids).logits
            assert fused == [True, True], name
            assert not torch.equal(got, before)
            assert torch.equal(got, copy.deepcopy(model)(ids).logits), name
            for parameter in layer.parameters():
                parameter.data.mul_(1.25)
            assert torch.equal(model(ids).logits, copy.deepcopy(model)(ids).logits), name


def test_a_module_of_a_class_of_its_own_is_called(fused: list[bool]) -> None:
    class Mute(MiCRoAttention):
        def forward(self, x: Tensor, call: Any) -> Tensor:
            return 0 * super().forward(x, call)

    model, ids = small_model(kind="ffn"), random_ids(1, 4)
    with torch.no_grad():
        want = model(ids).logits
        model.model.layers[1].self_attn.__class__ = Mute
        assert not torch.equal(model(ids).logits, want)
    assert fused == [True, True, True, False]
