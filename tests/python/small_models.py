"""Small random models for tests, with routers that decide clearly and gains that are not all one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from micro.modeling import MiCRoConfig, MiCRoForCausalLM
from micro.modeling.keys import official_map, to_official
from micro.testing.reference_model import ReferenceModel

BACKBONES = ("llama", "olmo2")
KINDS = ("block", "ffn")
ALL_FOUR = [(backbone, kind) for backbone in BACKBONES for kind in KINDS]


def small_config(backbone: str = "llama", kind: str = "block", **fields: Any) -> MiCRoConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    return MiCRoConfig(backbone=backbone, block_type=kind, **{**sizes, **fields})


def small_model(
    backbone: str = "llama", kind: str = "block", *, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any
) -> MiCRoForCausalLM:
    """In eval mode. Weights are large enough that all parts of a layer matter."""
    torch.manual_seed(seed)
    model = MiCRoForCausalLM(small_config(backbone, kind, **fields)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.6 if "router" in name else 0.2))
    return model.eval()


def random_ids(rows: int, slots: int, *, seed: int = 1, vocab: int = 61) -> Tensor:
    return torch.randint(3, vocab, (rows, slots), generator=torch.Generator().manual_seed(seed))


def reference_of(model: MiCRoForCausalLM) -> ReferenceModel:
    """The reference on the same weights, as leaves of their own, so that gradients can be compared."""
    state = to_official(model.config, model.state_dict())
    return ReferenceModel(model.config, {k: t.detach().clone().requires_grad_() for k, t in state.items()})


def gradients_in_official_names(model: MiCRoForCausalLM) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    out = {}
    for key, target in official_map(model.config).items():
        grad = parameters[target.name].grad
        assert grad is not None, f"{target.name} has no gradient"
        out[key] = grad if target.expert is None else grad[target.expert]
    return out


def largest(values: Any) -> float:
    return max(float(t.abs().max()) for t in values)


def assert_close(got: Tensor, want: Tensor, bound: float) -> None:
    """Largest difference over the largest magnitude of what is wanted."""
    difference = float((got - want).detach().abs().max())
    assert difference <= bound * max(1.0, float(want.detach().abs().max())), f"differs by {difference}"
