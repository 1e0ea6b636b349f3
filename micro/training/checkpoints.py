"""Checkpoints that are whole or not there: written beside, flushed to disk, renamed; checked before they are read.

A finished folder holds ``complete.json``, the list of its files and their sizes, written last. A run that is killed
while it writes leaves a folder whose name starts with ``.writing-``; nothing reads it and the next run removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "complete.json"
PARTIAL = ".writing-"
REPLACED = ".replaced-"
REMOVED = ".removing-"
TRAINING_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed from. The message names the folder and what is wrong."""


def partial_path(folder: Path) -> Path:
    """The folder that is written in place of `folder` until it is complete."""
    return folder.with_name(f"{PARTIAL}{folder.name}")


def finish(partial: Path, folder: Path) -> None:
    """Seal a written folder: manifest, flush of every file and folder, rename to `folder` (replacing an older one)."""
    files = {
        str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()
    }
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in sorted(partial.rglob("*"), reverse=True):
        _flush(path)
    _flush(partial)
    if folder.exists():
        # A folder cannot be replaced in one step: the old one is moved aside, and `sweep` takes it back after a kill
        # here.
        aside = folder.with_name(f"{REPLACED}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        partial.rename(folder)
        shutil.rmtree(aside)
    else:
        partial.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Write a folder that appears only when it is complete::

    with writing(run / "model") as beside:
        model.save_pretrained(beside)
    """
    partial = partial_path(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    finish(partial, folder)


def problems(folder: Path, *, training: bool = True) -> list[str]:
    """What keeps `folder` from being read: missing manifest, missing files, wrong sizes. Empty = complete.

    training: the files of optimizer, schedule, generators and trainer must be there too, not only the model's.
    """
    if not folder.is_dir():
        return ["no such folder"]
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the folder was not written to its end, or not by micro"]
    except (ValueError, KeyError, TypeError):
        return [f"{MANIFEST} cannot be read"]
    found = []
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, expected {size}")
    if training:
        found += [f"{name} was never written" for name in TRAINING_FILES if name not in files]
        if not any(name.startswith("rng_state") for name in files):
            found.append("the generators' state (rng_state*.pth) was never written")
    return found


def check(folder: Path) -> None:
    """Refuse an incomplete checkpoint. Errors: CheckpointError that lists every problem."""
    if found := problems(folder):
        raise CheckpointError(
            f"{folder}: cannot resume from this checkpoint: {'; '.join(found)}. Resume from an earlier one"
        )


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint's name; -1 for other folders."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def listed(folder: Path) -> list[Path]:
    """All checkpoints in `folder`, oldest step first, complete or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()), key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`; None without any. Errors: CheckpointError where it is incomplete: an older one
    is not taken in silence.
    """
    found = listed(folder)
    if not found:
        return None
    check(found[-1])
    return found[-1]


def rotate(folder: Path, keep: int, *, protect: Path | None = None) -> None:
    """Remove all but the newest `keep` checkpoints; `protect` stays in any case."""
    for path in listed(folder)[:-keep] if keep else []:
        if protect is None or path.resolve() != protect.resolve():
            discard(path)


def discard(folder: Path) -> None:
    """Remove a folder, so that a kill on the way leaves nothing under its name."""
    aside = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def sweep(folder: Path) -> None:
    """Clear up after a killed run: half-written and half-removed folders go, a replaced one whose successor is not
    there comes back.
    """
    for path in sorted(folder.glob(".*")) if folder.is_dir() else []:
        original = folder / path.name.removeprefix(REPLACED)
        if path.name.startswith(REPLACED) and not original.exists():
            path.rename(original)
        elif path.name.startswith((PARTIAL, REPLACED, REMOVED)):
            shutil.rmtree(path, ignore_errors=True)
