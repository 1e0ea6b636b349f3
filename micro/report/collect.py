"""Saved results below a folder, whichever part of the package wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.report.registry import KINDS

if TYPE_CHECKING:
    from micro.analysis.result import Result

HEAD = 400  # characters that are read to see whether a JSON file is a result
_KIND = re.compile(r'\A\s*\{\s*"kind"\s*:\s*"([^"\\]+)"')


@dataclass(frozen=True)
class Found:
    """One result and the file that it stands in."""

    kind: str
    path: Path
    result: Result


@dataclass(frozen=True)
class Training:
    """Metrics of a run, one dictionary per line, and its run.json where there is one."""

    path: Path
    metrics: list[dict[str, Any]]
    record: dict[str, Any]


@dataclass
class Collection:
    """What a folder holds. ``unread``: path -> why it is not in the page."""

    folder: Path
    results: list[Found] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    demos: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    unread: dict[Path, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.results) + len(self.trainings) + len(self.demos)

    def of(self, kind: str) -> list[Found]:
        """The results of one kind, by path."""
        return [found for found in self.results if found.kind == kind]

    def place(self, path: Path) -> str:
        """Where a file stands, seen from the folder."""
        return str(path.relative_to(self.folder))


def collect(folder: str | Path) -> Collection:
    """Read every result below a folder. A result that cannot be read is listed, not fatal.

    Raises:
        NotADirectoryError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder")
    found = Collection(folder)
    for path in _files(folder):
        if path.name == "metrics.jsonl":
            _training(found, path)
        elif path.name == "summary.json":
            _demo(found, path)
        elif path.suffix == ".json":
            _result(found, path)
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Files in order of their paths, without hidden ones (unfinished writes among them)."""
    for path in sorted(folder.rglob("*.json*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _result(found: Collection, path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            match = _KIND.match(file.read(HEAD))
    except (OSError, UnicodeDecodeError):
        return
    if match is None:
        return
    name = match.group(1)
    kind = KINDS.get(name)
    if kind is None:
        found.unread[path] = f"unknown kind of result: {name}"
        return
    try:
        found.results.append(Found(name, path, kind.load_class().load(path)))
    except Exception as error:  # one broken file of many must not cost the page; it says what is missing and why
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        # Fields that a class does not know, or misses, are those of another version.
        found.unread[path] = f"saved by another version of micro? {told}" if isinstance(error, TypeError) else told


def _training(found: Collection, path: Path) -> None:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that was killed while writing it
    metrics = [line for line in lines if isinstance(line, dict) and {"stage", "step"} <= line.keys()]
    if not metrics:
        found.unread[path] = "no records of steps"
        return
    found.trainings.append(Training(path, metrics, _json(path.with_name("run.json"))))


def _demo(found: Collection, path: Path) -> None:
    content = _json(path)
    if isinstance(content.get("verdicts"), list):
        found.demos.append((path, content))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
