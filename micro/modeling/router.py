"""The router: two linear maps without bias and without a nonlinearity between them (model.md 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from micro import ops
from micro.modeling.config import MiCRoConfig
from micro.modeling.layers import Linear


class RouterMap(Linear):
    """One of a router's two maps. A class of its own, because routers start otherwise than other linear layers and
    transformers initialises each module by its class.
    """


class MiCRoRouter(nn.Module):
    """Scores of the experts. Input: the raw block input (whole-block experts) or the FFN input (FFN experts).

    ``numerics="fast"`` folds the two matrices into one [E,H] map when no gradient is wanted: exact algebra, another
    rounding, so near-ties may flip (performance.md 9.1).
    """

    def __init__(self, config: MiCRoConfig) -> None:
        super().__init__()
        self.in_proj = RouterMap(config.hidden_size, int(config.router_hidden_size or 0))
        self.out_proj = RouterMap(int(config.router_hidden_size or 0), config.num_experts)
        self.fold = config.numerics == "fast"
        self._folded: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Of x [T,H] the logits [T,E], in the model dtype (fast numerics without gradient: float32)."""
        if self.folds():
            weight = self.folded_weight()
            return ops.stacked_linear(x.to(weight.dtype)[None], weight[None])[0]
        logits: Tensor = self.out_proj(self.in_proj(x))
        return logits

    def folds(self) -> bool:
        """Whether this call uses one map. An adapter or hook on one of the two must run, so only plain ones fold."""
        if not self.fold or torch.is_grad_enabled():
            return False
        return all(
            type(m) is RouterMap and not m._forward_hooks and not m._forward_pre_hooks and "forward" not in m.__dict__
            for m in (self.in_proj, self.out_proj)
        )

    def folded_weight(self) -> Tensor:
        """Both maps in one, [E,H], float32 (float64 for float64); made anew when one of them changed."""
        weights = (self.in_proj.weight, self.out_proj.weight)
        key = tuple((w.data_ptr(), w._version if not w.is_inference() else None, w.dtype, w.device) for w in weights)
        folded = self._folded  # another thread may set it to something else at any moment
        if folded is None or folded[0] != key:
            wide = torch.promote_types(weights[0].dtype, torch.float32)
            folded = self._folded = (key, weights[1].detach().to(wide) @ weights[0].detach().to(wide))
        return folded[1]

    def forget_fold(self) -> None:
        """Fold anew in the next call: writes to ``weight.data`` leave no trace in the key of what is kept."""
        self._folded = None


@torch.no_grad()
def initialize_router_map(layer: RouterMap, rule: str, std: float, generator: torch.Generator | None = None) -> None:
    """Random start of one map (model.md 2.13): ``uniform`` +-1/sqrt(fan-in), torch's default for linear layers, or
    ``normal`` with standard deviation ``std``. A parameter that a loader has filled is left alone.
    """
    if rule == "uniform":
        bound = layer.in_features**-0.5
        init.uniform_(layer.weight, -bound, bound, generator=generator)
    else:
        init.normal_(layer.weight, 0.0, std, generator=generator)
