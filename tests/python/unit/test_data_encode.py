"""Our own defaults of `encode` and `encode_chat`: labels, masks, plain special text, dropped rows, every switch."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from data_tools import random_record, tokenizer

from micro.data import Chat, DataError, DataWarning, Record, Span, chat_to_dataset, encode, encode_chat, to_dataset
from micro.testing import tiny_tokenizer

FAMILIES = ("smollm2", "llama", "olmo2")
END = {"smollm2": "<|im_end|>", "llama": "<|eot_id|>", "olmo2": "<|endoftext|>"}
ANSWER = "Tom did it. He smiles."
RECORD = Record("Who did it?", ANSWER, [Span(0, 11, "DMN"), Span(12, 22, "ToM")])


def trained(row: dict[str, list[int]], tok: Any) -> str:
    return tok.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])


def with_expert(row: dict[str, list[int]], tok: Any, expert: int) -> str:
    return tok.decode([i for i, e in zip(row["input_ids"], row["routing_labels"], strict=True) if e == expert])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["segments", "offsets"])
def test_defaults_train_the_answer_and_its_end(family: str, mode: Any) -> None:
    tok = tokenizer(family)
    row = encode(RECORD, tok, label_tokenisation=mode)
    assert row is not None
    assert trained(row, tok) == ANSWER + END[family]
    assert with_expert(row, tok, 2).strip() == "Tom did it."
    assert with_expert(row, tok, 1) == " He smiles."
    assert with_expert(row, tok, 0) == ""
    assert all(label in (i, -100) for i, label in zip(row["input_ids"], row["labels"], strict=True))
    assert row["attention_mask"] == [1] * len(row["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["segments", "offsets"])
def test_tokenizers_that_leave_white_space_out_of_their_offsets(family: str, mode: Any) -> None:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tok = tokenizer(family)
    core = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    names = {name: getattr(tok, name) for name in ("bos_token", "eos_token", "pad_token", "chat_template")}
    trimming = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    for number in range(60):
        record = random_record(Random(number))
        both = [encode(record, t, label_tokenisation=mode) for t in (tok, trimming)]
        assert both[0] == both[1] is not None, (number, record)


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_mode_keeps_the_ids_of_the_plain_text(family: str) -> None:
    rng, tok = Random(1), tokenizer(family)
    for _ in range(200):
        record = random_record(rng)
        row = encode(record, tok, label_tokenisation="offsets")
        assert row is not None
        text = tok.apply_chat_template(record.messages(), tokenize=False, date_string="26 Jul 2024")
        assert row["input_ids"] == tok(text, add_special_tokens=False).input_ids


def test_offsets_mode_owner_is_the_first_character_that_is_no_space() -> None:
    tok = tokenizer("smollm2")
    record = Record("?", "It is 12 and so on.", [Span(0, 8, "MD"), Span(9, 19, "ToM")])
    row = encode(record, tok, label_tokenisation="offsets")
    assert row is not None
    assert with_expert(row, tok, 1) == " and so on."  # the space belongs to the token that it opens
    inside = Record("?", "a carried thing", [Span(0, 5, "MD"), Span(5, 15, "ToM")])
    row = encode(inside, tok, label_tokenisation="offsets")
    assert row is not None
    assert (with_expert(row, tok, 0) + with_expert(row, tok, 1)).strip() == "a carried thing"


def test_last_span_rule() -> None:
    tok = tokenizer("smollm2")
    assert 1 not in encode(RECORD, tok, last_span="language")["routing_labels"]  # type: ignore[index]
    one = Record("?", "Tom smiles.", [Span(0, 11, "ToM")])
    assert set(encode(one, tok, last_span="language")["routing_labels"]) == {3}  # type: ignore[index]
    assert set(encode(one, tok)["routing_labels"]) == {1, 3}  # type: ignore[index]


def test_text_around_the_spans() -> None:
    tok = tokenizer("smollm2")
    row = encode(Record("?", "Well, Tom did it. The end.", [Span(6, 17, "MD")]), tok)
    assert row is not None
    assert with_expert(row, tok, 0).strip() == "Well, Tom did it."
    assert with_expert(row, tok, 3).endswith(" The end.<|im_end|>\n")
    assert set(encode(Record("?", "No spans.", []), tok)["routing_labels"]) == {3}  # type: ignore[index]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["segments", "offsets"])
def test_special_strings_are_plain_text_by_default(family: str, mode: Any) -> None:
    tok = tokenizer(family)
    nasty = " ".join([*tok.get_added_vocab(), "assistant"])
    record = Record(nasty, f"{nasty} and {ANSWER}", [Span(0, 5, "MD"), Span(5, len(nasty) + 5, "ToM")])
    row, quiet = (encode(r, tok, label_tokenisation=mode) for r in (record, Record("x", "y", [])))
    assert row is not None
    assert quiet is not None
    added = set(tok.get_added_vocab().values())
    assert [i for i in row["input_ids"] if i in added] == [i for i in quiet["input_ids"] if i in added]
    assert trained(row, tok) == record.assistant + END[family]
    rendered = tok.apply_chat_template(record.messages(), tokenize=False, date_string="26 Jul 2024")
    assert tok.decode(row["input_ids"]) == rendered


def test_a_special_string_in_one_turn_changes_no_other_turn() -> None:
    rng, tok = Random(2), tokenizer("llama")
    header = tok.convert_tokens_to_ids("<|start_header_id|>")
    for _ in range(100):
        record = random_record(rng)
        record.prompt = record.messages()[0]["content"]
        nasty = [{"role": "user", "content": "<|eot_id|>"}, {"role": "assistant", "content": "."}]
        longer = Record([*nasty, {"role": "user", "content": record.prompt}], record.assistant, record.spans)
        tails = []
        for row in (encode(record, tok), encode(longer, tok)):
            assert row is not None
            user = [i for i, index in enumerate(row["input_ids"]) if index == header][-2]
            tails.append({name: values[user:] for name, values in row.items()})
        assert tails[0] == tails[1]


def test_mask_after_first_header_of_a_chat_trains_on_later_users() -> None:
    tok = tokenizer("smollm2")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": f"{r} {i}"} for i, r in enumerate(roles)]
    ours, theirs = encode_chat(messages, tok), encode_chat(messages, tok, mask="after_first_header")
    assert ours is not None
    assert theirs is not None
    assert trained(ours, tok) == "assistant 1<|im_end|>assistant 3<|im_end|>"
    assert "user 2" in trained(theirs, tok)
    assert "user 0" not in trained(theirs, tok)
    assert ours["input_ids"] == theirs["input_ids"]
    assert "routing_labels" not in ours
    assert encode_chat(Chat(messages), tok) == ours


def test_truncation_is_counted_and_named() -> None:
    tok, counts = tokenizer("smollm2"), Counter[str]()
    whole = encode(RECORD, tok)
    assert whole is not None
    header = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    cut = encode(RECORD, tok, max_length=header + 2, counts=counts)
    assert cut == {name: values[: header + 2] for name, values in whole.items()}
    assert counts == {"encoded": 1, "truncated": 1, "answer_cut": 1}
    record = Record(RECORD.prompt, RECORD.assistant, RECORD.spans, origin=("a.json", 4))
    with pytest.warns(DataWarning, match=r"a.json, record 4, field 'assistant'.*max_length"):
        assert encode(record, tok, max_length=header) is None
    with pytest.warns(DataWarning, match=rf"a.json, record 4, field 'assistant'.*cut.*max_length {header + 2}"):
        assert encode(record, tok, max_length=header + 2) == cut
    assert encode(RECORD, tok, max_length=5, counts=counts) is None
    assert counts["no_response_template"] == 1


def test_data_sets_name_the_first_row_that_was_cut_or_dropped() -> None:
    tok = tokenizer("smollm2")
    whole = encode(RECORD, tok)
    assert whole is not None
    long = Record(RECORD.prompt, RECORD.assistant + " More." * 9, RECORD.spans, origin=("a.json", 4))
    with pytest.warns(DataWarning, match=r"answer_cut 1 \(first: a.json, record 4, field 'assistant'\)"):
        to_dataset([RECORD, long], tok, max_length=len(whole["input_ids"]))
    with pytest.warns(DataWarning, match=r"no_response_template 1 \(first: record 1, field 'assistant'\)"):
        to_dataset([RECORD, Record("x" * 5000, "y", [])], tok, max_length=100)
    chats = [Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 90}], origin=("c.json", 2))]
    with pytest.warns(DataWarning, match=r"answer_cut 1 \(first: c.json, record 2, field 'messages'\)"):
        chat_to_dataset(chats, tok, max_length=60)


def test_truncation_counting_separators() -> None:
    tok = tokenizer("smollm2")
    whole = encode(RECORD, tok)
    assert whole is not None
    n = len(whole["input_ids"])
    assert len(encode(RECORD, tok, max_length=n)["input_ids"]) == n  # type: ignore[index]
    assert len(encode(RECORD, tok, max_length=n, truncation="count_separators")["input_ids"]) == n - 2  # type: ignore[index]
    assert len(encode(RECORD, tok, max_length=n + 2, truncation="count_separators")["input_ids"]) == n  # type: ignore[index]


def test_missing_template() -> None:
    tok, counts = tokenizer("smollm2"), Counter[str]()
    assert encode(RECORD, tok, response_template="nowhere", counts=counts) is None
    assert counts == {"no_response_template": 1}
    row = encode(RECORD, tok, response_template="nowhere", missing_template="train_all")
    assert row is not None
    assert row["labels"] == row["input_ids"]
    assert row["routing_labels"][0] == 2


def test_dates_and_bos_of_the_llama_template() -> None:
    tok = tokenizer("llama")
    first = encode(RECORD, tok)
    assert first is not None
    assert "26 Jul 2024" in tok.decode(first["input_ids"])
    assert first["input_ids"].count(tok.bos_token_id) == 1
    other = encode(RECORD, tok, template_date="01 Jan 1999", double_bos=True)
    assert other is not None
    assert "01 Jan 1999" in tok.decode(other["input_ids"])
    assert other["input_ids"].count(tok.bos_token_id) == 2
    assert other["labels"][:2] == [-100, -100]


def test_a_template_that_is_changed_is_read_again() -> None:
    tok = tiny_tokenizer()
    before = encode(RECORD, tok)
    tok.chat_template = tok.chat_template.replace("You are a tiny model", "Be quick")
    after = encode(RECORD, tok)
    assert before is not None
    assert after is not None
    assert "Be quick" in tok.decode(after["input_ids"])
    assert trained(before, tok) == trained(after, tok)


def test_bad_tokenizers_and_switches() -> None:
    tok = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"max_length.*-1"):
        encode(RECORD, tok, max_length=-1)
    with pytest.raises(ValueError, match="label, language"):
        encode(RECORD, tok, last_span="lang")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="official"):
        encode(RECORD, tok, preset="offical")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="text order"):
        encode(Record("?", ANSWER, [Span(5, 30, "MD")]), tok)
    with pytest.raises(DataError, match="unknown label"):
        encode(Record("?", ANSWER, [Span(0, 5, "logic")]), tok)
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    tok.chat_template = shouting + "{% if add_generation_prompt %}A:{% endif %}"
    with pytest.raises(ValueError, match="changes message texts"):
        encode(RECORD, tok)
    tok.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode(RECORD, tok)


def test_datasets() -> None:
    tok = tiny_tokenizer()
    with pytest.warns(DataWarning, match="nothing_to_train 1|no_response_template 1"):
        rows = to_dataset([RECORD, Record("x" * 5000, "y", [])], tok, max_length=100)
    assert len(rows) == 1
    assert rows[0] == encode(RECORD, tok)
    chats = chat_to_dataset([Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])], tok)
    assert set(chats.column_names) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(ValueError, match="no row is left"):
        to_dataset([], tok)
    with pytest.raises(TypeError, match="unknown option maximum"):
        to_dataset([RECORD], tok, maximum=3)
