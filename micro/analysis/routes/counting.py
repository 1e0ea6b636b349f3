"""Counts of routing decisions."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from micro import ops


def _decisions(logits: Tensor, first: int = 0) -> NDArray[np.int64]:
    """First choices ``[L,S']`` of the model's own routing: the largest float32 probability, ties to the lower id."""
    undecided = (logits.amax(-1) == -torch.inf).nonzero()
    if len(undecided):
        layer, slot = undecided[0].tolist()
        raise ValueError(
            f"router_logits: no expert has a logit above -inf in layer {layer}, slot {slot + first}; every slot that "
            "counts needs one (NaN does not count as a logit)"
        )
    infinite = (logits == torch.inf).any(-1, keepdim=True)  # inf has no softmax: it wins, the lower id first
    finite = torch.where(infinite, torch.where(logits == torch.inf, 0.0, -torch.inf), logits)
    ids = ops.route(finite.reshape(-1, logits.shape[-1]), 1).ids
    return ids.reshape(logits.shape[:2]).numpy().astype(np.int64)


def _tensor(router_logits: Any) -> Tensor:
    """Float32 ``[L,S,E]`` on the host of an array, a tensor or nested lists; NaN becomes -inf."""
    if not isinstance(router_logits, Tensor):
        given = np.asarray(router_logits)
        if given.dtype.kind not in "fiub":
            raise TypeError(f"router_logits must hold real numbers, got {given.dtype}")
        router_logits = torch.from_numpy(given.astype(np.float64))
    elif router_logits.is_complex():
        raise TypeError(f"router_logits must hold real numbers, got {router_logits.dtype}")
    if router_logits.dim() != 3:
        raise ValueError(f"router_logits must be [L,S,E] of one sample, got shape {list(router_logits.shape)}")
    if router_logits.shape[0] == 0 or router_logits.shape[2] == 0:
        raise ValueError(f"router_logits need a layer and an expert at least, got shape {list(router_logits.shape)}")
    logits = router_logits.detach().cpu().float()
    return torch.where(logits.isnan(), -torch.inf, logits)


def usage_counts(router_logits: ArrayLike | Tensor, offset: int = 0) -> NDArray[np.int64]:
    """How often each expert was the first choice, at the slots that predict an answer token.

    Args:
        router_logits: ``[L,S,E]`` of one sample, without padding: an array, a tensor of any dtype, or nested lists.
            -inf is an ablated expert; NaN never wins.
        offset: first counted slot, (prompt tokens) - 1. The last slot predicts nothing and never counts.

    Returns:
        int64 ``[L,E]``; every layer sums to ``S - 1 - offset``. The first choice is that of the model: the largest
        probability in float32, ties to the lower id.

    Raises:
        ValueError: wrong rank, an offset outside the sample, or a counted slot at which no expert is left.
        TypeError: no numbers, or an offset that is no integer.

    Source: MiCRo, routing figures: slots ``offset .. S-2``.
    """
    logits = _tensor(router_logits)
    slots, experts = logits.shape[1:]
    if isinstance(offset, bool):
        raise TypeError("offset must be a slot number, got a truth value")
    offset = operator.index(offset)
    if not 0 <= offset <= max(slots - 1, 0):
        raise ValueError(f"offset must lie in 0..{max(slots - 1, 0)}, got {offset}")
    chosen = _decisions(logits[:, offset : max(slots - 1, 0)], offset)
    counts: NDArray[np.int64] = (chosen[..., None] == np.arange(experts)).sum(1, dtype=np.int64)
    return counts


def majority_vote(router_logits: ArrayLike | Tensor) -> NDArray[np.int64]:
    """The most frequent first choice over the layers, for each token; ties go to the lower id.

    Args:
        router_logits: ``[L,S,E]`` of one sample, as in :func:`usage_counts`.

    Returns:
        int64 ``[S]``.

    Raises:
        ValueError: wrong rank, or a slot at which no expert is left.
        TypeError: no numbers.
    """
    logits = _tensor(router_logits)
    votes = (_decisions(logits)[..., None] == np.arange(logits.shape[-1])).sum(0)
    result: NDArray[np.int64] = votes.argmax(-1).astype(np.int64)
    return result


def counted_layers(layers: int) -> list[int]:
    """All layers but the first two and the last two (the published rule); all of them where L <= 4."""
    return list(range(2, layers - 2)) if layers > 4 else list(range(layers))


def entropy(p: ArrayLike, axis: int = -1) -> Any:
    """-sum p log p along an axis, natural logarithm, 0 log 0 = 0."""
    values = np.asarray(p, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(values > 0, values * np.log(values), 0.0).sum(axis)
