"""Glosses of WordNet (Debian: ``wordnet-base``) and the word that they define. Files are read where they lie.

Wrong words come from the same part of the lexicon ("animal", "food", ...); splits share no part.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from random import Random

from micro.evaluation.suites.items import Draw, Item, mixed

VERSION = 1
DOMAIN = "world"
WRONG = 3
FOLDERS = ("/usr/share/wordnet", "/usr/local/WordNet-3.0/dict")
MAX_SENSES = 4  # of a word: its most frequent one must be the one that is meant
GLOSS = (20, 90)  # characters
PARTS = {  # lexicographer files of nouns
    "train": {"body": 8, "feeling": 12, "event": 11, "quantity": 23, "substance": 27, "weather": 19},
    "test": {
        "act": 4,
        "animal": 5,
        "artifact": 6,
        "communication": 10,
        "food": 13,
        "place": 15,
        "person": 18,
        "plant": 20,
    },
}


def folder() -> Path | None:
    """Where WordNet's files are: $WNSEARCHDIR, $WNHOME/dict or where Debian puts them; None if nowhere."""
    home = os.environ.get("WNHOME")
    places = [os.environ.get("WNSEARCHDIR"), f"{home}/dict" if home else None, *FOLDERS]
    return next(
        (Path(p) for p in places if p and all((Path(p) / f"{n}.noun").is_file() for n in ("data", "index"))), None
    )


def draws(split: str) -> dict[str, Draw]:
    """Part of the lexicon -> function that draws an item.

    Raises:
        FileNotFoundError: WordNet is not installed.
    """
    found = folder()
    if found is None:
        raise FileNotFoundError(
            "suite wordnet: WordNet's files data.noun and index.noun are not on this machine; install Debian's "
            "wordnet-base, or set WNSEARCHDIR to their folder"
        )
    entries = _entries(found)
    drawn = {name: entries.get(number, ()) for name, number in PARTS[split].items()}
    return {name: _draw(some) for name, some in drawn.items() if len(some) > WRONG}


@lru_cache(maxsize=2)
def _entries(found: Path) -> dict[int, tuple[tuple[str, str], ...]]:
    """Lexicographer file -> (word, gloss) of first senses of common single words."""
    first = _first_senses(found / "index.noun")
    entries: dict[int, list[tuple[str, str]]] = {}
    for line in (found / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split(" ")
        # Behind the last semicolon stand examples, in quotation marks.
        meaning = gloss.split('; "')[0].strip()
        for word in (parts[4 + 2 * i] for i in range(int(parts[3], 16))):
            fits = word.isalpha() and word.islower() and GLOSS[0] <= len(meaning) <= GLOSS[1]
            if fits and first.get(word) == parts[0] and word[:5] not in meaning and '"' not in meaning:
                entries.setdefault(int(parts[1]), []).append((word, meaning))
                break
    return {part: tuple(sorted(some)) for part, some in entries.items()}


def _first_senses(index: Path) -> dict[str, str]:
    """Word -> address of its most frequent sense, for words in use."""
    found = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        parts = line.split()
        pointers = int(parts[3])
        tagged, addresses = int(parts[5 + pointers]), parts[6 + pointers :]
        if tagged and len(addresses) <= MAX_SENSES:  # tagged: seen in the texts that WordNet's authors read
            found[parts[0]] = addresses[0]
    return found


def _draw(entries: tuple[tuple[str, str], ...]) -> Callable[[Random], list[Item]]:
    def draw(rng: Random) -> list[Item]:
        (word, meaning), *others = rng.sample(entries, 1 + WRONG)
        candidates, answer = mixed(rng, f" {word}", (f" {w}" for w, _ in others))
        return [Item(f"The dictionary explains a word as: {meaning}. The word is", candidates, answer, "wordnet", "")]

    return draw
