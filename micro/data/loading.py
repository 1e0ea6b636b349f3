"""Labelled answers from files, a report over all their problems, and back to files."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from micro.data.reading import iter_rows
from micro.data.records import DataError, DataWarning, Findings, Problem, Record, RecordParser
from micro.experts import LABELS


def iter_records(path: str | Path, *, repair: bool = False) -> Iterator[Record]:
    """The records of a JSON list, a file of JSON lines or a Parquet file, one at a time (model.md 8.1, 8.8).

    Raises DataError at the first bad record. Repaired spans and dropped answers are counted, and one DataWarning at the
    end names counts and first places. repair: duplicate and overlapping spans are mended, the later start wins.
    """
    findings = Findings(str(path))
    parse = RecordParser(findings, repair=repair)
    try:
        for index, row in iter_rows(path):
            record = parse(row, index)
            if record is not None:
                yield record
    finally:  # also where the reader stops early
        if findings.counts:
            warnings.warn(findings.summary(), DataWarning, stacklevel=2)


def load_records(path: str | Path, *, repair: bool = False) -> list[Record]:
    """All records of a file; see :func:`iter_records`."""
    return list(iter_records(path, repair=repair))


def save_records(records: Iterable[Record], path: str | Path) -> int:
    """Writes JSON lines beside `path` and renames; returns the number of records."""
    return write_lines((r.to_json() for r in records), path)


def write_lines(rows: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Writes one JSON object per line, beside `path`, then renames: a half-written file never bears the name."""
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return count


@dataclass
class Report:
    """What a file holds and what is wrong with it.

    `problems`: every finding, in file order, errors and warnings. `counts`: records (read, usable), spans and
    characters per label, and dropped, repaired and refused rows by reason. `ok`: no errors (warnings do not count).
    """

    path: str
    problems: list[Problem] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not any(p.severity == "error" for p in self.problems)

    def summary(self, most: int | None = None) -> str:
        """Counts, then the problems, at most so many of them."""
        lines = [f"{self.path}: {'ok' if self.ok else 'not usable as it is'}"]
        for name, value in self.counts.items():
            shown = value if not isinstance(value, dict) else ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
            lines.append(f"  {name}: {shown}")
        lines += [f"  {p}" for p in self.problems[:most]]
        left = len(self.problems) - len(self.problems[:most])
        return "\n".join([*lines, f"  ... and {left} more problems"] if left else lines)

    def __str__(self) -> str:
        return self.summary()


def validate(path: str | Path, *, repair: bool = False) -> Report:
    """Reads a whole file of labelled answers and reports everything, not the first problem only. Raises nothing for bad
    content; a broken JSON list cannot be read beyond the break, and the report says so.
    """
    findings = Findings(str(path), keep=True)
    parse = RecordParser(findings, repair=repair)
    problems = findings.problems
    assert problems is not None
    tally = _Tally()

    def refuse(error: DataError) -> None:
        tally.read += error.record is not None
        problems.append(Problem(str(path), error.record, error.field, "refused", error.reason))

    try:
        for index, row in iter_rows(path, on_error=refuse):
            try:
                record = parse(row, index)
            except DataError as error:
                refuse(error)
                continue
            tally.read += 1
            if record is not None:
                tally.add(record)
    except DataError as error:
        refuse(error)
    refused = sum(p.severity == "error" for p in problems)
    return Report(str(path), problems, tally.counts(findings.counts, refused))


class _Tally:
    def __init__(self) -> None:
        self.read = self.usable = 0
        self.spans: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.datasets: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        self.usable += 1
        self.datasets[record.dataset or "unnamed"] += 1
        for span in record.spans:
            self.spans[span.label] += 1
            self.characters[span.label] += span.end - span.start

    def counts(self, warned: Counter[str], refused: int) -> dict[str, Any]:
        dropped = {"empty_answer"}
        return {
            "records": self.read,
            "usable": self.usable,
            "spans": {label: self.spans[label] for label in LABELS},
            "characters": {label: self.characters[label] for label in LABELS},
            "datasets": dict(self.datasets),
            "dropped": {k: v for k, v in warned.items() if k in dropped},
            "repaired": {k: v for k, v in warned.items() if k not in dropped},
            "refused": refused,
        }
