"""Prompts with a right and a wrong next token, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Text = str | Sequence[int]


@dataclass(frozen=True)
class PromptPair:
    """Two prompts of equally many tokens, and the next tokens that tell them apart.

    ``answer`` is right after ``clean``, ``wrong`` after ``corrupt``. Texts, or lists of token ids.
    """

    clean: Text
    corrupt: Text
    answer: Text
    wrong: Text


@dataclass(frozen=True)
class EncodedPair:
    """A pair as ids: clean, corrupt int64 [S]; answer, wrong: one token each."""

    clean: Tensor
    corrupt: Tensor
    answer: int
    wrong: int


def token_ids(text: Text, tokenizer: Any) -> list[int]:
    """Ids of a text, or the ids given."""
    if not isinstance(text, str):
        return [int(i) for i in text]
    if tokenizer is None:
        raise ValueError(f"{text!r} is a text; give a tokenizer, or token ids")
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def first_token(text: Text, tokenizer: Any) -> int:
    """The first token of a continuation, without special tokens."""
    if not isinstance(text, str):
        return int(text[0])
    if tokenizer is None:
        raise ValueError(f"{text!r} is a text; give a tokenizer, or token ids")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{text!r} has no token")
    return int(ids[0])


def encode_pair(pair: PromptPair, tokenizer: Any, number: int) -> EncodedPair:
    """A pair as ids.

    Raises:
        ValueError: the prompts differ in length, or the two next tokens are the same.
    """
    clean, corrupt = token_ids(pair.clean, tokenizer), token_ids(pair.corrupt, tokenizer)
    if len(clean) != len(corrupt) or not clean:
        raise ValueError(
            f"pair {number}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; patching needs prompts of "
            "equal, positive length"
        )
    answer, wrong = first_token(pair.answer, tokenizer), first_token(pair.wrong, tokenizer)
    if answer == wrong:
        raise ValueError(f"pair {number}: answer and wrong begin with the same token ({answer})")
    return EncodedPair(torch.tensor(clean), torch.tensor(corrupt), answer, wrong)
