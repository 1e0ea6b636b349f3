"""Generation: controls are normalised once and travel as one object; the routing of all steps is gathered."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationConfig

from micro.modeling.cache import MiCRoCache
from micro.modeling.config import MiCRoConfig
from micro.modeling.steer import Steering
from micro.modeling.trace import RoutingTrace

CONTROLS = tuple(name for name in inspect.signature(Steering.make).parameters if name != "config")

# What transformers offers under cache_implementation and why it does not work here.
_REFUSED = {
    "paged": "continuous batching pages one key/value pair per layer, a MiCRo layer has one per expert",
    "quantized": "quantised caches hold one key/value pair per layer of the stock shape",
    "hybrid": "it has sliding windows, which no backbone here uses",
    "hybrid_chunked": "it has sliding windows, which no backbone here uses",
    "sliding_window": "no backbone here uses sliding windows",
}


class MiCRoGenerationMixin(GenerationMixin):
    """``generate`` with steering and routing traces (interface.md 2, model.md 4.5)."""

    config: MiCRoConfig

    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """As in ``transformers``, with the controls of ``forward`` and ``output_routing=True``, which implies
        ``return_dict_in_generate=True`` and adds ``.routing``: prompt + new tokens - 1 slots; for beams, those of the
        returned sequences.
        """
        streamer = kwargs.get("streamer")
        try:
            return self._generate(inputs, generation_config, kwargs)
        except BaseException:
            if streamer is not None:
                streamer.end()  # a consumer in another thread would wait for ever
            raise

    def _generate(self, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        _check_cache_implementation(self, generation_config, kwargs)
        kwargs["steering"] = steering = self._steering_of_generate(inputs, kwargs)
        want = kwargs.pop("output_routing", False)
        steering.trace = [] if want else None
        if want:
            if kwargs.get("return_dict_in_generate") is False:
                raise ValueError("output_routing=True needs return_dict_in_generate=True, which it sets by itself")
            kwargs |= {"output_routing": True, "return_dict_in_generate": True}
        parent: Any = super()
        out = parent.generate(inputs, generation_config, **kwargs)
        if want:
            out["routing"] = _assemble(out, steering)
        return out

    def _steering_of_generate(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Steering:
        """The controls among ``kwargs`` (removed from it) as one object; an assistant inherits its main model's."""
        controls = {name: kwargs.pop(name) for name in CONTROLS if name in kwargs}
        steering: Steering | None = kwargs.pop("steering", None)
        if steering is None:
            steering = Steering.make(self.config, **controls)
        elif both := [name for name, value in controls.items() if value is not None]:
            raise ValueError(f"steering is normalised already; do not also give {both}")
        steering = steering.repeat(1)
        if steering.prompt is None:
            ids = inputs if inputs is not None else kwargs.get("input_ids")
            embeds = kwargs.get("inputs_embeds")
            given = ids if embeds is None else embeds
            slots = 1 if given is None else given.shape[1]  # without a prompt, generate starts from one BOS token
            mask = kwargs.get("attention_mask")
            steering.origin = max(0, mask.shape[1] - slots) if mask is not None and mask.dim() == 2 else 0
            steering.prompt = slots
            columns = slots if embeds is None else 0 if ids is None else ids.shape[1]
            steering.first_id = steering.origin + slots - columns
        return steering

    # ------------------------------------------------------------------ hooks of transformers' generate
    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        steering = kwargs.get("steering")
        parent: Any = super()
        input_ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if steering is not None and expand_size > 1:
            kwargs["steering"] = steering.repeat(expand_size)
        return input_ids, kwargs

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        steering = model_kwargs.get("steering")
        if steering is not None:
            steering.stop_ids[:] = _stop_ids(generation_config)
        own = generation_config.cache_implementation in (None, "dynamic") and generation_config.use_cache is not False
        if own and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = cache = MiCRoCache(self.config)
            cache.expect(max_cache_length)
            return
        parent: Any = super()
        parent._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """A draft model is not asked for traces. It gets our controls if they fit it; a dense one or one with other
        layers or experts drafts without them, which costs rejected drafts and changes no token.
        """
        inputs = dict(kwargs["model_kwargs"])
        inputs.pop("output_routing", None)
        assistant, own = kwargs.get("assistant_model"), self.config
        if not isinstance(assistant, MiCRoGenerationMixin) or (
            (assistant.config.num_hidden_layers, assistant.config.num_experts)
            != (own.num_hidden_layers, own.num_experts)
        ):
            inputs.pop("steering", None)
        parent: Any = super()
        return parent._get_candidate_generator(*args, **{**kwargs, "model_kwargs": inputs})

    def _get_static_cache_init_shape(self) -> tuple[int, int]:
        return self.config.cache_heads, int(self.config.head_dim or 0)

    @staticmethod
    def create_masks_for_generate(config: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Masks stay two-dimensional: our attention derives causality from slots, for static caches too."""
        return attention_mask


def _stop_ids(generation_config: GenerationConfig) -> list[int]:
    ids = generation_config.eos_token_id
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids])]


def _check_cache_implementation(model: Any, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse by name what does not work; the rest is None, "dynamic", "static" and, with CUDA, offloaded ones."""
    default = getattr(model.generation_config, "cache_implementation", None)
    name = kwargs.get("cache_implementation", getattr(generation_config, "cache_implementation", None) or default)
    if name is None:
        return
    if name in _REFUSED:
        raise ValueError(f'cache_implementation="{name}" does not work with MiCRo models: {_REFUSED[name]}')
    if name in ("offloaded", "offloaded_static"):
        if model.device.type != "cuda":
            raise ValueError(
                f'cache_implementation="{name}" needs a model on a CUDA device, this one is on {model.device}'
            )
    elif name not in ("dynamic", "static"):
        raise ValueError(f'cache_implementation="{name}" is unknown; expected "dynamic", "static" or "offloaded"')


# ---------------------------------------------------------------- routing of a whole generation
def _assemble(out: Any, steering: Steering) -> RoutingTrace:
    """One trace from those of all forward passes: prompt + new tokens - 1 slots of the returned sequences."""
    steps = steering.trace or []
    prompt = steering.origin + (steering.prompt or 0)
    beams = getattr(out, "beam_indices", None)
    trace = _merge_slots(steps, prompt) if beams is None else _follow_beams(steps, beams, prompt)
    last = steering.first_id + out.sequences.shape[1] - 1  # the last token is never processed
    trace = trace.slots(0, min(trace.ids.shape[2], last - trace.start))
    trace.mask = trace.mask & ~_after_stop(out.sequences, steering, trace, prompt)
    return trace


def _merge_slots(steps: list[RoutingTrace], prompt: int) -> RoutingTrace:
    """A slot that was processed twice (a rejected draft) counts as last processed: cut parts where later ones begin."""
    parts: list[RoutingTrace] = []
    begin = None
    for step in reversed(steps):
        end = step.start + step.ids.shape[2] if begin is None else min(begin, step.start + step.ids.shape[2])
        if end > step.start:
            parts.append(step.slots(0, end - step.start))
            begin = step.start
    return RoutingTrace.cat(parts[::-1], prompt)


def _follow_beams(steps: list[RoutingTrace], beams: Tensor, prompt: int) -> RoutingTrace:
    """beams[i,t] is the running row from which returned sequence i took its token t, that is, the row of forward t."""
    parts = [step.rows(beams[:, 0].clamp(min=0)) for step in steps if step.start < prompt]
    decode = {step.start - prompt + 1: step for step in steps if step.start >= prompt}
    for t in range(1, beams.shape[1]):
        part = decode[t].rows(beams[:, t].clamp(min=0))
        part.mask = part.mask & (beams[:, t] >= 0).to(part.mask.device)[:, None]
        parts.append(part)
    return RoutingTrace.cat(parts, prompt)


def _after_stop(sequences: Tensor, steering: Steering, trace: RoutingTrace, prompt: int) -> Tensor:
    """Slots of the answer behind a row's stop token, bool [B,S]: padding of rows that ended early."""
    after = torch.zeros_like(trace.mask)
    answer = sequences[:, prompt - steering.first_id :].to(after.device)
    if steering.stop_ids and answer.shape[1]:
        stops = torch.isin(answer, torch.tensor(steering.stop_ids, device=after.device)).long()
        ended = stops.cumsum(1) - stops > 0
        first = max(prompt - trace.start, 0)
        width = after.shape[1] - first
        begin = max(trace.start - prompt, 0)
        after[:, first:] = ended[:, begin : begin + width]
    return after
