"""What all layers of one forward pass share, prepared once: positions, masks, rotary tables, sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from micro import ops
from micro.modeling.config import MiCRoConfig

if TYPE_CHECKING:
    from micro.interventions.session import LayerHooks


@dataclass
class Call:
    """One forward pass over B rows of S slots after C cached ones.

    mask: what :func:`micro.ops.expert_attention` takes (None, bool [B,J], or [B|1,S,J]); real: bool [T], None = every
    token is real; cos, sin: [T,D/2] float32 or float64; fused: a layer may be one operator call
    (micro/modeling/fused.py), which keeps for its backward pass what ``activations`` says.
    """

    rows: int
    slots: int
    start: int
    experts_per_token: int
    weight_rule: str
    mask: Tensor | None
    real: Tensor | None
    cos: Tensor
    sin: Tensor
    cache: Cache | None
    fused: bool = False
    activations: str = "save"

    @cached_property
    def everyone(self) -> tuple[Tensor, Tensor]:
        """Tokens int32 [T] and offsets int32 [2] of a plan with one expert that has every token."""
        count, device = self.rows * self.slots, self.cos.device
        ends = torch.arange(2, dtype=torch.int32, device=device) * count  # a list would be copied, and waited for
        return torch.arange(count, dtype=torch.int32, device=device), ends

    @property
    def length(self) -> int:
        """J, the key slots after this call."""
        return self.start + self.slots


@dataclass
class Memo:
    """The choice that a checkpointed layer made, replayed when the layer is recomputed (model.md 2.10.11)."""

    ids: Tensor | None = None


@dataclass
class LayerControls:
    """Steering of one layer in one call, in the shapes that :func:`micro.ops.route` takes.

    rows float [T,E] are used in place of probabilities, only where ``row_mask`` bool [T] if that is given; ablate bool
    [T|1,E]; force int32 [T|1], -1 free; replay int32 [T,K], only where ``replay_mask`` bool [T] if that is given;
    hooks: the actions of an open ``model.intervene`` block on this layer.
    """

    rows: Tensor | None = None
    row_mask: Tensor | None = None
    ablate: Tensor | None = None
    force: Tensor | None = None
    replay: Tensor | None = None
    replay_mask: Tensor | None = None
    run_router: bool = True
    jitter: float = 0.0
    jitter_seed: int = 0
    memo: Memo | None = field(default=None)
    hooks: LayerHooks | None = None


def attention_masks(mask: Tensor | None, rows: int, slots: int, start: int) -> tuple[Tensor | None, Tensor | None]:
    """The user's attention mask as (mask for the attention operator, real tokens bool [T] or None).

    None, or [B,J] over all J = C + S key slots (nonzero = real), or [B|1,1,S,J] (bool: True = visible; float: added to
    the scores), which replaces the causal rule (model.md 2.7).
    """
    if mask is None:
        return None, None
    length = start + slots
    if mask.dim() == 4:
        return _given_mask(mask, rows, slots, length), None
    if mask.dim() != 2 or tuple(mask.shape) != (rows, length):
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}, expected [{rows}, {length}]: one column for each of the "
            f"{start} cached and {slots} new slots, or a 4-D mask [{rows}, 1, {slots}, {length}]"
        )
    mask = mask.bool()
    if mask.device.type == "cpu" and bool(mask.all()):
        return None, None
    return mask, mask[:, start:].reshape(-1)


def _given_mask(mask: Tensor, rows: int, slots: int, length: int) -> Tensor:
    batch, heads, queries, keys = mask.shape
    if batch not in (1, rows) or heads != 1 or queries != slots or keys < length:
        raise ValueError(
            f"a 4-D attention_mask has shape {list(mask.shape)}, expected [{rows} or 1, 1, {slots}, {length}]"
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"a 4-D attention_mask is bool (True = visible) or float (added), got {mask.dtype}")
    return mask[:, 0, :, :length]


def rotary_tables(config: MiCRoConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables cos and sin [T,D/2] for positions [T]. Angles are float32; Llama rounds the tables to the model dtype,
    OLMo-2 does not (model.md 2.2).
    """
    size = int(config.head_dim or 0)
    frequencies = _frequencies(size, config.rope_theta_value, config.rope_scaling_value, positions.device)
    angles = positions[:, None].float() * frequencies
    tables = (angles.cos(), angles.sin())
    if config.backbone == "llama":
        tables = tuple(table.to(dtype) for table in tables)  # type: ignore[assignment]
    wide = torch.promote_types(dtype, torch.float32)
    return tables[0].to(wide), tables[1].to(wide)


Scaling = tuple[float, float, float, float]


def _frequencies(size: int, theta: float, scaling: Scaling | None, device: torch.device) -> Tensor:
    """As :func:`micro.ops.rope_frequencies`; made once, except while tracing, where tensors are not real."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return ops.rope_frequencies(size, theta, scaling).to(device, non_blocking=True)
    return _kept_frequencies(size, theta, scaling, device)


@lru_cache(maxsize=16)
def _kept_frequencies(size: int, theta: float, scaling: Scaling | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return ops.rope_frequencies(size, theta, scaling).to(device)
