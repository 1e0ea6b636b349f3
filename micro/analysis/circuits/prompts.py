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

    ``answer`` is right after ``clean``, ``wrong`` after ``corrupt``, one token each. Texts, or lists of token ids.
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


def token_ids(text: Text, tokenizer: Any, **options: Any) -> list[int]:
    """Ids of a text, or the ids given; ``options`` go to the tokenizer."""
    if not isinstance(text, str):
        return [int(i) for i in text]
    if tokenizer is None:
        raise ValueError(f"{text!r} is a text; give a tokenizer, or token ids")
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


def one_token(text: Text, tokenizer: Any) -> int:
    """The id of a continuation of one token, without special tokens.

    Raises:
        ValueError: it is none or several tokens: a logit belongs to one.
    """
    ids = token_ids(text, tokenizer, add_special_tokens=False)
    if len(ids) != 1:
        pieces = f" ({_pieces(ids, tokenizer)})" if ids and tokenizer is not None else ""
        raise ValueError(f"{text!r} is {len(ids)} tokens{pieces}, expected one: give the one that counts, or its id")
    return int(ids[0])


def _pieces(ids: Sequence[int], tokenizer: Any) -> str:
    return " | ".join(repr(tokenizer.decode([i])) for i in ids)


def encode_pair(pair: PromptPair, tokenizer: Any, number: int) -> EncodedPair:
    """A pair as ids.

    Raises:
        ValueError: the prompts differ in length, or the two next tokens are the same.
    """
    clean, corrupt = token_ids(pair.clean, tokenizer), token_ids(pair.corrupt, tokenizer)
    if len(clean) != len(corrupt) or not clean:
        pieces = "" if tokenizer is None else f" ({_pieces(clean, tokenizer)}; {_pieces(corrupt, tokenizer)})"
        raise ValueError(
            f"pair {number + 1}: clean has {len(clean)} tokens and corrupt {len(corrupt)}{pieces}; patching needs "
            "prompts of equal, positive length"
        )
    answer, wrong = one_token(pair.answer, tokenizer), one_token(pair.wrong, tokenizer)
    if answer == wrong:
        raise ValueError(f"pair {number + 1}: answer and wrong are the same token ({answer})")
    return EncodedPair(torch.tensor(clean), torch.tensor(corrupt), answer, wrong)
