"""Chat data without labels in the `messages` format of the Tülu-3 mixture (model.md 8.9): stage 3, baselines."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micro.data.encoding import EncodeOptions, encode_messages, resolve_options
from micro.data.loading import Report, write_lines
from micro.data.reading import iter_rows
from micro.data.records import DataError, DataWarning, Findings, Problem, check_messages, place_of, whole_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(slots=True)
class Chat:
    """A conversation: messages {role, content} with an answer last. `source` names the data set it came from."""

    messages: list[dict[str, str]]
    id: str | None = None
    source: str | None = None
    origin: tuple[str, int] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The object that is written: id, messages, source."""
        return {"id": self.id, "messages": self.messages, "source": self.source}


class _ChatParser:
    """Rows to conversations. System messages stand first; user and assistant take turns, the user begins."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def __call__(self, row: object, index: int) -> Chat | None:
        """The conversation, or None where it is dropped and counted. Raises DataError."""

        def error(where: str, message: str) -> DataError:
            return DataError(message, path=self._findings.path, record=index, field=where)

        if not isinstance(row, Mapping) or row.get("messages") is None:
            raise error("messages", "messages is missing; expected an object with a list of {role, content}")
        messages = check_messages(row["messages"], lambda where, why: error(f"messages{where}", why))
        problem = roles_problem(messages)
        if problem is not None:
            raise error(f"messages[{problem[0]}].role", problem[1])
        for key in ("id", "source"):
            if row.get(key) is not None and not isinstance(row[key], str):
                raise error(key, f"expected a string, got {type(row[key]).__name__}")
        if messages[-1]["role"] == "user":
            self._findings.warn("no_answer", index, "messages", "ends in a user message: that message dropped")
            messages.pop()
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            self._findings.warn("empty_answer", index, "messages", "no assistant message holds text; record dropped")
            return None
        for i, message in enumerate(messages):
            message["content"] = whole_text(message["content"], self._findings, index, f"messages[{i}].content")
        return Chat(messages, row.get("id"), row.get("source"), (self._findings.path, index))


def roles_problem(messages: list[dict[str, str]]) -> tuple[int, str] | None:
    """(index, sentence) of the first message that is out of turn, or None."""
    expected = "user"
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            if i > 0:
                return i, "a system message can only be the first one"
            continue
        if role != expected:
            return i, f"expected the {expected} here (user and assistant take turns, the user begins), got {role}"
        expected = "assistant" if role == "user" else "user"
    return None


def iter_chat(path: str | Path) -> Iterator[Chat]:
    """The conversations of a JSON list, JSON lines or Parquet file, one at a time.

    Raises DataError at the first bad row; dropped and repaired ones are counted in one DataWarning at the end.
    """
    findings = Findings(str(path))
    parse = _ChatParser(findings)
    try:
        for index, row in iter_rows(path):
            chat = parse(row, index)
            if chat is not None:
                yield chat
    finally:  # also where the reader stops early
        if findings.counts:
            warnings.warn(findings.summary(), DataWarning, stacklevel=2)


def load_chat(path: str | Path) -> list[Chat]:
    """All conversations of a file; see :func:`iter_chat`."""
    return list(iter_chat(path))


def save_chat(chats: Iterable[Chat], path: str | Path) -> int:
    """Writes JSON lines beside `path` and renames; returns the number of conversations."""
    return write_lines((c.to_json() for c in chats), path)


def validate_chat(path: str | Path) -> Report:
    """Reads a whole file of conversations and reports every problem; raises nothing for bad content."""
    findings = Findings(str(path), keep=True)
    problems = findings.problems
    assert problems is not None
    parse = _ChatParser(findings)
    read = usable = 0
    roles: Counter[str] = Counter()
    sources: Counter[str] = Counter()

    def refuse(error: DataError) -> None:
        nonlocal read
        read += error.record is not None
        problems.append(Problem(str(path), error.record, error.field, "refused", error.reason))

    try:
        for index, row in iter_rows(path, on_error=refuse):
            try:
                chat = parse(row, index)
            except DataError as error:
                refuse(error)
                continue
            read += 1
            if chat is not None:
                usable += 1
                roles.update(m["role"] for m in chat.messages)
                sources[chat.source or "unnamed"] += 1
    except DataError as error:
        refuse(error)
    counts = {
        "records": read,
        "usable": usable,
        "messages": dict(roles),
        "sources": dict(sources),
        "dropped": {k: v for k, v in findings.counts.items() if k == "empty_answer"},
        "repaired": {k: v for k, v in findings.counts.items() if k != "empty_answer"},
        "refused": sum(p.severity == "error" for p in problems),
    }
    return Report(str(path), problems, counts)


def encode_chat(
    messages: Chat | list[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int | None = None,
    mask: Literal["assistant_turns", "after_first_header"] | None = None,
    missing_template: Literal["drop", "train_all"] | None = None,
    special_text: Literal["plain", "special"] | None = None,
    double_bos: bool | None = None,
    template_date: str | None = None,
    response_template: str | None = None,
    preset: Literal["official"] | None = None,
    counts: Counter[str] | None = None,
) -> dict[str, list[int]] | None:
    """A conversation as `input_ids`, `attention_mask` and `labels`, tokenised whole, without routing labels.

    Options, defaults, dropped rows and counts as in :func:`micro.data.encode`. ValueError for messages out of turn or a
    conversation that does not end in an answer.
    """
    options = resolve_options(
        preset,
        max_length=max_length,
        mask=mask,
        missing_template=missing_template,
        special_text=special_text,
        double_bos=double_bos,
        template_date=template_date,
        response_template=response_template,
    )
    return encode_conversation(messages, tokenizer, options, counts)


def encode_conversation(
    messages: Chat | list[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    options: EncodeOptions,
    counts: Counter[str] | None = None,
    index: int | None = None,
) -> dict[str, list[int]] | None:
    """:func:`encode_chat` with options that are already resolved. index: the chat's place, if it came from no file."""
    origin = messages.origin if isinstance(messages, Chat) else None
    where = f"{place_of(origin, index, 'chat')}, field 'messages'"
    turns = messages.messages if isinstance(messages, Chat) else messages
    turns = check_messages(turns, lambda at, why: DataError(why, field=f"messages{at}"))
    problem = roles_problem(turns)
    if problem is not None:
        raise DataError(problem[1], field=f"messages[{problem[0]}].role")
    if turns[-1]["role"] != "assistant":
        raise DataError("a conversation to train on ends in an assistant message", field="messages")
    return encode_messages(turns, tokenizer, options, None, counts, where)
