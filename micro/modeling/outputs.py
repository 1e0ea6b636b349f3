"""What the models return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

if TYPE_CHECKING:
    import torch

    from micro.modeling.trace import RoutingTrace


@dataclass
class MiCRoModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the headless model. ``router_logits``: L tensors [B*S,E], effective logits (the given rows under label
    routing); ``raw_router_logits``: before steering, None where the router did not run;
    ``routing_labels``: int64 [B,S] with -1 resolved; ``real``: bool [B*S], None = no padding.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    router_probs: tuple[torch.Tensor, ...] | None = None
    raw_router_logits: tuple[torch.Tensor | None, ...] | None = None
    expert_ids: tuple[torch.Tensor, ...] | None = None
    routing_labels: torch.Tensor | None = None
    real: torch.Tensor | None = None
    routing: RoutingTrace | None = None


@dataclass
class MiCRoCausalLMOutputWithPast(ModelOutput):
    """Output of the language model: ``loss`` = ``lm_loss`` + sum of coefficient * ``aux_losses[name]``."""

    loss: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    aux_losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    routing: RoutingTrace | None = None
