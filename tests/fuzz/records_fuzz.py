"""The record and chat parsers under mutated files: a DataError or a result, never another exception.

A plain program: `python tests/fuzz/records_fuzz.py [rounds] [seed]`. The corpus is tests/data/{records,chat}.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

from micro.data import DataError, load_chat, load_records, validate, validate_chat

CORPUS = Path(__file__).parents[1] / "data"
PIECES = [b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\x00", b"\n", b"\xff", b"\xef\xbb\xbf", b"null"]
PIECES += [b"-1", b"0-", b"1e999", b'"0-5"', b"MD", b"[" * 3000, b"user", b"true", b"\r", b'"', b"\xe2\x80\xa8"]


# Files that a reader accepts as they are: mutated most often, since a mutation of a broken file is mostly just broken.
SOUND = {"good", "unordered_spans", "lone_surrogate", "past_the_end", "ends_in_user"}


def mutate(data: bytes, rng: Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data = data[:at] + rng.choice(PIECES) + data[at:]
        elif kind == 1:
            data = data[:at] + data[at + rng.randint(1, 40) :]
        elif kind == 2:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        else:
            low = rng.randint(0, len(data))
            data = data[:at] + data[low : low + rng.randint(1, 60)] + data[at:]
    return data


def attempt(path: Path) -> bool:
    """Runs every reader on a file; True if a record of it is usable. Any exception but DataError goes up."""
    usable = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (load_records, load_chat, lambda p: load_records(p, repair=True)):
            with contextlib.suppress(DataError):
                read(path)
        for report in (validate(path), validate_chat(path)):
            assert report.ok or report.problems
            str(report)
            usable += report.counts["usable"]
    return usable > 0


def fuzz(rounds: int, seed: int) -> tuple[int, int]:
    """(files tried, files with a usable record)."""
    rng = Random(seed)
    files = [f for folder in ("records", "chat") for f in sorted((CORPUS / folder).iterdir())]
    sound = [f.read_bytes() for f in files if f.stem in SOUND]
    corpus = [f.read_bytes() for f in files]
    accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        for number in range(rounds):
            data = mutate(rng.choice(sound if rng.random() < 0.7 else corpus), rng)
            path.write_bytes(data)
            try:
                accepted += attempt(path)
            except Exception:
                print(f"round {number}, seed {seed}: {data!r}", file=sys.stderr)
                raise
    return rounds, accepted


def main() -> None:
    """Entry point."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tried, accepted = fuzz(rounds, seed)
    print(f"records_fuzz: {tried} files, {accepted} of them with a usable record, no other exception than DataError")


if __name__ == "__main__":
    main()
