"""The head of the model: its loss, and the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from micro import _native  # noqa: F401  (loads libmicro, which registers torch.ops.micro)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Language-model head and loss in one, in chunks over the target rows only.

    ``-log softmax(hidden[t] @ weight.T)[targets[t]]``, summed over ``targets[t] != ignore_index``. The logits of a
    chunk take at most 32 MiB; both gradients are formed in the same pass, and only where they are wanted.

    Args:
        hidden: ``[T, H]``, float32, float64 or bfloat16.
        weight: ``[V, H]``, same dtype and device; the embedding itself for a tied head.
        targets: ``[T]`` int64, already shifted.
        ignore_index: the target that does not count.

    Returns:
        The sum, a scalar in float32 (float64 for float64); 0 without target. Differentiable once, in ``hidden`` and
        ``weight``; the caller divides by its number of items.

    Raises:
        ValueError: a shape or device does not fit, or a target lies outside ``[0, V)``.
        TypeError: a dtype does not fit.

    Source: model.md 7.1; chunking as in Wijmans et al. (2024), Cut Your Losses.
    """
    result: Tensor = torch.ops.micro.cross_entropy(hidden, weight, targets, ignore_index)
    return result


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    previous: Tensor | None = None,
    min_new_tokens: int = 0,
    stop_ids: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """The next token of each row: the distribution of transformers' processors, in their order.

    Repetition penalty, stop ids, temperature, top-k, top-p, then a draw. It depends on the row's logits, seed and step
    and on nothing else in the batch: ``u`` in [0, 1) by Philox 4x32-10 (key = seed, counter = step), looked up in the
    probabilities summed in the order of ids. Computed in float32 (float64 for float64).

    Args:
        logits: ``[B, V]``, float32, float64 or bfloat16.
        temperature: 0 takes the largest logit, of equal ones the lowest id; ``top_k`` and ``top_p`` change nothing.
        top_k: the ``k`` largest and those equal to the last of them; 0: all.
        top_p: the largest that together have this share of the probability, at least one; 1: all.
        repetition_penalty: divides the logits of ``previous`` ids where they are positive, multiplies negative ones.
        previous: ``[B, P]`` int64, ids of each row so far; pad with -1, ids outside ``0 .. V - 1`` are skipped.
        min_new_tokens: rows with fewer ``steps`` than this get no stop id.
        stop_ids: ``[n]`` int64.
        seeds: ``[B]`` int64, one per row; needed with a temperature above 0. Rows of equal logits, seed and step get
            equal tokens.
        steps: ``[B]`` int64, tokens that each row has been given; needed with ``seeds`` or ``min_new_tokens``.

    Returns:
        ids int64 ``[B]``. NaN is chosen only in a row that holds nothing else. No gradient.

    Raises:
        ValueError: a shape, device or number does not fit, or an option lacks the tensor that it needs.
        TypeError: a dtype does not fit.

    Source: Fan et al. (2018), top-k; Holtzman et al. (2020), top-p; Keskar et al. (2019), repetition penalty; Salmon et
    al. (2011), Philox.
    """
    result: Tensor = torch.ops.micro.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        previous=previous,
        min_new_tokens=min_new_tokens,
        stop_ids=stop_ids,
        seeds=seeds,
        steps=steps,
    )
    return result
