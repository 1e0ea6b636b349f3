"""Text at hand for a backbone's pretraining: installed Debian packages, Python's docstrings, our own sentences.

Nothing is copied into the repository: texts are read where they lie, and the receipt says which were there. No template
of the labelled answers is among them, so that the experts learn those with their labels or not at all.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from micro.data.generators.scene import draw_scene

FORTUNES = Path("/usr/share/games/fortunes")
WORDNET = Path("/usr/share/wordnet")
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"


@dataclass(frozen=True)
class TextSource:
    """Documents of one kind. package: what to install where none is found; characters: at most so many are taken."""

    name: str
    package: str
    characters: int
    read: Callable[[], Iterator[str]]


@dataclass
class Corpus:
    """Documents in a fixed random order, and what they came from."""

    documents: list[str]
    receipt: list[dict[str, object]]

    @property
    def missing(self) -> list[str]:
        """Packages that would add text."""
        return [str(entry["package"]) for entry in self.receipt if not entry["documents"] and entry["package"]]


def fortunes() -> Iterator[str]:
    """Epigrams: the files of the package, without indexes and links."""
    for path in sorted(FORTUNES.glob("*")):
        if path.suffix or path.is_symlink() or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for piece in text.split("\n%\n"):
            if 40 <= len(piece) <= 2000 and "\ufffd" not in piece:
                yield piece.strip().expandtabs(4)


def definitions() -> Iterator[str]:
    """Words with their glosses, half of them as a question and its answer, so that the chat format is known."""
    rows: list[str] = []
    for part in ("noun", "verb", "adj", "adv"):
        path = WORDNET / f"data.{part}"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            if gloss and len(fields) > 4 and not line.startswith("  "):
                rows.append(f"{fields[4].split('(')[0].replace('_', ' ')}\t{gloss.strip()}")
    Random("definitions").shuffle(rows)
    for index, row in enumerate(rows):
        word, _, gloss = row.partition("\t")
        asked = f"{USER}Tell me about {word}.{END}{ASSISTANT}{gloss[:1].upper()}{gloss[1:]}.{END}"
        yield asked if index % 2 else f"{word}: {gloss}"


def scripture() -> Iterator[str]:
    """The King James Bible in pieces of a few verses."""
    program = shutil.which("bible")
    if program is None:
        return
    out = subprocess.run([program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    verses = [re.sub(r"^\S+ ", "", line) for line in out.stdout.splitlines() if line.strip()]
    for at in range(0, len(verses), 6):
        yield " ".join(verses[at : at + 6])


def docstrings() -> Iterator[str]:
    """Documentation of Python's standard library, from the files of this interpreter."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= 80:
                    yield text


_ACTIONS = (
    "{a} carried the {colour} {thing} from the {place} to the {elsewhere}.",
    "On {day} {a} and {b} cleaned the {place}.",
    "There were {k} {things} in the {box}, and the {other} lay beside them.",
    "{b} asked {a} for the {thing}, and {a} gave it to {b_him}.",
    "{c} came into the {place} with a {colour} {other}.",
    "Later {a} went home, and {b} stayed in the {elsewhere} until {day}.",
    "{x} + {y} = {sum}.",
    "{x} times {k} is {product}.",
    "The {boxes} were made of {material}.",
    "{b} counted {x} {things} and {y} {others}.",
)


def scenes() -> Iterator[str]:
    """Plain little stories about the people and things of the labelled answers, without end."""
    index = 0
    while True:
        rng = Random(f"scene {index}")
        scene = draw_scene(rng)
        sentences = []
        for action in rng.sample(_ACTIONS, rng.randint(3, 6)):
            x, y = rng.randint(2, 99), rng.randint(2, 99)
            sentences.append(action.format_map({**scene, "x": x, "y": y, "sum": x + y, "product": x * int(scene["k"])}))
        half = len(sentences) // 2
        told = f"{USER}{' '.join(sentences[:half])} What came next?{END}{ASSISTANT}{' '.join(sentences[half:])}{END}"
        yield told if index % 2 else " ".join(sentences)
        index += 1


SOURCES = (
    TextSource("fortunes", "fortunes", 2_000_000, fortunes),
    TextSource("definitions", "wordnet-base", 5_000_000, definitions),
    TextSource("scripture", "bible-kjv", 2_000_000, scripture),
    TextSource("docstrings", "", 1_000_000, docstrings),
    TextSource("scenes", "", 1_500_000, scenes),
)
CHARACTERS = sum(source.characters for source in SOURCES)


def collect(*, share: float = 1.0, seed: int = 0, sources: tuple[TextSource, ...] = SOURCES) -> Corpus:
    """All documents, shuffled by `seed`; `share` scales what each source may give.

    A source that is not there is no error: its part is missing, and the receipt says so.
    """
    documents: list[str] = []
    receipt: list[dict[str, object]] = []
    for source in sources:
        taken: list[str] = []
        size, digest = 0, hashlib.sha256()
        for text in source.read():
            if size + len(text) > source.characters * share:
                break
            taken.append(text)
            size += len(text)
            digest.update(text.encode() + b"\0")
        entry = {"source": source.name, "package": source.package, "documents": len(taken), "characters": size}
        receipt.append({**entry, "sha256": digest.hexdigest()[:16]})
        documents += taken
    Random(f"corpus {seed}").shuffle(documents)
    return Corpus(documents, receipt)
