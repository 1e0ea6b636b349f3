"""Rows of a file, one after another: a JSON list, JSON lines or Parquet, never the whole file in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from micro.data.records import DataError, Pairs
from micro.errors import require

_CHUNK = 1 << 20  # characters read at a time from a JSON list
_LONGEST = 1 << 27  # characters of one record: more means a quote that is never closed
_SPACE = re.compile(r"[ \t\r\n]*")
_FORMATS = "a JSON list of objects, JSON lines (one object per line) or Parquet"


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any] | Pairs:
    mapping = dict(items)
    return mapping if len(mapping) == len(items) else Pairs(items)


# strict=False lets raw control characters stand inside strings, NUL included (model.md 8.8).
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_pairs)


def iter_rows(path: str | Path, on_error: Callable[[DataError], None] | None = None) -> Iterator[tuple[int, Any]]:
    """(index from 0, decoded row) for every record of the file, in order, in bounded memory.

    Formats are told apart by content, not by name. A broken line of JSON lines goes to `on_error` if given and reading
    goes on; everything else that cannot be read raises DataError with path and record, as an empty file does.
    """
    name = str(path)
    if not Path(path).is_file():
        raise DataError("no such file" if not Path(path).exists() else f"not a file; expected {_FORMATS}", path=name)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        rows = _parquet_rows(name)
    else:
        first = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1]
        rows = _list_rows(name) if first == b"[" else _line_rows(name, on_error)
    found = next(rows, None)
    if found is None:
        raise DataError(f"the file holds no records; expected {_FORMATS}", path=name)
    yield from chain([found], rows)


def _line_rows(path: str, on_error: Callable[[DataError], None] | None) -> Iterator[tuple[int, Any]]:
    index = 0
    with open(path, "rb") as file:  # bytes: one line that is not UTF-8 must not hide the others
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip(b" \t\r\n"):
                continue
            try:
                yield index, _decode_line(raw, number, path, index)
            except DataError as error:
                if on_error is None:
                    raise
                on_error(error)
            index += 1


def _decode_line(raw: bytes, number: int, path: str, index: int) -> Any:
    try:
        text = raw.decode("utf-8").strip(" \t\r\n")
        value, end = _DECODER.raw_decode(text)
    except UnicodeDecodeError as error:
        why = f"line {number} is not UTF-8 text: byte 0x{raw[error.start]:02x} at position {error.start} of the line"
        raise DataError(why, path=path, record=index) from None
    except (json.JSONDecodeError, RecursionError) as error:
        why = f"line {number} is not one complete JSON object ({_short(error)}); the file must be {_FORMATS}"
        raise DataError(why, path=path, record=index) from None
    if end != len(text):
        why = f"line {number} goes on after its JSON object, at column {end + 1}: {text[end : end + 20]!r}"
        raise DataError(why, path=path, record=index)
    return value


def _short(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"


class _ListReader:
    """A sliding window over the text of a JSON list."""

    def __init__(self, file: TextIO, path: str) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._ended, self._want = "", 0, False, _CHUNK
        self.index = 0

    def error(self, message: str) -> DataError:
        return DataError(message, path=self._path, record=self.index)

    def _more(self) -> bool:
        """Reads on, twice as much each time a record did not fit; False at the end of the file."""
        if self._ended:
            return False
        try:
            chunk = self._file.read(self._want)
        except UnicodeDecodeError as error:
            raise self.error(
                f"not UTF-8 text (byte 0x{error.object[error.start]:02x}) in or after this record"
            ) from None
        self._text, self._at = self._text[self._at :] + chunk, 0
        self._ended = not chunk
        self._want = min(2 * self._want, _LONGEST)
        if len(self._text) > 2 * _LONGEST:
            raise self.error(f"the record is longer than {_LONGEST} characters; is a quote or a bracket not closed?")
        return not self._ended

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches the empty string
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise self.error(f"broken JSON: {error.msg}; the rest of the list cannot be read") from None
            except RecursionError:
                raise self.error("broken JSON: nested too deeply") from None
            self._at, self._want = end, _CHUNK
            return value


def _list_rows(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = _ListReader(file, path)
        reader.peek()
        reader.skip()  # the bracket that told us that this is a list
        if reader.peek() == "]":
            return
        while True:
            if reader.peek() == "":
                raise reader.error("the file ends inside the list; is it cut off?")
            yield reader.index, reader.value()
            mark = reader.peek()
            if mark == "]":
                reader.skip()
                break
            if mark != ",":
                raise reader.error(f"expected ',' or ']' after this record, got {mark or 'the end of the file'!r}")
            reader.index += 1
            reader.skip()
        if reader.peek() != "":
            raise reader.error("text after the end of the JSON list")


def _parquet_rows(path: str) -> Iterator[tuple[int, Any]]:
    pyarrow = require("pyarrow", "hf", "reading Parquet")
    parquet = require("pyarrow.parquet", "hf", "reading Parquet")
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield index, row
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {error}", path=path, record=index) from error
