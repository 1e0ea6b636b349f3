"""Mixture of experts -> one dense Hugging Face model (model.md 5.7)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micro.convert.backbone import KEPT_FIELDS, dense_key
from micro.convert.card import collapsed_card
from micro.convert.tensors import official_tensors
from micro.files import replace_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from micro.modeling import MiCRoConfig, MiCRoForCausalLM

RULES = ("mean", "expert", "weighted")
Expert = int | str
Weights = Any  # a mapping name -> number, or numbers [E] or [L,E] as a sequence, array or tensor


def collapse(
    model: MiCRoForCausalLM | str | Path,
    rule: Literal["mean", "expert", "weighted"] = "mean",
    *,
    expert: Expert | Sequence[Expert] | Mapping[int, Expert] | None = None,
    weights: Weights | None = None,
) -> PreTrainedModel:
    """One dense model out of all experts.

    "expert" takes the blocks of ``expert``: a name or index for all layers, a sequence of L of them, or a mapping
    layer -> expert that names every layer; the result equals the mixture under ``force``. "mean" averages each tensor
    over the experts, "weighted" with ``weights`` [E] or [L,E] (or name -> weight), non-negative and with sum 1; both in
    float64, and exact wherever all experts agree. The head is tied again when it equals the embedding bit for bit.

    model: a mixture, or the folder of one. Errors: ValueError for bad rules, experts and weights.
    """
    from micro.convert.load import load
    from micro.modeling import MiCRoForCausalLM

    if isinstance(model, (str, Path)):
        model = load(model)
    if not isinstance(model, MiCRoForCausalLM):
        raise TypeError(f"collapse: expected a MiCRoForCausalLM or a folder of one, got {type(model).__name__}")
    mixing = _mixing(model.config, rule, expert, weights)
    tensors = _merge(model, mixing)
    tied = _equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    dense = _dense_model(model, tied)
    dense.load_state_dict(tensors, strict=True, assign=True)
    dense.tie_weights()
    dense.generation_config = copy.deepcopy(model.generation_config)
    dense.train(False)
    return dense


def save_dense(
    dense: PreTrainedModel, source: MiCRoForCausalLM, out: str | Path, *, how: str, overwrite: bool = False
) -> Path:
    """Write a collapsed model with the tokenizer, licence files and card of the mixture it came from.

    how: what the card says about the rule. The folder is written beside and renamed.
    """
    from micro.modeling.companions import RECEIPT, write_companions

    target = Path(out).expanduser().absolute()
    companions = {name: content for name, content in source.companions.items() if name != RECEIPT}
    with replace_folder(target, overwrite=overwrite) as beside:
        dense.save_pretrained(beside)
        write_companions(companions, beside)
        (beside / "README.md").write_text(collapsed_card(source, how), encoding="utf-8")
    return target


def _mixing(
    config: MiCRoConfig,
    rule: str,
    expert: Expert | Sequence[Expert] | Mapping[int, Expert] | None,
    weights: Weights | None,
) -> Tensor:
    """Weight of each expert in each layer, float64 [L,E]."""
    import torch

    if rule not in RULES:
        raise ValueError(f"collapse: rule {rule!r} must be one of {', '.join(RULES)}")
    for name, value, owner in (("expert", expert, "expert"), ("weights", weights, "weighted")):
        if (value is not None) != (rule == owner):
            raise ValueError(f"collapse: {name}= belongs to rule '{owner}' and is needed there; the rule is {rule!r}")
    layers, experts = config.num_hidden_layers, config.num_experts
    if rule == "mean":
        return torch.full((layers, experts), 1.0 / experts, dtype=torch.float64)
    if rule == "expert":
        chosen = torch.tensor(_per_layer(config, expert))
        return torch.nn.functional.one_hot(chosen, experts).double()
    return _given_weights(config, weights)


def _per_layer(config: MiCRoConfig, expert: Any) -> list[int]:
    layers = config.num_hidden_layers
    if isinstance(expert, Mapping):
        if sorted(expert) != list(range(layers)):
            raise ValueError(
                f"collapse: expert= must name every layer 0..{layers - 1}, got the layers {sorted(expert)}"
            )
        expert = [expert[layer] for layer in range(layers)]
    if isinstance(expert, (str, int)):
        expert = [expert] * layers
    if len(expert) != layers:
        raise ValueError(f"collapse: expert= has {len(expert)} entries for {layers} layers")
    return [_expert_id(config, one) for one in expert]


def _expert_id(config: MiCRoConfig, expert: Any) -> int:
    from micro.modeling.controls import ExpertNames

    found = ExpertNames(config).one(expert, "collapse")
    if found is None:
        raise ValueError(f"collapse: {expert!r} names no expert; known are {', '.join(config.expert_names or [])}")
    return found


def _given_weights(config: MiCRoConfig, weights: Any) -> Tensor:
    import torch

    layers, experts = config.num_hidden_layers, config.num_experts
    if isinstance(weights, Mapping):
        row = [0.0] * experts
        for name, value in weights.items():
            row[_expert_id(config, name)] = float(value)
        weights = row
    table = torch.as_tensor(weights, dtype=torch.float64)
    if table.shape not in ((experts,), (layers, experts)):
        raise ValueError(
            f"collapse: weights have the shape {list(table.shape)}, expected [{experts}] or [{layers},{experts}]"
        )
    table = table.expand(layers, experts)
    sums = table.sum(-1)
    if not bool(torch.isfinite(table).all()) or bool((table < 0).any()) or bool(((sums - 1).abs() > 1e-6).any()):
        raise ValueError(f"collapse: weights must be non-negative and sum to 1 in each layer, got {table.tolist()}")
    return table / sums[:, None]


def _merge(model: MiCRoForCausalLM, mixing: Tensor) -> dict[str, Tensor]:
    """Dense tensors by Hugging Face key; tensors outside the experts are copied."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in official_tensors(model, untied=True).items():
        key = dense_key(name)
        if key is not None:
            groups[key].append(tensor.detach())
    merged = {}
    for key, clones in groups.items():
        if len(clones) == 1:
            merged[key] = clones[0].clone()
        else:
            merged[key] = _mix(clones, mixing[int(key.split(".")[2])])
    return merged


def _mix(clones: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum in float64; elements on which all experts agree are taken as they are, without any rounding."""
    import torch

    chosen = [(clone, float(weight)) for clone, weight in zip(clones, weights, strict=True) if weight != 0]
    first = chosen[0][0]
    if len(chosen) == 1:
        return first.clone()
    total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    agree = torch.ones(first.shape, dtype=torch.bool, device=first.device)
    for clone, weight in chosen:
        total.add_(clone.double(), alpha=weight)
        agree &= clone == first
    return torch.where(agree, first, total.to(first.dtype))


def _equal(a: Tensor, b: Tensor) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(a, b)


def dense_config(config: MiCRoConfig, tied: bool) -> Any:
    """The Hugging Face configuration of the backbone of a mixture."""
    from transformers import LlamaConfig, Olmo2Config

    fields = {name: copy.deepcopy(getattr(config, name)) for name in KEPT_FIELDS}
    fields["tie_word_embeddings"] = tied
    # Olmo2Config has no field head_dim, but its attention reads one where it is set.
    fields["head_dim"] = config.head_dim
    return LlamaConfig(**fields) if config.backbone == "llama" else Olmo2Config(**fields)


def _dense_model(model: MiCRoForCausalLM, tied: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    first: torch.nn.Parameter = next(model.parameters())
    with no_init_weights(), first.device:
        dense: PreTrainedModel = AutoModelForCausalLM.from_config(dense_config(model.config, tied), dtype=first.dtype)
    return dense
