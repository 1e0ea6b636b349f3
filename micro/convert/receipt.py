"""The receipt of upcycling: how far the mixture's logits are from the dense model's (model.md 5.6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from micro.modeling import MiCRoForCausalLM

# Largest difference allowed, relative to the largest logit. Both models compute the same sums in another order and
# round intermediates at different places; a wrong tensor or row order is off by a large part of the logits themselves.
# Also in a float64 model transformers computes norms and rotary tables in float32.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 1e-1}
_ROWS, _LENGTH = 2, 16


def compare(model: MiCRoForCausalLM, dense: PreTrainedModel, seed: int) -> dict[str, Any]:
    """Largest difference of logits on random ids for several routings: the router's own choice, each expert forced,
    a random expert per token, and the router with 2 and with all experts.

    Errors: RuntimeError where the difference is larger than rounding explains; ValueError for float16.
    """
    import torch

    if (dtype := str(model.dtype).removeprefix("torch.")) not in TOLERANCE:
        raise ValueError(
            f"upcycle: the backbone is {dtype}, in which no operator of micro computes, so the check cannot run: pass "
            "dtype='bfloat16' or dtype='float32', or verify=False to keep the file's dtype"
        )
    generator = torch.Generator().manual_seed(seed)
    experts = model.config.num_experts
    ids = torch.randint(dense.config.vocab_size, (_ROWS, _LENGTH), generator=generator).to(dense.device)
    labels = torch.randint(experts, (_ROWS, _LENGTH), generator=generator).to(model.device)
    routings: dict[str, dict[str, Any]] = {"router": {}, "labels": {"routing_labels": labels}}
    routings |= {f"force {name}": {"force": name} for name in model.config.expert_names or []}
    routings |= {f"{k} experts per token": {"experts_per_token": k} for k in sorted({min(2, experts), experts} - {1})}
    expected = _logits(dense, ids, {})
    differences = {}
    for name, controls in routings.items():
        found = _logits(model, ids.to(model.device), controls)
        differences[name] = float((found.to(expected.device) - expected).abs().max())
    scale = float(expected.abs().max())
    worst = max(differences, key=lambda name: differences[name])
    allowed = TOLERANCE[dtype] * scale
    if not differences[worst] <= allowed:  # written so that NaN fails too
        raise RuntimeError(
            f"upcycling changed the function: with routing '{worst}' a logit differs by {differences[worst]:.3g} from "
            f"the dense model's (largest logit {scale:.3g}, allowed {allowed:.3g})"
        )
    return {"max_abs_diff": differences[worst], "max_abs_logit": scale, "routings": differences}


def _logits(model: Any, ids: Tensor, controls: dict[str, Any]) -> Tensor:
    """Logits in float64, in evaluation mode, which is undone afterwards."""
    import torch

    training: bool = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False, **controls).logits
            return logits.double()
    finally:
        model.train(training)
