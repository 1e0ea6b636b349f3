"""Without gradient, a layer is one operator call (:func:`micro.ops.block_forward`) wherever nobody can see the
difference: plain parameters, no hook, no adapter, no tracing. The results are the same, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache

from micro import ops
from micro.experts import BlockParameters, Routing
from micro.modeling.cache import MiCRoCache, MiCRoCacheLayer
from micro.modeling.config import MiCRoConfig
from micro.modeling.layers import Linear, RMSNorm, StackedLinear, StackedNorm
from micro.modeling.router import MiCRoRouter, RouterMap

if TYPE_CHECKING:
    from micro.modeling.call import Call, LayerControls

# Where a parameter lies: the submodule that holds its module (None: the layer itself), the module's name and class.
Place = tuple[str | None, str, type[nn.Module]]
# Every parameter of BlockParameters but the router's, in its order; None where the family has none.
Layout = tuple[Place | None, ...]


def _layout(config: MiCRoConfig) -> Layout:
    olmo = config.backbone == "olmo2"
    maps = ("q_proj", "k_proj", "v_proj", "o_proj")
    ffn: Layout = tuple(("blocks", name, StackedLinear) for name in ("gate_proj", "up_proj", "down_proj"))
    if config.is_block:
        names = (
            None if olmo else "input_norm",
            "post_attention_norm",
            *(("post_ffn_norm", "q_norm", "k_norm") if olmo else (None, None, None)),
        )
        norms: Layout = tuple(None if name is None else ("blocks", name, StackedNorm) for name in names)
        return (*(("blocks", name, StackedLinear) for name in maps), *ffn, *norms)
    return (
        *(("self_attn", name, Linear) for name in maps),
        *ffn,
        None if olmo else (None, "input_layernorm", RMSNorm),
        (None, "post_attention_layernorm", RMSNorm),
        (None, "post_feedforward_layernorm", RMSNorm) if olmo else None,
        ("self_attn", "q_norm", RMSNorm) if olmo else None,
        ("self_attn", "k_norm", RMSNorm) if olmo else None,
    )


def can_fuse(config: MiCRoConfig, x: Tensor, cache: Cache | None) -> bool:
    """Whether the layers of a call on x may be fused, as far as the call itself tells."""
    head = int(config.head_dim or 0)
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and head % 8 == 0  # what the kernels take; the separate operators copy other sizes
        and head <= 256
        and (not torch.is_grad_enabled() or (cache is None and not x.requires_grad))
        and (cache is None or type(cache) is MiCRoCache)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _untouched(module: nn.Module) -> bool:
    """No hook, and no forward of its own (as offloading libraries set one)."""
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def _weight(module: nn.Module | None, kind: type[nn.Module]) -> Tensor | None:
    """The parameter of a plain module; None if calling the module might do something else than apply it."""
    if type(module) is not kind or not _untouched(module):
        return None
    weight = module._parameters.get("weight")
    return weight if type(weight) in (nn.Parameter, Tensor) else None


class FusedLayer:
    """Calls the operator for one layer, if the layer is plain at this moment."""

    def __init__(self, config: MiCRoConfig, index: int) -> None:
        self.index, self.layout, self.whole_block = index, _layout(config), config.is_block
        self.eps = float(config.rms_norm_eps or 0)
        self.experts = config.num_experts if config.is_block else 1
        self.heads = (config.num_attention_heads, int(config.num_key_value_heads or 0), int(config.head_dim or 0))

    def run(
        self, layer: nn.Module, hidden: Tensor, bias: Tensor | None, call: Call, controls: LayerControls
    ) -> tuple[Tensor, Tensor | None, Routing] | None:
        """Of hidden [B,S,H]: (hidden [B,S,H], raw router logits [T,E] or None, decision); None: not possible."""
        if controls.row_mask is not None or controls.replay_mask is not None:
            return None
        if controls.jitter != 0.0 or controls.memo is not None:
            return None
        parameters = self._parameters(layer)
        if parameters is None or _needs_gradient(hidden, bias, *parameters):
            return None
        store: MiCRoCacheLayer | None = None
        keys, values = None, None
        if call.cache is not None:
            own = call.cache.layers[self.index]
            if not isinstance(own, MiCRoCacheLayer) or own.get_seq_length() != call.start:
                return None
            store = own
            keys, values = store.room(hidden, call.rows, self.experts, *self.heads[1:], call.slots)
        y, raw, routing = ops.block_forward(
            hidden.view(-1, hidden.shape[-1]) if hidden.is_contiguous() else hidden.reshape(-1, hidden.shape[-1]),
            parameters,
            call.cos,
            call.sin,
            heads=self.heads[0],
            whole_block=self.whole_block,
            eps=self.eps,
            slots=call.slots,
            start=call.start,
            keys=keys,
            values=values,
            mask=call.mask,
            real=call.real,
            k=call.experts_per_token,
            rows=controls.rows,
            bias=bias,
            ablate=controls.ablate,
            force=controls.force,
            replay=controls.replay,
            weight_rule=call.weight_rule,
            run_router=controls.run_router,
        )
        if store is not None:
            store.filled(call.length)
        return y.view(hidden.shape), raw, routing

    def _parameters(self, layer: nn.Module) -> BlockParameters | None:
        modules = layer._modules
        router = self._router(modules["router"])
        if router is None:
            return None
        found: list[Tensor | None] = []
        for place in self.layout:
            if place is None:
                found.append(None)
                continue
            holder = layer if place[0] is None else modules[place[0]]
            assert holder is not None
            weight = _weight(holder._modules.get(place[1]), place[2])
            if weight is None:
                return None
            found.append(weight)
        attention = modules.get("self_attn")
        if attention is not None and not _untouched(attention):
            return None
        return BlockParameters._make([*found[:7], *router, *found[7:]])

    @staticmethod
    def _router(router: nn.Module | None) -> tuple[Tensor | None, Tensor] | None:
        """Its two maps, or None and the folded one."""
        if type(router) is not MiCRoRouter or not _untouched(router):
            return None
        maps = router._modules
        first, second = _weight(maps["in_proj"], RouterMap), _weight(maps["out_proj"], RouterMap)
        if first is None or second is None:
            return None
        return (None, router.folded_weight()) if router.folds() else (first, second)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
