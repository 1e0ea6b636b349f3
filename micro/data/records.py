"""Labelled answers: the record of model.md 8.1, its checks (8.8) and the report over a whole file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from micro.experts import LABELS

# Keys of a record that are read; every other key is kept in `Record.meta` and not used (model.md 8.1).
_USED_KEYS = frozenset({"prompt", "assistant", "continuation", "dataset"})
_SPAN_KEY = re.compile(r"\s*([+-]?\d+)\s*-\s*([+-]?\d+)\s*")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant")


class DataError(ValueError):
    """Bad input data. `path`: the file; `record`: index of the record, from 0; `field`: where in the record."""

    def __init__(
        self, message: str, *, path: str | None = None, record: int | None = None, field: str | None = None
    ) -> None:
        where = [] if path is None else [path]
        if record is not None:
            where.append(f"record {record} (counted from 0)")
        if field is not None:
            where.append(f"field {field!r}")
        super().__init__(f"{', '.join(where)}: {message}" if where else message)
        self.path, self.record, self.field, self.reason = path, record, field, message


class DataWarning(UserWarning):
    """Rows that were repaired or dropped: how many, for which reason, and where the first one stands."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of an answer with one label: code points [start, end) of `assistant` (model.md 8.2)."""

    start: int
    end: int
    label: str


