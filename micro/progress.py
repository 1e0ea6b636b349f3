"""Progress of anything that takes longer than two seconds: bars on a terminal, plain lines elsewhere, on stderr.

Only the first process of a distributed run prints (``RANK`` of torchrun). stdout stays free for results.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, TextIO, TypeVar

T = TypeVar("T")

LINE_SECONDS = 5.0  # between two plain lines; a log file should stay readable


class _Display(Protocol):
    def show(self, done: float, note: str) -> None: ...
    def close(self, done: float, note: str) -> None: ...


class Progress(AbstractContextManager["Progress"]):
    """A counter that is shown while the ``with`` block runs.

        with Progress("training", total=300) as bar:
            bar.advance(note="loss 2.31")

    Args:
        description: what is being done.
        total: the number of steps; ``None`` when nobody knows.
        unit: what a step is, for the rate.
        file: where lines go; ``None`` = stderr.
        enabled: ``None`` = only in the first process of a distributed run.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "steps",
        file: TextIO | None = None,
        enabled: bool | None = None,
    ) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0.0
        self.note = ""
        self._file = file if file is not None else sys.stderr
        self._enabled = os.environ.get("RANK", "0") == "0" if enabled is None else enabled
        self._display: _Display | None = None

    def __enter__(self) -> Progress:
        if self._enabled:
            self._display = _Bar(self, self._file) if self._file.isatty() else _Lines(self, self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close(self.done, self.note)
            self._display = None

    def advance(self, steps: float = 1, *, note: str | None = None) -> None:
        """``steps`` more are done; ``note`` (a loss, a file name) replaces the last note."""
        self.update(self.done + steps, note=note)

    def update(self, done: float, *, note: str | None = None, total: float | None = None) -> None:
        """``done`` steps are done in all; ``total`` corrects the total."""
        self.done = done
        if note is not None:
            self.note = note
        if total is not None:
            self.total = total
        if self._display is not None:
            self._display.show(self.done, self.note)

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if isinstance(self._display, _Bar):
            self._display.print(line)
        elif self._enabled:
            print(line, file=self._file, flush=True)


def track(
    items: Iterable[T],
    description: str,
    total: float | None = None,
    *,
    unit: str = "steps",
    file: TextIO | None = None,
    enabled: bool | None = None,
) -> Iterator[T]:
    """Yield ``items`` and show how many are done. ``total``: their number, where ``len`` does not know it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(description, total, unit=unit, file=file, enabled=enabled) as bar:
        for item in items:
            yield item
            bar.advance()


class _Bar:
    """A rich bar on a terminal."""

    def __init__(self, owner: Progress, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._owner = owner
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=file),
        )
        self._task = self._rich.add_task(owner.description, total=owner.total, note="")
        self._rich.start()

    def show(self, done: float, note: str) -> None:
        self._rich.update(self._task, completed=done, note=note, total=self._owner.total)

    def print(self, line: str) -> None:
        self._rich.console.print(line, markup=False, highlight=False)

    def close(self, done: float, note: str) -> None:
        self.show(done, note)
        self._rich.stop()


class _Lines:
    """A line every few seconds where there is no terminal, and one at the end."""

    def __init__(self, owner: Progress, file: TextIO) -> None:
        self._owner = owner
        self._file = file
        self._start = self._last = time.monotonic()

    def _line(self, done: float, note: str) -> str:
        owner = self._owner
        seconds = time.monotonic() - self._start
        count = f"{done:g}" if owner.total is None else f"{done:g}/{owner.total:g}"
        parts = [f"{owner.description}: {count} {owner.unit}", f"{seconds:.0f} s"]
        if done and owner.total and done < owner.total:
            parts.append(f"{seconds * (owner.total - done) / done:.0f} s left")
        if note:
            parts.append(note)
        return ", ".join(parts)

    def show(self, done: float, note: str) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            print(self._line(done, note), file=self._file, flush=True)

    def close(self, done: float, note: str) -> None:
        print(self._line(done, note), file=self._file, flush=True)
