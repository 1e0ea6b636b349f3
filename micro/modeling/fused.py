"""A layer is one operator call wherever nobody can see the difference: plain parameters, no hook, no adapter, no
tracing. Without gradient :func:`micro.ops.block_forward`; with one :func:`micro.ops.block_train`, for whole-block
experts without a cache, on CUDA Llama-shaped ones. Results and gradients are the same, on the CPU bit for bit, on CUDA
to rounding.
"""

from __future__ import annotations

from operator import methodcaller
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
# The places of BlockParameters, in its order; None where the family has no such parameter.
Layout = tuple[Place | None, ...]


def _layout(config: MiCRoConfig) -> Layout:
    olmo = config.backbone == "olmo2"
    attention, linear = ("blocks", StackedLinear) if config.is_block else ("self_attn", Linear)
    maps: Layout = (
        *((attention, name, linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(("blocks", name, StackedLinear) for name in ("gate_proj", "up_proj", "down_proj")),
        ("router", "in_proj", RouterMap),
        ("router", "out_proj", RouterMap),
    )
    if config.is_block:
        outer = ("input_norm", "post_attention_norm", "post_ffn_norm")
        norms: Layout = tuple(("blocks", name, StackedNorm) for name in (*outer, "q_norm", "k_norm"))
    else:
        outer = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
        norms = (*((None, name, RMSNorm) for name in outer), *((attention, n, RMSNorm) for n in ("q_norm", "k_norm")))
    return (*maps, *(place if here else None for place, here in zip(norms, (not olmo, True, *[olmo] * 3), strict=True)))


# A class whose forward was replaced is not what it was when this was written.
_FORWARDS = [(kind, kind.forward) for kind in (Linear, RMSNorm, RouterMap, StackedLinear, StackedNorm, MiCRoRouter)]


def can_fuse(config: MiCRoConfig, x: Tensor, cache: Cache | None) -> bool:
    """Whether the layers of a call on x may be fused, as far as the call itself tells."""
    head = int(config.head_dim or 0)
    return (
        type(x) is Tensor
        and x.device.type in ("cpu", "cuda")
        and head % 8 == 0  # what the kernels take; the separate operators copy other sizes
        and head <= 256
        and (not torch.is_grad_enabled() or cache is None)
        and (cache is None or type(cache) is MiCRoCache)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and not torch_module._global_backward_hooks
        and not torch_module._global_backward_pre_hooks
        and all(kind.forward is forward for kind, forward in _FORWARDS)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


_NO_PARAMETER: dict[str, Tensor | None] = {}
_WEIGHTS = frozenset((nn.Parameter, Tensor, type(None)))
_has_own_forward = methodcaller("__contains__", "forward")  # as offloading libraries set one


class PlainModules:
    """The submodules of a layer as they were found, and a quick look whether calling them would do nothing else than
    apply their parameters: nobody hooked, replaced, reparametrised or wrapped one. Whole lists are compared at once,
    because this runs for every layer of every decoded token.
    """

    def __init__(self, layer: nn.Module, layout: Layout) -> None:
        from micro.modeling.block import MiCRoBlocks
        from micro.modeling.ffn_block import MiCRoAttention

        self.root = layer._modules
        places: list[Place] = [place for place in layout if place is not None]
        places.append((None, "router", MiCRoRouter))
        # The modules that hold the others may be replaced as a whole.
        places.append((None, "blocks", MiCRoBlocks))
        if "self_attn" in self.root:
            places.append((None, "self_attn", MiCRoAttention))
        holders = [layer if name is None else layer.get_submodule(name) for name, _, _ in places]
        self.places = [(holder._modules, name) for holder, (_, name, _) in zip(holders, places, strict=True)]
        self.kinds = [kind for _, _, kind in places]
        self.modules = [modules.get(name) for modules, name in self.places]
        found = [module for module in self.modules if module is not None]
        self.hooks = [hooks for m in found for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.backward_hooks = [hooks for m in found for hooks in (m._backward_hooks, m._backward_pre_hooks)]
        self.namespaces = [module.__dict__ for module in found]
        self.parameters, self.gaps = [], layout.count(None)
        modules = iter(self.modules)
        for place in layout:
            module = None if place is None else next(modules)
            self.parameters.append(_NO_PARAMETER if module is None else module._parameters)

    def weights(self) -> list[Tensor | None] | None:
        """What BlockParameters holds, in its order; None if one of the modules is not plain at this moment."""
        if any(self.hooks) or any(map(_has_own_forward, self.namespaces)):
            return None
        if [modules.get(name) for modules, name in self.places] != self.modules:
            return None
        if list(map(type, self.modules)) != self.kinds:
            return None
        weights = [parameters.get("weight") for parameters in self.parameters]
        types = list(map(type, weights))
        return weights if types.count(type(None)) == self.gaps and _WEIGHTS.issuperset(types) else None


class FusedLayer:
    """Calls the operator for one layer, if the layer is plain at this moment."""

    def __init__(self, config: MiCRoConfig, index: int) -> None:
        self.index, self.layout, self.whole_block = index, _layout(config), config.is_block
        self.eps = float(config.rms_norm_eps or 0)
        self.experts = config.num_experts if config.is_block else 1
        self.trains_on = ("cpu",) if config.backbone == "olmo2" else ("cpu", "cuda")
        self.heads = (config.num_attention_heads, int(config.num_key_value_heads or 0), int(config.head_dim or 0))
        self._plain: PlainModules | None = None

    def run(
        self, layer: nn.Module, hidden: Tensor, bias: Tensor | None, call: Call, controls: LayerControls
    ) -> tuple[Tensor, Tensor | None, Routing] | None:
        """Of hidden [B,S,H]: (hidden [B,S,H], raw router logits [T,E] or None, decision); None: not possible."""
        if controls.row_mask is not None or controls.replay_mask is not None or controls.hooks is not None:
            return None
        if controls.jitter != 0.0:
            return None
        parameters = self._parameters(layer)
        if parameters is None:
            return None
        if _needs_gradient(hidden, bias, *parameters):
            return self._train(hidden, parameters, bias, call, controls)
        if controls.memo is not None:
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
            hidden,
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
        return y, raw, routing

    def _train(
        self, hidden: Tensor, parameters: BlockParameters, bias: Tensor | None, call: Call, controls: LayerControls
    ) -> tuple[Tensor, Tensor | None, Routing] | None:
        """As :meth:`run`, with a gradient."""
        assert self._plain is not None
        if not self.whole_block or call.cache is not None or any(self._plain.backward_hooks):
            return None
        if hidden.device.type not in self.trains_on:
            return None
        memo = controls.memo
        y, raw, routing = ops.block_train(
            hidden,
            parameters,
            call.cos,
            call.sin,
            heads=self.heads[0],
            eps=self.eps,
            slots=call.slots,
            mask=call.mask,
            real=call.real,
            k=call.experts_per_token,
            rows=controls.rows,
            bias=bias,
            ablate=controls.ablate,
            force=controls.force,
            replay=controls.replay if memo is None or memo.ids is None else memo.ids,
            weight_rule=call.weight_rule,
            run_router=controls.run_router,
            activations=call.activations,
        )
        if memo is not None and memo.ids is None:
            memo.ids = routing.ids.detach()
        return y, raw, routing

    def _parameters(self, layer: nn.Module) -> BlockParameters | None:
        plain = self._plain
        weights = None if plain is None or plain.root is not layer._modules else plain.weights()
        if weights is None:
            # Found anew: a replaced module may be plain as well.
            self._plain = plain = PlainModules(layer, self.layout)
            weights = plain.weights()
            if weights is None:
                return None
        parameters = BlockParameters._make(weights)
        router = layer._modules["router"]
        assert isinstance(router, MiCRoRouter)
        if router.folds():
            return parameters._replace(router_in=None, router_out=router.folded_weight())
        return parameters

    def __getstate__(self) -> dict[str, object]:
        """Copies look at their own modules."""
        return {**self.__dict__, "_plain": None}


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
