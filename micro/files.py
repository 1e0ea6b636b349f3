"""Files and folders that are never half-written."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, then rename: a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` and rename it to ``out`` when the block ends without an error.

    Everything in it is flushed to disk before the rename, so that ``out`` is whole or not there. An existing folder
    with something in it is refused, unless ``overwrite`` is set and it is a model folder (holds a config.json); it then
    stays untouched until the new one is complete.

    Errors: FileExistsError as above; NotADirectoryError where ``out`` is a file.
    """
    target = Path(out).expanduser().absolute()
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    beside.mkdir()
    try:
        yield beside
        _flush(beside)
        _swap(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_target(out: str | Path, overwrite: bool) -> None:
    """Refuse a target of :func:`replace_folder` that cannot be written, before any work is done for it."""
    target = Path(out).expanduser()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: a file of this name exists; name a folder to write to")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target}: the folder is not empty; name another one, or ask to overwrite it (--overwrite, overwrite=True)"
        )
    if not (target / "config.json").is_file():
        raise FileExistsError(f"{target}: holds no config.json, so it is no model folder and is not overwritten")


def _flush(folder: Path) -> None:
    """Flush all files to disk, and give them the permissions of new files; safetensors writes them for the owner."""
    mode = folder.stat().st_mode & 0o666
    for root, _, files in os.walk(folder):
        for name in files:
            (Path(root) / name).chmod(mode)
        for name in [*files, "."]:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _swap(beside: Path, target: Path) -> None:
    old = None
    if target.is_dir() and any(target.iterdir()):
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
        target.rename(old)
    try:
        beside.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    if old is not None:
        shutil.rmtree(old)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # makes the rename itself durable
    finally:
        os.close(handle)
