"""Texts or labelled records as rows for :func:`micro.analysis.batches.batches`, and the slots of them that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from micro.analysis.batches import IGNORED, Row, encoded, shifted, text_row

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = ("predicting", "all")


def input_rows(
    data: Sequence[Any], tokenizer: Any, what: str, *, encode_options: dict[str, Any] | None = None
) -> list[tuple[int, Row]]:
    """(index, encoded row) of texts (no chat template, every token a target) or of records; what cannot be encoded is
    left out.

    Raises:
        ValueError: nothing is given, or nothing is left; ``what`` names the caller.
    """
    if not data:
        raise ValueError(f"{what}: data is empty; give texts or records")
    if not isinstance(data[0], str):
        rows = encoded(data, tokenizer, **(encode_options or {}))
    else:
        every = ((i, list(tokenizer(text)["input_ids"])) for i, text in enumerate(data))
        rows = [(i, text_row(ids)) for i, ids in every if len(ids) > 1]
    if not rows:
        raise ValueError(f"{what}: none of the {len(data)} inputs has two tokens (texts) or an answer (records)")
    return rows


def counted(batch: dict[str, Tensor], positions: str) -> Tensor:
    """Bool [B,S]: slots that predict a target ("predicting": answers of records, all but the last of texts), or all
    real slots ("all").

    Raises:
        ValueError: another word.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    return shifted(batch["labels"]) != IGNORED if positions == "predicting" else batch["attention_mask"].bool()
