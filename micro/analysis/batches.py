"""Texts and labelled records as batches for a forward pass, and the loss of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM

Row = dict[str, list[int]]  # input_ids, attention_mask, labels; of records also routing_labels
IGNORED = -100
CHUNK_BYTES = 64 << 20  # of float32 logits held at once


def encoded(records: Sequence[Record], tokenizer: Any, **options: Any) -> list[tuple[int, Row]]:
    """(index of the record, encoded row), without the records that ``encode`` drops."""
    from micro.data import encode

    rows = ((i, encode(record, tokenizer, **options)) for i, record in enumerate(records))
    return [(i, row) for i, row in rows if row is not None]


def text_row(ids: Sequence[int]) -> Row:
    """Token ids of a text as an encoded row: no padding, every token a target."""
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": list(ids)}


def by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, those of similar length together, the shortest first: at most ``max_tokens`` slots (or one
    sequence) a batch.
    """
    waiting: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda j: lengths[j]):
        if waiting and (len(waiting) + 1) * lengths[i] > max_tokens:
            yield waiting
            waiting = []
        waiting.append(i)
    if waiting:
        yield waiting


def batches(
    rows: Sequence[tuple[int, Row]], tokenizer: Any, *, max_tokens: int = 2048
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(record indices, collated batch), rows of similar length together, at most ``max_tokens`` slots a batch."""
    from micro.data import Collator

    collate = Collator(tokenizer)
    for some in by_length([len(row["input_ids"]) for _, row in rows], max_tokens):
        yield [rows[i][0] for i in some], collate([rows[i][1] for i in some])


def shifted(labels: Tensor) -> Tensor:
    """Target of every slot: the label of the next one, -100 at the end. [B,S] -> [B,S]."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


@torch.no_grad()
def token_losses(model: MiCRoForCausalLM, batch: dict[str, Tensor], **controls: Any) -> Tensor:
    """Cross-entropy of every target token in nats, float32 [B,S] on the host; 0 where there is no target.

    ``controls`` are the steering arguments of the model's forward.
    """
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **controls
    ).last_hidden_state
    targets = shifted(batch["labels"])
    wanted = targets != IGNORED
    rows, ids = hidden[wanted], targets[wanted]
    vocabulary = model.lm_head.weight.shape[0]
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    parts = [
        torch.nn.functional.cross_entropy(model.lm_head(h).float(), t, reduction="none")
        for h, t in zip(rows.split(size), ids.split(size), strict=True)
    ]
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    if parts:
        losses[wanted] = torch.cat(parts)
    return losses.cpu()
