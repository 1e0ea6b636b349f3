"""The headless model, and what both model classes share: initialisation, loading and saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple

from micro.interventions.session import active, intervene
from micro.modeling import keys
from micro.modeling.block import MiCRoBlockLayer
from micro.modeling.bound import BoundSteering
from micro.modeling.cache import MiCRoCache, check_cache
from micro.modeling.call import Call, LayerControls, Memo, attention_masks, rotary_tables
from micro.modeling.companions import UpcycleReceipt, read_companions, receipt_of, write_companions
from micro.modeling.config import MiCRoConfig
from micro.modeling.ffn_block import MiCRoFFNLayer
from micro.modeling.fused import can_fuse
from micro.modeling.layers import RMSNorm, StackedLinear, StackedNorm
from micro.modeling.outputs import MiCRoModelOutputWithPast
from micro.modeling.router import RouterMap, initialize_router_map
from micro.modeling.steer import Steering
from micro.modeling.trace import RoutingTrace

if TYPE_CHECKING:
    from micro.interventions import Action, Session


class MiCRoPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving of MiCRo models."""

    config_class = MiCRoConfig
    config: MiCRoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiCRoBlockLayer", "MiCRoFFNLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    # Tokenizer and licence files, and the receipt of upcycling, as they were read; saved with the model.
    companions: dict[str, bytes] = {}  # noqa: RUF012
    upcycle_receipt: UpcycleReceipt | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (StackedNorm, RMSNorm)):
            init.ones_(module.weight)
        elif isinstance(module, RouterMap):
            initialize_router_map(module, str(self.config.router_init), std)
        elif isinstance(module, (StackedLinear, nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)

    def reset_routers(self, generator: torch.Generator | None = None, rule: str | None = None) -> None:
        """Draw all routers anew, rule "uniform" or "normal" (None: the config's), from a generator (model.md 2.13)."""
        rule = rule or str(self.config.router_init)
        if rule not in ("uniform", "normal"):
            raise ValueError(f'rule is {rule!r}, expected "uniform" or "normal"')
        for module in self.modules():
            if isinstance(module, RouterMap):
                module.weight._is_hf_initialized = False  # type: ignore[attr-defined]  # drawn anew although loaded
                initialize_router_map(module, rule, self.config.initializer_range, generator)

    def named_expert_parameters(self, expert: int | str) -> Iterator[tuple[str, Tensor]]:
        """(name, slice) of every parameter of one expert; the slices are views of the stacked parameters."""
        from micro.modeling.controls import ExpertNames

        index = ExpertNames(self.config).one(expert, "named_expert_parameters")
        if index is None:
            raise ValueError(f"named_expert_parameters: {expert!r} names no expert")
        for name, parameter in self.named_parameters():
            if ".blocks." in f".{name}":
                yield name, parameter[index]

    def intervene(self, *actions: Action, all_experts: bool = False) -> AbstractContextManager[Session]:
        """A block in which actions read and change activations: :func:`micro.interventions.intervene`."""
        model = self if isinstance(self, MiCRoModel) else self.model
        return intervene(model, *actions, all_experts=all_experts)

    # ------------------------------------------------------------------ files
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write official key names, one tensor per expert, and the config; see ``transformers`` for the arguments."""
        headless = not hasattr(self, "lm_head")
        self.config.check()
        # The loader keeps only the conversions it used; what is written is always the full official naming.
        self._weight_conversions = keys.disk_mapping(self.config, prefix="" if headless else "model.")
        super().save_pretrained(save_directory, *args, **kwargs)
        write_companions(self.companions, os.fspath(save_directory))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in ``transformers``, but strict: names, shapes and dtype are compared by file headers before anything is
        loaded, and ``dtype=None`` or "auto" is the dtype of the tensors, whatever the config says.
        """
        want_info = kwargs.pop("output_loading_info", False)
        folder = _local_folder(pretrained_model_name_or_path, kwargs)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if folder is not None and kwargs.get("state_dict") is None:
            config = kwargs.get("config")
            if not isinstance(config, MiCRoConfig):
                config = MiCRoConfig.from_pretrained(folder)
            found = keys.check_folder(config, folder, head=cls._has_head())
            dtype = found if dtype in (None, "auto") else dtype
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, dtype=dtype, **kwargs
        )
        model, info = loaded
        _refuse_partial_load(pretrained_model_name_or_path, info, head=cls._has_head())
        if folder is not None:
            model.companions = read_companions(folder)
            model.upcycle_receipt = receipt_of(model.companions)
        return (model, info) if want_info else model

    @classmethod
    def _has_head(cls) -> bool:
        return not issubclass(cls, MiCRoModel)


