"""The loss and its parts (model.md 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from micro import ops
from micro.modeling.config import MiCRoConfig
from micro.modeling.layers import Linear
from micro.modeling.outputs import MiCRoModelOutputWithPast

IGNORED = -100


def shifted_targets(labels: Tensor) -> Tensor:
    """From labels [B,S] to targets [B*S]: the id at s + 1, ignored at the end of each row (model.md 7.1)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)


def language_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    logits: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of the next token, summed and divided by ``num_items`` (or by the number of targets).

    hidden [B,S,H]; labels int64 [B,S]; logits [B,S,V] if they exist already, otherwise they are formed in chunks and
    never kept. No target: loss 0 with zero gradient.
    """
    targets = shifted_targets(labels.to(hidden.device))
    if logits is None and not is_plain_head(head):
        logits = head(hidden)  # an adapter or hook on the head must act, so its output is needed
    if logits is None:
        weight = head.weight
        assert isinstance(weight, Tensor)
        total = ops.cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, targets, ignore_index=IGNORED)
    else:
        wide = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
    return total / divisor((targets != IGNORED).sum() if num_items is None else num_items, total.device)


def divisor(count: Tensor | int, device: torch.device) -> Tensor:
    """A number of items, given as a number or a tensor of one element, as a scalar to divide by: 1 where there is no
    item, because the sum over none is 0 and the loss has to be as well (model.md 7.1).
    """
    if isinstance(count, Tensor):
        count = count.to(device, non_blocking=True).reshape(())
    else:
        count = torch.full((), count, device=device)
    return torch.where(count == 0, torch.ones_like(count), count)


def is_plain_head(head: nn.Module) -> bool:
    """Whether the head is its weight and nothing else: no adapter, hook, bias or parametrisation."""
    if type(head) not in (nn.Linear, Linear) or head._forward_hooks or head._forward_pre_hooks:
        return False
    return vars(head).get("forward") is None and head._parameters.get("bias") is None


def needs_raw_logits(config: MiCRoConfig, has_labels: bool) -> bool:
    """Whether a loss reads the routers' own logits even where labels route."""
    coefficients = config.loss_coefficients or {}
    return "z_loss" in coefficients or ("label_loss" in coefficients and has_labels)


def auxiliary_losses(
    config: MiCRoConfig,
    out: MiCRoModelOutputWithPast,
    real: Tensor | None,
    routing_labels: Tensor | None,
    *,
    share: Tensor | float = 1.0,
    num_routing_items: Tensor | int | None = None,
) -> dict[str, Tensor]:
    """The auxiliary losses that ``config.loss_coefficients`` names.

    real bool [T] or None; routing_labels int64 [T] or None. share: this micro-batch's part of the accumulation window,
    so that means over micro-batches add up to the window's mean (``aux_window``); label loss divides by
    ``num_routing_items`` (labelled tokens of the window) instead. Each value is before its coefficient.
    """
    names = set(config.loss_coefficients or {})
    losses: dict[str, Tensor] = {}
    if not names:
        return losses
    assert out.router_probs is not None and out.expert_ids is not None and out.raw_router_logits is not None
    if names & {"load_balancing_loss", "entropy"}:
        probs = torch.stack(out.router_probs)
        if "load_balancing_loss" in names:
            ids = torch.stack(out.expert_ids)
            pooled = config.aux_pooling == "pooled"
            losses["load_balancing_loss"] = _scaled(ops.load_balancing_loss(probs, ids, real, pooled=pooled), share)
        if "entropy" in names:
            losses["entropy"] = _scaled(ops.routing_entropy(probs, real).mean(), share)
    raw = [logits for logits in out.raw_router_logits if logits is not None]
    if "z_loss" in names:
        losses["z_loss"] = _scaled(ops.z_loss(torch.stack(raw), real), share)
    if "label_loss" in names and routing_labels is not None:
        total = ops.label_loss(torch.stack(raw), routing_labels, real)
        if num_routing_items is None:
            labelled = routing_labels >= 0
            num_routing_items = (labelled if real is None else labelled & real).sum()
        losses["label_loss"] = total / divisor(num_routing_items, total.device)
    return losses


def _scaled(value: Tensor, share: Tensor | float) -> Tensor:
    return value * (share.to(value) if isinstance(share, Tensor) else share)


def window_share(config: MiCRoConfig, labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
    """Part of an accumulation window that this micro-batch is, by targets counted as ``num_items`` counts them, before
    the shift. 1 without a window, or with ``aux_window="sum"`` (the official behaviour, model.md 7.2).
    """
    if num_items is None or labels is None or config.aux_window == "sum":
        return 1.0
    return (labels != IGNORED).sum().double() / divisor(num_items, labels.device)


def total_loss(config: MiCRoConfig, lm_loss: Tensor | None, aux: dict[str, Tensor]) -> Tensor | None:
    """``lm_loss`` + sum of coefficient * auxiliary (model.md 7.6)."""
    coefficients = config.loss_coefficients or {}
    total = lm_loss
    for name, value in aux.items():
        term = coefficients[name] * value
        total = term if total is None else total + term
    return total
