"""Counts of routing decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _decisions(router_logits: ArrayLike) -> tuple[NDArray[np.int64], int]:
    logits = np.asarray(router_logits, dtype=np.float64)
    if logits.ndim != 3:
        raise ValueError(f"router_logits must be [L,S,E] of one sample, got shape {list(logits.shape)}")
    return np.nan_to_num(logits, nan=-np.inf).argmax(-1), logits.shape[-1]


def usage_counts(router_logits: ArrayLike, offset: int = 0) -> NDArray[np.int64]:
    """How often each expert was the first choice, at the slots that predict an answer token.

    Args:
        router_logits: ``[L,S,E]``, one sample.
        offset: first counted slot, (prompt tokens) - 1. The last slot predicts nothing and never counts.

    Returns:
        int64 ``[L,E]``.

    Raises:
        ValueError: wrong rank, or an offset outside the sample.

    Source: MiCRo, routing figures: slots ``offset .. S-2``.
    """
    chosen, experts = _decisions(router_logits)
    layers, slots = chosen.shape
    if not 0 <= offset <= max(slots - 1, 0):
        raise ValueError(f"offset must lie in 0..{max(slots - 1, 0)}, got {offset}")
    counts = np.zeros((layers, experts), dtype=np.int64)
    np.add.at(counts, (np.arange(layers)[:, None], chosen[:, offset : slots - 1]), 1)
    return counts


def majority_vote(router_logits: ArrayLike) -> NDArray[np.int64]:
    """The most frequent first choice over the layers, for each token; ties go to the lower id.

    Args:
        router_logits: ``[L,S,E]``, one sample.

    Returns:
        int64 ``[S]``.
    """
    chosen, experts = _decisions(router_logits)
    votes = (chosen[..., None] == np.arange(experts)).sum(0)
    result: NDArray[np.int64] = votes.argmax(-1)
    return result


def counted_layers(layers: int) -> list[int]:
    """All layers but the first two and the last two (the published rule); all of them where L <= 4."""
    return list(range(2, layers - 2)) if layers > 4 else list(range(layers))


def entropy(p: ArrayLike, axis: int = -1) -> Any:
    """-sum p log p along an axis, natural logarithm, 0 log 0 = 0."""
    values = np.asarray(p, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.where(values > 0, values * np.log(values), 0.0).sum(axis)
