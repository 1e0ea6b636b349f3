"""Encoded rows to a batch of tensors (model.md 8.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from micro.data.encoding import IGNORED, LANGUAGE
from micro.experts import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Collator:
    """Pads rows on the right to the longest of the batch: ids with the pad id, mask 0, labels -100, language.

    Rows are what `encode` or `encode_chat` return. The result holds int64 tensors [B,S]: `input_ids`, `attention_mask`,
    and `labels` and `routing_labels` where rows have them. The mask comes from the rows' lengths, not from the pad id,
    which may also be a real token. one_hot adds `routing_weights`, float32 [B,S,4]. A tokenizer without pad token
    pads with its end-of-sequence token. ValueError: an empty batch, rows of which some lack a field, unequal lengths.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, one_hot: bool = False, pad_to_multiple_of: int | None = None
    ) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError("Collator: the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"Collator: pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
        self.pad_id, self.one_hot, self.multiple = int(pad), one_hot, pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch; see the class."""
        if not rows:
            raise ValueError("Collator: the batch is empty")
        padding = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED, "routing_labels": LANGUAGE}
        lengths = [len(row["input_ids"]) for row in rows]
        width = -(-max(lengths) // self.multiple) * self.multiple
        batch = {}
        for name, fill in padding.items():
            have = [i for i, row in enumerate(rows) if name in row]
            if name == "attention_mask" and not have:
                batch[name] = self._pad([np.ones(n, dtype=np.int64) for n in lengths], lengths, width, fill, name)
            elif have and len(have) < len(rows):
                missing = next(i for i in range(len(rows)) if i not in have)
                raise ValueError(
                    f"Collator: row {missing} of the batch has no {name}, row {have[0]} has; do not mix labelled "
                    "answers and chat rows in one batch"
                )
            elif have:
                batch[name] = self._pad([row[name] for row in rows], lengths, width, fill, name)
        if self.one_hot:
            if "routing_labels" not in batch:
                raise ValueError("Collator: one_hot needs rows with routing_labels")
            batch["routing_weights"] = torch.nn.functional.one_hot(batch["routing_labels"], len(LABELS)).float()
        return batch

    @staticmethod
    def _pad(values: list[Any], lengths: list[int], width: int, fill: int, name: str) -> Tensor:
        result = np.full((len(values), width), fill, dtype=np.int64)
        for i, (row, length) in enumerate(zip(values, lengths, strict=True)):
            if len(row) != length:
                raise ValueError(f"Collator: row {i} has {length} input_ids but {len(row)} {name}")
            result[i, :length] = row
        return torch.from_numpy(result)
