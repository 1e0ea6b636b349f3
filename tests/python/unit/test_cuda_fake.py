"""CUDA without a device: shapes, types and devices of every operator and of whole models on fake tensors.

A fake tensor has no values, so whatever looks at one fails here: this also shows that nothing above the operators waits
for the device. Gradients need a device that torch finds: a real or the pretended one.
"""

import pytest
import torch
from op_calls import CALLS, LAYERS_OF_OPS, STEPS, OpCall, ops
from pretend_cuda import knows_cuda
from small_models import BACKBONES, KINDS, small_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from micro.experts import BlockParameters
from micro.modeling import MiCRoForCausalLM

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
models_live = pytest.mark.skipif(not knows_cuda(), reason="this torch cannot make modules on cuda")


def can_differentiate() -> bool:
    """Whether torch's own operators do: a build for CUDA asks the driver for a device when it goes backward."""
    if not knows_cuda():
        return False
    with FakeTensorMode():
        x = torch.ones(1, device="cuda", requires_grad=True)
        try:
            (x * 2).backward()
        except RuntimeError:
            return False
    return True


differentiates = pytest.mark.skipif(not can_differentiate(), reason="this torch cannot differentiate tensors on cuda")


def faked(inputs: dict[str, object]) -> dict[str, object]:
    """The same inputs on cuda, without values; call it under the mode."""

    def one(value: object) -> object:
        if isinstance(value, BlockParameters):
            return BlockParameters(*map(one, value))
        if isinstance(value, list):
            return [one(part) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return made.requires_grad_(value.requires_grad)

    return {name: one(value) for name, value in inputs.items()}


def described(tensors: list[torch.Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in tensors]


def made_for(call: OpCall, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if call.wide_only and dtype in (torch.bfloat16, torch.float16) else dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", [*CALLS, *LAYERS_OF_OPS], ids=str)
def test_an_operator_on_fake_cuda_tensors(call: OpCall, dtype: torch.dtype) -> None:
    dtype = made_for(call, dtype)
    on_cpu = torch.bfloat16 if dtype == torch.float16 else dtype
    with torch.no_grad():
        want = described(call(ops, call.inputs(on_cpu)))
        inputs = call.inputs(dtype)
        with FakeTensorMode():
            got = call(ops, faked(inputs))
    assert {t.device.type for t in got} <= {"cuda"}
    assert described(got) == [(shape, dtype if kind == on_cpu else kind) for shape, kind in want]


@differentiates
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", [c for c in [*CALLS, *LAYERS_OF_OPS] if c.differentiable], ids=str)
def test_gradients_on_fake_cuda_tensors(call: OpCall, dtype: torch.dtype) -> None:
    inputs = call.inputs(made_for(call, dtype))
    with FakeTensorMode():
        fake = faked(inputs)
        results = [result for result in call(ops, fake) if result.requires_grad]
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])
        for leaf in call.leaves(fake):
            assert leaf.grad is not None
            assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, leaf.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_adamw_on_fake_cuda_tensors(dtype: torch.dtype) -> None:
    inputs = STEPS[dtype in (torch.bfloat16, torch.float16)].inputs(dtype)
    with FakeTensorMode():
        ops.adamw_step(**faked(inputs))


# ---- whole models ----------------------------------------------------------------------------------------------------


def model_of(backbone: str, kind: str, dtype: torch.dtype = torch.bfloat16, **fields: object) -> MiCRoForCausalLM:
    """On cuda, under the mode that is on."""
    config = small_config(backbone, kind, **fields)
    with torch.device("cuda"):
        return MiCRoForCausalLM._from_config(config, dtype=dtype)


def ids_of(rows: int = 2, slots: int = 9) -> torch.Tensor:
    return torch.zeros(rows, slots, dtype=torch.int64, device="cuda")


@models_live
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_reads_and_decodes(backbone: str, kind: str) -> None:
    with torch.no_grad(), FakeTensorMode():
        model = model_of(backbone, kind).eval()
        mask = torch.ones(2, 9, dtype=torch.int64, device="cuda")
        out = model(ids_of(), attention_mask=mask, use_cache=True, output_routing=True)
        assert (out.logits.shape, out.logits.dtype, out.logits.device.type) == ((2, 9, 61), torch.bfloat16, "cuda")
        assert out.routing.ids.device.type == "cuda"
        for _ in range(2):
            out = model(ids_of(2, 1), past_key_values=out.past_key_values, use_cache=True)
            assert out.logits.shape == (2, 1, 61)
        assert out.past_key_values.get_seq_length() == 11


@models_live
@pytest.mark.parametrize(
    "controls",
    [
        {"routing_labels": torch.zeros(2, 9, dtype=torch.int64)},
        {"routing_labels": torch.zeros(2, dtype=torch.int64)},
        {"routing_weights": torch.ones(2, 9, 4)},
        {"ablate": torch.zeros(1, 1, 1, 4, dtype=torch.bool)},
        {"bias": torch.zeros(1, 2, 1, 4)},
        {"bias": torch.zeros(1, 1, 1, 4), "ablate": torch.zeros(1, 1, 1, 4, dtype=torch.bool)},
    ],
    ids=["labels", "labels of rows", "weights", "ablate", "bias", "bias and ablate"],
)
def test_steering_that_lies_on_the_device_is_not_waited_for(controls: dict[str, torch.Tensor]) -> None:
    with torch.no_grad(), FakeTensorMode():
        model = model_of("llama", "block").eval()
        moved = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in controls.items()}
        mask = torch.ones(2, 9, dtype=torch.int64, device="cuda")
        assert model(ids_of(), attention_mask=mask, **moved).logits.device.type == "cuda"


@differentiates
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_learns(backbone: str, kind: str, checkpointing: bool) -> None:
    coefficients = {"load_balancing_loss": 0.1, "z_loss": 0.1, "label_loss": 0.1, "entropy": 0.1}
    with FakeTensorMode():
        model = model_of(backbone, kind, loss_coefficients=coefficients).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mask, labels = torch.ones(2, 9, dtype=torch.int64, device="cuda"), ids_of()
        out = model(ids_of(), attention_mask=mask, labels=ids_of(), routing_labels=labels, route_by="router")
        out.loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.device.type == "cuda"


def test_a_look_at_a_value_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(3, device="cuda").any())


@models_live
def test_the_engine_says_where_it_computes() -> None:
    with FakeTensorMode():
        model = model_of("llama", "block", torch.float32)
        with pytest.raises(ValueError, match=r"this model is on cuda:0: pass model.to\(\"cpu\"\)"):
            model.engine()
