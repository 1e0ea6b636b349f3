"""Generated answers: exact offsets, right sums, disjoint splits, seeds; and the bag-of-words baseline."""

from __future__ import annotations

import re
from typing import Any

import pytest

from micro.data import Record, Span, bag_of_words_baseline, encode_chat, generate, generate_chat
from micro.data.generators import TEMPLATES
from micro.experts import LABELS, NAMES
from micro.testing import tiny_tokenizer


@pytest.mark.parametrize("split", ["train", "test"])
def test_spans_are_sentences_of_their_domain(split: str) -> None:
    records = generate(400, split=split, seed=3)
    assert len({r.assistant for r in records}) == 400
    seen = dict.fromkeys(LABELS, 0)
    for record in records:
        assert 3 <= len(record.spans) <= 5
        assert len({s.label for s in record.spans}) >= 3
        at = 0
        for span, name in zip(record.spans, record.meta["templates"], strict=True):
            assert record.assistant[at : span.start].strip() == ""
            text = record.assistant[span.start : span.end]
            assert text == text.strip()
            assert text[-1] in '."'
            assert "{" not in text
            assert NAMES[LABELS.index(span.label)] == name.split(".")[0]
            seen[span.label] += 1
            at = span.end
        assert at == len(record.assistant)
        assert "{" not in record.prompt
    assert max(seen.values()) < 1.15 * min(seen.values())


def test_splits_share_no_template() -> None:
    for name, splits in TEMPLATES.items():
        names = {split: {t.name for t in templates} for split, templates in splits.items()}
        texts = {split: {t.answer for t in templates} for split, templates in splits.items()}
        assert len(names["train"]) == len(splits["train"]) >= 12, name
        assert len(names["test"]) == len(splits["test"]) >= 8, name
        assert not names["train"] & names["test"]
        assert not texts["train"] & texts["test"]


def test_seeds_and_prefixes() -> None:
    assert generate(20, seed=1) == generate(40, seed=1)[:20]
    assert generate(20, seed=1) != generate(20, seed=2)
    assert generate_chat(5, seed=1) == generate_chat(9, seed=1)[:5]
    assert generate(0) == []


@pytest.mark.parametrize("domain", NAMES)
def test_one_domain(domain: str) -> None:
    records = generate(60, domains=[domain], seed=5)
    assert {s.label for r in records for s in r.spans} == {LABELS[NAMES.index(domain)]}
    assert {r.dataset for r in records} == {f"generated-{domain}"}


SUMS = {
    r"(\d+) and (\d+) add up to (\d+)": lambda a, b, c: a + b == c,
    r"[Tt]aking (\d+) away from (\d+) leaves (\d+)": lambda a, b, c: b - a == c,
    r"each hold (\d+) times (\d+), which is (\d+)": lambda a, b, c: a * b == c,
    r"(\d+) divided by (\d+) is (\d+)": lambda a, b, c: a == b * c,
    r"(\d+) percent of (\d+) is (\d+)": lambda a, b, c: a * b == 100 * c,
    r"(\d+) is twice (\d+)(,)": lambda a, b, _: a == 2 * b,
    r"(\d+) rows of (\d+) make (\d+)": lambda a, b, c: a * b == c,
    r"total of (\d+) and (\d+) is (\d+)": lambda a, b, c: a + b == c,
    r"first number (\d+) must exceed (\d+)( )": lambda a, b, _: a > b,
    r"[Aa] square of (\d+) by (\d+) holds (\d+)": lambda a, b, c: a == b and a * b == c,
    r"(\d+) times (\d+) comes to (\d+)": lambda a, b, c: a * b == c,
    r"and (\d+) less (\d+) gives \w+ (5)": lambda a, b, c: a - b == c,
    r"[Cc]ounting (\d+) on from (\d+) gives (\d+)": lambda a, b, c: a + b == c,
}


def test_the_sums_are_right() -> None:
    text = "\n".join(r.assistant for s in ("train", "test") for r in generate(300, domains=["logic"], split=s))
    for pattern, holds in SUMS.items():
        found = re.findall(pattern, text)
        assert len(found) > 10, pattern
        for groups in found:
            numbers: list[Any] = [int(g) if g.isdigit() else g for g in groups]
            assert holds(*numbers), (pattern, groups)
    shares = re.findall(r"(\d+) goes into (\d+) (\d+) times, with (\d+) left", text)
    assert len(shares) > 10
    for group in shares:
        n, total, times, rest = map(int, group)
        assert total == n * times + rest
        assert 0 < rest < n


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown domain 'sociel'; did you mean 'social'"):
        generate(1, domains=["sociel"])
    with pytest.raises(TypeError, match="list of names"):
        generate(1, domains="logic")
    with pytest.raises(ValueError, match="'train' or 'test'"):
        generate(1, split="dev")
    with pytest.raises(ValueError, match="negative"):
        generate(-1)
    with pytest.raises(ValueError, match="at least one"):
        generate_chat(1, domains=[])


def test_chats_can_be_trained_on() -> None:
    tok = tiny_tokenizer()
    chats = generate_chat(100, seed=2)
    lengths = {sum(m["role"] == "assistant" for m in c.messages) for c in chats}
    assert lengths == {1, 2, 3}
    assert all(encode_chat(c, tok) is not None for c in chats)


def test_bag_of_words() -> None:
    train, test = generate(300, seed=0), generate(100, split="test", seed=1)
    result = bag_of_words_baseline(train, test)
    assert 0.5 < result.accuracy <= 1.0
    assert result.confusion.sum() == result.spans == sum(len(r.spans) for r in test)
    assert result.accuracy == pytest.approx(result.confusion.trace() / result.spans)
    # With labels drawn at random there is nothing to learn.
    from random import Random

    rng = Random(0)
    noise = [Record(r.prompt, r.assistant, [Span(s.start, s.end, rng.choice(LABELS)) for s in r.spans]) for r in train]
    assert bag_of_words_baseline(noise, test).balanced_accuracy < 0.45
    with pytest.raises(ValueError, match="no spans"):
        bag_of_words_baseline([], test)
