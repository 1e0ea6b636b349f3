"""preset="official" against a literal simulation of the official collation: ids, labels and routing labels, exactly."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from data_tools import RESPONSE, SEPARATOR, official, random_record, tokenizer

from micro.data import Record, Span, encode

FAMILIES = ("smollm2", "smollm2-real", "llama", "olmo2")


@pytest.mark.parametrize("family", FAMILIES)
def test_random_layouts_agree(family: str) -> None:
    rng, tok = Random(7), tokenizer(family)
    for number in range(1200):
        record = random_record(rng)
        assert encode(record, tok, preset="official") == official(record, tok, family), (number, record)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_layouts_agree(family: str) -> None:
    rng, tok = Random(11), tokenizer(family)
    for number in range(300):
        record, length = random_record(rng), rng.randint(1, 120)
        expected = official(record, tok, family, length)
        ours = encode(record, tok, preset="official", max_length=length, counts=Counter())
        assert ours == expected, (number, record, length)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_strings_in_user_text_are_recognised_as_officially(family: str) -> None:
    rng, tok = Random(13), tokenizer(family)
    name = family.split("-")[0]
    for number in range(300):
        record = random_record(rng, (RESPONSE[name], SEPARATOR[name]))
        assert encode(record, tok, preset="official") == official(record, tok, family), (number, record)


@pytest.mark.parametrize("family", FAMILIES)
def test_response_template_is_found_from_the_generation_prompt(family: str) -> None:
    tok = tokenizer(family)
    record = random_record(Random(3))
    given = encode(record, tok, preset="official", response_template=RESPONSE[family.split("-")[0]])
    assert given == encode(record, tok, preset="official")


def test_response_template_may_be_one_token_with_its_line_breaks() -> None:
    """OLMo-2 in the first revision (model.md 8.3): the token holds the line breaks around the generation prompt."""
    tok = tokenizer("olmo2-r1")
    for number in range(200):
        record = random_record(Random(number))
        expected = official(record, tok, "olmo2-r1")
        assert encode(record, tok, preset="official") == expected, (number, record)
        ours, given = encode(record, tok), encode(record, tok, response_template=RESPONSE["olmo2-r1"])
        assert ours == given is not None


def test_explicit_arguments_beat_the_preset() -> None:
    tok = tokenizer("llama")
    record = Record("Who?", "Tom did. He smiles.", [Span(0, 8, "DMN"), Span(9, 19, "ToM")])
    official_ids = encode(record, tok, preset="official")["input_ids"]  # type: ignore[index]
    one_bos = encode(record, tok, preset="official", double_bos=False)["input_ids"]  # type: ignore[index]
    assert official_ids == [tok.bos_token_id, *one_bos]
    kept = encode(record, tok, preset="official", last_span="label")
    assert kept["routing_labels"] != encode(record, tok, preset="official")["routing_labels"]  # type: ignore[index]
