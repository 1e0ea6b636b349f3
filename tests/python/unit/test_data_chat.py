"""Chat data: reading, roles, writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from micro.data import Chat, DataError, DataWarning, encode_chat, load_chat, save_chat, validate_chat
from micro.testing import tiny_tokenizer

FILES = Path(__file__).parents[2] / "data" / "chat"
ERRORS = {
    "unknown_role.jsonl": ("messages[1].role", "bot"),
    "two_users.jsonl": ("messages[1].role", "take turns"),
    "late_system.jsonl": ("messages[1].role", "first"),
    "starts_with_answer.jsonl": ("messages[0].role", "user begins"),
    "no_messages.jsonl": ("messages", "missing"),
    "empty_messages.jsonl": ("messages", "non-empty"),
    "no_text.jsonl": ("messages[0].content", "null"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_each_error_names_file_record_and_field(name: str) -> None:
    field, word = ERRORS[name]
    with pytest.raises(DataError, match=word) as caught:
        load_chat(FILES / name)
    assert (caught.value.path, caught.value.record, caught.value.field) == (str(FILES / name), 1, field)
    report = validate_chat(FILES / name)
    assert not report.ok
    assert [(p.record, p.field) for p in report.problems] == [(1, field)]
    assert report.counts["records"] == 2


def test_good_chats(tmp_path: Path) -> None:
    chats = load_chat(FILES / "good.jsonl")
    assert chats[0] == Chat(
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}], "a", "example"
    )
    assert [m["role"] for m in chats[1].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert save_chat(chats, tmp_path / "out.jsonl") == 2
    assert load_chat(tmp_path / "out.jsonl") == chats
    assert validate_chat(FILES / "good.jsonl").counts["messages"] == {"user": 3, "assistant": 3, "system": 1}


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = load_chat(FILES / "good.jsonl")
    pq.write_table(pa.Table.from_pylist([c.to_json() for c in chats]), tmp_path / "chat.parquet")
    assert load_chat(tmp_path / "chat.parquet") == chats


def test_dropped_and_shortened_chats_are_counted() -> None:
    with pytest.warns(DataWarning, match="no_answer"):
        chats = load_chat(FILES / "ends_in_user.jsonl")
    assert [m["role"] for m in chats[1].messages] == ["user", "assistant"]
    with pytest.warns(DataWarning, match=r"empty_answer.*record 1"):
        assert len(load_chat(FILES / "empty_answer.jsonl")) == 1
    assert validate_chat(FILES / "empty_answer.jsonl").counts["dropped"] == {"empty_answer": 1}


def test_encode_checks_the_roles() -> None:
    tok = tiny_tokenizer()
    with pytest.raises(DataError, match="ends in an assistant"):
        encode_chat([{"role": "user", "content": "a"}], tok)
    with pytest.raises(DataError, match="take turns"):
        encode_chat([{"role": "assistant", "content": "a"}], tok)
    with pytest.raises(DataError, match="unknown role"):
        encode_chat([{"role": "human", "content": "a"}], tok)