@dataclass(slots=True)
class Record:
    """One labelled answer (model.md 8.1). `prompt`: the user's text, or messages that end in a user turn.

    `spans` are in text order and do not overlap; `meta` keeps the keys that are not used.
    `origin` is (path, index from 0) for a record that came from a file.
    """

    prompt: str | list[dict[str, str]]
    assistant: str
    spans: list[Span]
    dataset: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    origin: tuple[str, int] | None = field(default=None, compare=False, repr=False)

    def messages(self, *, long_prompt: str = "turns") -> list[dict[str, str]]:
        """The conversation that is trained on, answer included.

        A system message and a user message become one user turn, joined by an empty line (model.md 8.1). Longer lists
        (8.8): with "turns", system messages are joined and stand before the first user turn, other turns stay;
        with "first_two" only the first two messages count, as officially.
        """
        if isinstance(self.prompt, str):
            turns = [{"role": "user", "content": self.prompt}]
        elif long_prompt == "first_two":
            turns = [{"role": "user", "content": "\n\n".join(m["content"] for m in self.prompt[:2])}]
        else:
            turns = [dict(m) for m in self.prompt if m["role"] != "system"]
            system = [m["content"] for m in self.prompt if m["role"] == "system"]
            first = next(m for m in turns if m["role"] == "user")
            first["content"] = "\n\n".join([*system, first["content"]])
        return [*turns, {"role": "assistant", "content": self.assistant}]

    def to_json(self) -> dict[str, Any]:
        """The object of model.md 8.1."""
        head = {} if self.dataset is None else {"dataset": self.dataset}
        spans = {f"{s.start}-{s.end}": s.label for s in self.spans}
        return {**head, "prompt": self.prompt, "assistant": self.assistant, "continuation": spans, **self.meta}


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `severity` is "error" (the record is unusable) or "warning" (repaired, or dropped and counted)."""

    path: str
    record: int | None
    field: str | None
    reason: str
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        where = self.path if self.record is None else f"{self.path}, record {self.record}"
        where += f", field {self.field!r}" if self.field else ""
        return f"{self.severity}: {where}: {self.message}"


class Findings:
    """Collects warnings while records are parsed: every one for a report, or only counts and first places."""

    def __init__(self, path: str, *, keep: bool = False) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, Problem] = {}
        self.problems: list[Problem] | None = [] if keep else None

    def warn(self, reason: str, record: int, field_name: str | None, message: str) -> None:
        problem = Problem(self.path, record, field_name, reason, message, "warning")
        self.counts[reason] += 1
        self.first.setdefault(reason, problem)
        if self.problems is not None:
            self.problems.append(problem)

    def summary(self) -> str:
        """One line per reason: how often, and the first place."""
        return "\n".join(f"{self.counts[r]} x {r}, first: {self.first[r]}" for r in self.counts)


class RowCounts(Counter[str]):
    """What became of encoded rows, by reason, and the place where each reason came up first."""

    def __init__(self, counts: Mapping[str, int] | Iterable[str] = (), /) -> None:
        super().__init__(counts)
        self.first: dict[str, str] = {}

    def note(self, reasons: Iterable[str], place: str) -> None:
        """Remember `place` for those reasons that have none yet."""
        for reason in reasons:
            self.first.setdefault(reason, place)

    def summary(self, kept: str = "encoded") -> str:
        """Every reason but `kept`, with its count and first place; empty where there is nothing to tell."""
        found = [(name, count) for name, count in self.items() if name != kept and count]
        return ", ".join(
            f"{name} {count} (first: {self.first[name]})" if name in self.first else f"{name} {count}"
            for name, count in found
        )


def place_of(origin: tuple[str, int] | None, index: int | None, kind: str = "record") -> str:
    """Where a row stands, in words: its file and record, else its index in the list that was given, from 0."""
    if origin is not None:
        return f"{origin[0]}, record {origin[1]}"
    return kind if index is None else f"{kind} {index}"


def whole_text(text: str, findings: Findings, index: int, field_name: str) -> str:
    """Lone surrogates cannot be written as UTF-8: each becomes U+FFFD, which keeps offsets right, and is counted."""
    if _LONE_SURROGATE.search(text) is None:
        return text
    findings.warn("lone_surrogate", index, field_name, "half a surrogate pair; replaced by U+FFFD")
    return _LONE_SURROGATE.sub("\ufffd", text)


class RecordParser:
    """Turns decoded JSON objects (or Parquet rows) into records, by the rules of model.md 8.8.

    repair: duplicate and overlapping spans are mended (the later start wins) instead of refused.
    """

    def __init__(self, findings: Findings, *, repair: bool = False) -> None:
        self._findings = findings
        self._repair = repair

    def __call__(self, row: object, index: int) -> Record | None:
        """The record, or None where it is dropped and counted. Raises DataError."""
        if isinstance(row, Pairs):
            raise self._error(index, None, f"a key is written twice: {', '.join(k for k, _ in row)}")
        if not isinstance(row, Mapping):
            raise self._error(
                index, None, f"expected an object with prompt, assistant and continuation, got {_kind(row)}"
            )
        for key in ("prompt", "assistant", "continuation"):
            if key not in row or row[key] is None:
                raise self._error(index, key, f"{key} is missing; {_EXPECTED[key]}")
        prompt = self._prompt(row["prompt"], index)
        assistant = row["assistant"]
        if not isinstance(assistant, str):
            raise self._error(index, "assistant", f"{_EXPECTED['assistant']}, got {_kind(assistant)}")
        dataset = row.get("dataset")
        if dataset is not None and not isinstance(dataset, str):
            raise self._error(index, "dataset", f"expected a string, got {_kind(dataset)}")
        if not assistant.strip():
            self._findings.warn("empty_answer", index, "assistant", "the answer is empty; record dropped")
            return None
        spans = self._spans(row["continuation"], assistant, index)
        meta = {str(k): v for k, v in row.items() if k not in _USED_KEYS}
        assistant = whole_text(assistant, self._findings, index, "assistant")
        return Record(prompt, assistant, spans, dataset, meta, (self._findings.path, index))

    def _error(self, index: int, field_name: str | None, message: str) -> DataError:
        return DataError(message, path=self._findings.path, record=index, field=field_name)

    def _prompt(self, prompt: object, index: int) -> str | list[dict[str, str]]:
        if isinstance(prompt, str):
            return whole_text(prompt, self._findings, index, "prompt")
        messages = check_messages(prompt, lambda where, why: self._error(index, f"prompt{where}", why))
        if not any(m["role"] == "user" for m in messages):
            raise self._error(index, "prompt", "expected at least one message with the role 'user'")
        if messages[-1]["role"] == "assistant":
            raise self._error(
                index, "prompt", "expected a prompt that ends in a user message, got an assistant message"
            )
        for message in messages:
            message["content"] = whole_text(message["content"], self._findings, index, "prompt")
        return messages

    def _spans(self, raw: object, text: str, index: int) -> list[Span]:
        pairs = _span_pairs(raw)
        if pairs is None:
            raise self._error(index, "continuation", f"{_EXPECTED['continuation']}, got {_kind(raw)}")
        spans = [self._span(key, label, index) for key, label in pairs]
        self._refuse_bytes(spans, text, index)
        kept = [s for s in (self._inside(span, text, index) for span in spans) if s is not None]
        ordered = sorted(kept, key=lambda s: s.start)  # stable: of two equal starts the one written later comes last
        if ordered != kept:
            self._findings.warn("reordered", index, "continuation", "spans were not in text order; sorted by start")
        return self._without_overlap(ordered, index)

    def _span(self, key: object, label: object, index: int) -> Span:
        match = _SPAN_KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise self._error(index, "continuation", f'expected a span key like "0-62", got {key!r}')
        if label not in LABELS:
            raise self._error(
                index, f"continuation.{key}", f"unknown label {label!r}; the labels are {', '.join(LABELS)}"
            )
        start, end = int(match[1]), int(match[2])
        if start < 0:
            raise self._error(index, f"continuation.{key}", "a span cannot start before 0")
        return Span(start, end, str(label))

    def _refuse_bytes(self, spans: list[Span], text: str, index: int) -> None:
        size = len(text.encode("utf-8", "surrogatepass"))
        last = max((s.end for s in spans), default=0)
        if last == size != len(text):
            message = (
                f"offsets look like UTF-8 bytes: the last span ends at {last}, which is the length of the answer in "
            )
            message += f"bytes; expected code points, of which it has {len(text)}"
            raise self._error(index, "continuation", message)

    def _inside(self, span: Span, text: str, index: int) -> Span | None:
        where = f"continuation.{span.start}-{span.end}"
        if span.start >= span.end or span.start >= len(text):
            reason = "empty_span" if span.start >= span.end else "outside_span"
            self._findings.warn(reason, index, where, f"the span holds no text of {len(text)} characters; dropped")
            return None
        if span.end > len(text):
            self._findings.warn("clipped_span", index, where, f"the answer has {len(text)} characters; end clipped")
            return Span(span.start, len(text), span.label)
        return span

    def _without_overlap(self, spans: list[Span], index: int) -> list[Span]:
        result: list[Span] = []
        for span in spans:
            while result and result[-1].end > span.start:
                before = result.pop()
                names = f"{before.start}-{before.end} ({before.label}) and {span.start}-{span.end} ({span.label})"
                same = (before.start, before.end) == (span.start, span.end)
                reason = "duplicate_span" if same else "overlapping_span"
                if not self._repair:
                    message = (
                        f"spans {names} {'are the same' if same else 'overlap'}; use repair to let the later one win"
                    )
                    raise self._error(index, f"continuation.{span.start}-{span.end}", message)
                where = f"continuation.{before.start}-{before.end}"
                self._findings.warn(reason, index, where, f"spans {names}: the later one wins")
                if before.start < span.start:
                    result.append(Span(before.start, span.start, before.label))
            result.append(span)
        return result


_EXPECTED = {
    "prompt": "expected a string or a list of messages",
    "assistant": "expected a string, the answer",
    "continuation": 'expected an object "start-end" -> label, {} for an answer without spans',
}


def check_messages(value: object, error: Any) -> list[dict[str, str]]:
    """A list of {role, content} with known roles, or what `error(where, why)` makes of it, raised."""
    if not isinstance(value, list) or not value:
        raise error("", f"expected a string or a non-empty list of messages, got {_kind(value)}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise error(f"[{i}]", f"expected an object with role and content, got {_kind(message)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise error(f"[{i}].role", f"unknown role {role!r}; the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise error(f"[{i}].content", f"expected a string, got {_kind(content)}")
        messages.append({"role": str(role), "content": content})
    return messages


def _span_pairs(raw: object) -> list[tuple[Any, Any]] | None:
    """Spans as (key, label) pairs: an object, or what Parquet makes of one (pairs; a struct with nulls)."""
    if isinstance(raw, Pairs):
        return list(raw)
    if isinstance(raw, Mapping):
        return [(k, v) for k, v in raw.items() if v is not None]
    if isinstance(raw, list) and all(isinstance(p, list | tuple) and len(p) == 2 for p in raw):
        return [(p[0], p[1]) for p in raw]
    return None


class Pairs(list[tuple[str, Any]]):
    """A JSON object whose keys repeat: what a dictionary would have lost."""


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {
        Mapping: "an object",
        list: "a list",
        str: "a string",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)
