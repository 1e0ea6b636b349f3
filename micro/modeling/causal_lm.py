"""The language model: headless model, head and loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from micro.modeling import keys, losses
from micro.modeling.config import MiCRoConfig
from micro.modeling.generation import MiCRoGenerationMixin
from micro.modeling.layers import Linear
from micro.modeling.model import MiCRoModel, MiCRoPreTrainedModel
from micro.modeling.outputs import MiCRoCausalLMOutputWithPast, MiCRoModelOutputWithPast
from micro.modeling.steer import Steering
from micro.modeling.trace import RoutingTrace

if TYPE_CHECKING:
    from micro.engine import Engine


class MiCRoForCausalLM(MiCRoPreTrainedModel, MiCRoGenerationMixin):
    """A MiCRo model that predicts the next token (interface.md 2)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: MiCRoConfig) -> None:
        super().__init__(config)
        self.model = MiCRoModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.register_load_state_dict_pre_hook(keys.stack_official_keys)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        routing_labels: Tensor | None = None,
        routing_weights: Tensor | None = None,
        route_by: str | None = None,
        ablate: Any = None,
        keep: Any = None,
        bias: Any = None,
        force: Any = None,
        experts_per_token: int | None = None,
        replay: RoutingTrace | None = None,
        steering: Steering | None = None,
        output_routing: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_routing_items_in_batch: Tensor | int | None = None,
    ) -> MiCRoCausalLMOutputWithPast:
        """Next-token logits, loss and routing; every argument: interface.md 2.

        labels int64 [B,S] with -100 ignored; ``logits_to_keep`` keeps the last n slots (0 = all) or the slots of an
        index tensor. While training with labels the loss is formed in chunks and ``logits`` is None, unless
        ``skip_logits=False``.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True without labels would compute nothing")
        names = self.config.loss_coefficients or {}
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing_labels=routing_labels,
            routing_weights=routing_weights,
            route_by=route_by,
            ablate=ablate,
            keep=keep,
            bias=bias,
            force=force,
            experts_per_token=experts_per_token,
            replay=replay,
            steering=steering,
            output_routing=output_routing,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            raw_logits=bool(names) and losses.needs_raw_logits(self.config, routing_labels is not None),
            return_dict=True,
        )
        hidden = out.last_hidden_state
        skip = self.training and labels is not None if skip_logits is None else skip_logits
        logits = None if skip else self.lm_head(kept_slots(hidden, logits_to_keep))
        lm_loss = None
        if labels is not None:
            # An index tensor may keep as many slots as there are in another order.
            whole = None if isinstance(logits_to_keep, Tensor) or logits_to_keep else logits
            lm_loss = losses.language_loss(hidden, self.lm_head, labels, logits=whole, num_items=num_items_in_batch)
        share = losses.window_share(self.config, labels, num_items_in_batch)
        aux = self._auxiliary(out, share, num_routing_items_in_batch)
        return MiCRoCausalLMOutputWithPast(
            loss=losses.total_loss(self.config, lm_loss, aux) if labels is not None else None,
            lm_loss=lm_loss if lm_loss is None else lm_loss.detach(),
            aux_losses=aux or None,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            router_logits=out.router_logits,
            routing=out.routing,
        )

    def engine(self, **options: Any) -> Engine:
        """The C++ engine over this model's parameters as they are now: :meth:`micro.engine.Engine.from_model`."""
        from micro.engine import Engine

        return Engine.from_model(self, **options)

    def _auxiliary(
        self, out: MiCRoModelOutputWithPast, share: Tensor | float, items: Tensor | int | None
    ) -> dict[str, Tensor]:
        if not self.config.loss_coefficients:
            return {}
        labels = None if out.routing_labels is None else out.routing_labels.flatten()
        return losses.auxiliary_losses(self.config, out, out.real, labels, share=share, num_routing_items=items)


def kept_slots(hidden: Tensor, keep: int | Tensor) -> Tensor:
    """Of hidden [B,S,H] the last ``keep`` slots (0 = all), or the slots of an index tensor."""
    if isinstance(keep, Tensor):
        return hidden[:, keep]
    if isinstance(keep, bool) or keep < 0:
        raise ValueError(f"logits_to_keep is {keep!r}, expected a number of slots >= 0 or an index tensor")
    return hidden[:, -keep:] if keep else hidden
