"""Batches: padding, one-hot rows, tokenizers without pad token, rows that do not go together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from micro.data import Collator

ROWS = [
    {"input_ids": [5, 2, 7], "attention_mask": [1, 1, 1], "labels": [-100, 2, 7], "routing_labels": [3, 0, 1]},
    {"input_ids": [4], "attention_mask": [1], "labels": [4], "routing_labels": [2]},
]
SMOL: Any = SimpleNamespace(pad_token_id=2, eos_token_id=2)


def test_padding() -> None:
    batch = Collator(SMOL)(ROWS)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 2, 7], [4, 2, 2]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 7], [4, -100, -100]],
        "routing_labels": [[3, 0, 1], [2, 3, 3]],
    }
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_one_hot_and_multiples() -> None:
    batch = Collator(SMOL, one_hot=True, pad_to_multiple_of=4)(ROWS)
    assert batch["input_ids"].shape == (2, 4)
    weights = batch["routing_weights"]
    assert (weights.dtype, weights.shape) == (torch.float32, (2, 4, 4))
    assert torch.equal(weights.argmax(-1), batch["routing_labels"])
    assert torch.equal(weights.sum(-1), torch.ones(2, 4))


def test_a_missing_pad_token_is_the_end_token() -> None:
    none: Any = SimpleNamespace(pad_token_id=None, eos_token_id=9)
    batch = Collator(none)(ROWS)
    assert batch["input_ids"][1].tolist() == [4, 9, 9]
    assert batch["attention_mask"][1].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token"):
        Collator(SimpleNamespace(pad_token_id=None, eos_token_id=None))  # type: ignore[arg-type]


def test_chat_rows_have_no_routing_labels() -> None:
    plain = [{k: v for k, v in row.items() if k not in ("routing_labels", "attention_mask")} for row in ROWS]
    batch = Collator(SMOL)(plain)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="routing_labels"):
        Collator(SMOL, one_hot=True)(plain)


def test_rows_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="row 1 of the batch has no routing_labels"):
        Collator(SMOL)([ROWS[0], {"input_ids": [1], "labels": [1], "attention_mask": [1]}])
    with pytest.raises(ValueError, match="row 0 has 1 input_ids but 2 labels"):
        Collator(SMOL)([{"input_ids": [1], "labels": [1, 2]}])
    with pytest.raises(ValueError, match="empty"):
        Collator(SMOL)([])
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        Collator(SMOL, pad_to_multiple_of=-2)