def _local_folder(path: Any, kwargs: dict[str, Any]) -> Path | None:
    """The folder whose files will be read, if it is on this disk."""
    if path is None or not os.path.isdir(path) or kwargs.get("gguf_file"):
        return None
    return Path(path, kwargs.get("subfolder", ""))


def _refuse_partial_load(path: Any, info: dict[str, Any], *, head: bool) -> None:
    """Missing and unexpected tensors are an error here; transformers reports them and goes on."""
    problems = {name: set(info.get(name) or ()) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if not head:
        problems["unexpected_keys"] -= {"lm_head.weight"}
    if found := {name: sorted(map(str, values)) for name, values in problems.items() if values}:
        raise ValueError(f"{path}: the weights do not fit the config: {found}")
    if errors := info.get("error_msgs"):
        raise ValueError(f"{path}: the weights could not be loaded: {errors}")


class MiCRoModel(MiCRoPreTrainedModel):
    """Embedding, L layers, final norm."""

    _keys_to_ignore_on_load_unexpected = ["lm_head.weight"]  # noqa: RUF012

    def __init__(self, config: MiCRoConfig) -> None:
        super().__init__(config)
        padding = config.pad_token_id if config.freeze_pad_row else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        layer = MiCRoBlockLayer if config.is_block else MiCRoFFNLayer
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        olmo = config.backbone == "olmo2"
        self.norm = RMSNorm(config.hidden_size, float(config.rms_norm_eps or 0), gain_in_float32=olmo)
        self.gradient_checkpointing = False
        # What fused layers keep for the backward pass: "save", or "recompute" (micro.ops.block_train).
        self.activation_policy = "save"
        # Where jitter draws its seeds from; None: torch's default CPU generator.
        self.jitter_generator: torch.Generator | None = None
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
        use_cache: bool | None = None,
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
        raw_logits: bool = False,
    ) -> MiCRoModelOutputWithPast:
        """input_ids int64 [B,S] or inputs_embeds [B,S,H] -> hidden states [B,S,H] and the routing of every layer.

        Arguments: interface.md 2. ``raw_logits=True`` runs the routers even where labels or force decide.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: MiCRo never forms attention matrices; there are none to return")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self._embed(input_ids, inputs_embeds)
        steering = self._steering(
            steering,
            ablate=ablate,
            keep=keep,
            bias=bias,
            force=force,
            experts_per_token=experts_per_token,
            routing_labels=routing_labels,
            routing_weights=routing_weights,
            route_by=route_by,
            replay=replay,
        )
        call = self._call(x, attention_mask, position_ids, past_key_values, use_cache, steering.k)
        bound = steering.bind(call.rows, call.slots, call.start, call.real, x)
        everything = output_routing or raw_logits
        x, records, hidden = self._run_layers(x, call, bound, everything, bool(output_hidden_states))
        x = self.norm(x)
        out = _collect(x, records, bound, call)
        if output_hidden_states:
            out.hidden_states = (*hidden, x)
        if output_routing:
            out.routing = self._trace(out, records, call)
            if steering.trace is not None:
                steering.trace.append(out.routing)
        return out

    # ------------------------------------------------------------------ parts of forward
    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, exactly one of them")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or x.shape[1] == 0:
            raise ValueError(f"the input has shape {list(x.shape[:-1])}, expected [rows, slots] with at least one slot")
        return x

    def _steering(self, steering: Steering | None, **controls: Any) -> Steering:
        if steering is None:
            return Steering.make(self.config, **controls)
        if both := [name for name, value in controls.items() if value is not None]:
            raise ValueError(f"steering is normalised already; do not also give {both}")
        if not isinstance(steering, Steering):
            raise TypeError(f"steering: expected a Steering, got {type(steering).__name__}")
        if (steering.config.num_hidden_layers, steering.config.num_experts) != (
            self.config.num_hidden_layers,
            self.config.num_experts,
        ):
            raise ValueError("steering was made for a model with other layers or experts")
        return steering

    def _call(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        use_cache: bool | None,
        k: int,
    ) -> Call:
        rows, slots, _ = x.shape
        if self.gradient_checkpointing and self.training:
            if cache is not None and int(cache.get_seq_length()) > 0:
                raise ValueError("past_key_values holds slots, but gradient checkpointing works without a cache")
            cache, use_cache = None, False  # a recomputed layer would append its keys a second time
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is not None:
            check_cache(cache, self.config, rows)
        elif use_cache:
            cache = MiCRoCache(self.config)
        start = 0 if cache is None else int(cache.get_seq_length())
        attention, real = attention_masks(mask, rows, slots, start)
        if positions is None:
            flat = torch.arange(start, start + slots, device=x.device)
            flat = flat if rows == 1 else flat.repeat(rows)
        else:
            flat = positions.to(x.device).expand(rows, slots).reshape(-1)
        cos, sin = rotary_tables(self.config, flat, x.dtype)
        rule, fused = self.config.weight_rule, can_fuse(self.config, x, cache)
        return Call(rows, slots, start, k, rule, attention, real, cos, sin, cache, fused, self.activation_policy)

    def _run_layers(
        self, x: Tensor, call: Call, bound: BoundSteering, raw: bool, keep_hidden: bool
    ) -> tuple[Tensor, list[tuple[Any, ...]], list[Tensor]]:
        checkpointed = self.gradient_checkpointing and self.training
        noise = float(self.config.jitter_noise) if self.training else 0.0
        records, hidden = [], []
        session = active(self)
        if session is not None and checkpointed:
            raise ValueError("model.intervene: a checkpointed layer would act twice; disable gradient checkpointing")
        # Without steering all layers may share one object.
        shared = bound.steering.free and not checkpointed and not noise and session is None
        free = LayerControls() if shared else None
        refold = call.start == 0 and self.config.numerics == "fast"  # decoded tokens share what their prompt folded
        for index, layer in enumerate(self.layers):
            if refold:
                layer.router.forget_fold()  # type: ignore[union-attr, operator]
            controls = free or bound.layer(index)
            controls.run_router = controls.run_router or raw
            controls.memo = Memo() if checkpointed else None
            if noise:
                controls.jitter, controls.jitter_seed = noise, self._jitter_seed()
            controls.hooks = hooks = None if session is None else session.layer(index, call)
            if hooks is not None:
                x = hooks.tokens("residual", x.flatten(0, 1)).view(x.shape)
            if keep_hidden:
                hidden.append(x)
            x, *record = layer(x, bound.bias(index), call=call, controls=controls)
            records.append(tuple(record))
        if session is not None and (hooks := session.layer(len(self.layers), call)) is not None:
            x = hooks.tokens("residual", x.flatten(0, 1)).view(x.shape)
        return x, records, hidden

    def _jitter_seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.jitter_generator))

    def _trace(self, out: MiCRoModelOutputWithPast, records: list[tuple[Any, ...]], call: Call) -> RoutingTrace:
        """The trace of this call; statistics and graphs are not kept alive by it."""
        shape = (len(records), call.rows, call.slots, -1)
        assert out.router_logits is not None and out.router_probs is not None and out.raw_router_logits is not None
        stacks = {
            "ids": [record[3] for record in records],
            "weights": [record[4] for record in records],
            "probs": out.router_probs,
            "logits": out.router_logits,
            "raw_logits": [torch.as_tensor(raw) for raw in out.raw_router_logits],
        }
        tensors = {name: torch.stack(list(parts)).detach().view(shape) for name, parts in stacks.items()}
        tensors["raw_logits"] = tensors["raw_logits"].to(tensors["probs"].dtype)
        real = torch.ones(call.rows * call.slots, dtype=torch.bool, device=call.cos.device)
        mask = (real if call.real is None else call.real).view(call.rows, call.slots)
        names = list(self.config.expert_names or [])
        return RoutingTrace(**tensors, mask=mask, start=call.start, prompt_length=call.length, expert_names=names)


def _collect(x: Tensor, records: list[tuple[Any, ...]], bound: BoundSteering, call: Call) -> MiCRoModelOutputWithPast:
    """Per-layer records as the model's output; where the router decided nothing, the rows that did are reported."""
    logits, probs, raw, ids = [], [], [], []
    for index, (effective, own, p, chosen, _) in enumerate(records):
        reported = bound.reported(index)
        logits.append(effective if reported is None else reported[0])
        probs.append(p if reported is None else reported[1])
        raw.append(own)
        ids.append(chosen)
    return MiCRoModelOutputWithPast(
        last_hidden_state=x,
        past_key_values=call.cache,
        router_logits=tuple(logits),
        router_probs=tuple(probs),
        raw_router_logits=tuple(raw),
        expert_ids=tuple(ids),
        routing_labels=bound.labels,
        real=call.real,
    )
