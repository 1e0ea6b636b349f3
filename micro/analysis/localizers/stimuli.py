"""What a localizer shows the model: two lists of texts, and how an activation is read off them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from micro.errors import choices

POOLINGS = ("last", "mean")
PLUS = ("positive", "1", "+", "true")
MINUS = ("negative", "0", "-1", "-", "false")


@dataclass(frozen=True)
class Stimuli:
    """Two sets of texts whose activations are compared.

    ``pooling``: "last" reads the last token, "mean" the mean over tokens. ``max_tokens``: texts are cut to so many
    tokens, special ones counted. ``source``: where the texts come from. ``distractors``: a second pair of sets that
    differ on the surface as the first pair does, but not in what the localizer is after. ``note``: a warning that is
    printed with every result.
    """

    name: str
    positive: Sequence[str]
    negative: Sequence[str]
    pooling: str = "mean"
    max_tokens: int | None = None
    source: str = "given"
    distractors: tuple[Sequence[str], Sequence[str]] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"Stimuli: pooling {self.pooling!r}: {choices(self.pooling, POOLINGS)}")
        for side in ("positive", "negative"):
            texts = getattr(self, side)
            if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                raise ValueError(f"Stimuli: {side} must be a list of texts, none of them empty")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"Stimuli: max_tokens must be at least 1, got {self.max_tokens}")


def multiple_demand_sums(low: int, high: int, *, items: int = 100, seed: int = 42) -> list[tuple[int, int, str]]:
    """(a, b, operator) of ``items`` sums, a and b uniform in [low, high), the operator uniform in + and -.

    Each draw takes 32-bit outputs of the Mersenne Twister, masks them to the next power of two and rejects what is too
    large; that is what ``numpy.random.RandomState`` does, whose stream is frozen.
    """
    from numpy.random import RandomState

    stream = RandomState(seed)
    return [
        (int(stream.randint(low, high)), int(stream.randint(low, high)), "+-"[int(stream.randint(0, 2))])
        for _ in range(items)
    ]


def multiple_demand() -> Stimuli:
    """Hard against easy sums: 100 + 100 (model.md 9.5). Distractors hold the same numbers, with nothing to solve."""
    hard, easy = multiple_demand_sums(100, 200), multiple_demand_sums(1, 20)
    return Stimuli(
        "multiple_demand",
        [_sum(*numbers) for numbers in hard],
        [_sum(*numbers) for numbers in easy],
        pooling="mean",
        source="generated: Mersenne Twister, seed 42 for each set",
        distractors=([_copy(*numbers) for numbers in hard], [_copy(*numbers) for numbers in easy]),
    )


def _sum(a: int, b: int, operator: str) -> str:
    return f"Question: Solve {a} {operator} {b}?\nAnswer: {a + b if operator == '+' else a - b}"


def _copy(a: int, b: int, _: str) -> str:
    return f"Question: Copy {a} , {b}?\nAnswer: {a}"


def theory_of_mind(seed: int = 0) -> Stimuli:
    """False-belief against false-photograph stories, 10 + 10, with random answers drawn from ``seed``."""
    from micro.analysis.localizers.stories import BELIEFS, PHOTOGRAPHS, told

    return Stimuli(
        "theory_of_mind",
        told(BELIEFS, seed=seed),
        told(PHOTOGRAPHS, seed=seed + 1),
        pooling="mean",
        source=f"own stories, answers drawn with seed {seed}",
        distractors=(told(BELIEFS, seed=seed, noticed=True), told(PHOTOGRAPHS, seed=seed + 1, noticed=True)),
        note="low power: 10 + 10 stories; most true effects will be missed",
    )


def language(source: str = "auto", seed: int = 0) -> Stimuli:
    """Sentences against lists of non-words, 240 + 240 of 12 words, cut to 12 tokens.

    Args:
        source: "brainscore" (the tables of the package ``brainscore-language``), "own" (generated from ``seed``), or
            "auto": the first where it is installed.
        seed: of what is generated.

    Raises:
        MissingExtraError: "brainscore" without the package.
    """
    from micro.analysis.localizers import sentences

    if source not in ("auto", "brainscore", "own"):
        raise ValueError(f"language stimuli: source {source!r}: {choices(source, ('auto', 'brainscore', 'own'))}")
    tables = None if source == "own" else sentences.brainscore_tables(needed=source == "brainscore")
    said, nonsense = tables if tables is not None else sentences.generated(seed)
    return Stimuli(
        "language",
        said,
        nonsense,
        pooling="last",
        max_tokens=12,
        source=f"generated, seed {seed}" if tables is None else "brainscore-language: Fedorenko2010.localization",
        distractors=(sentences.scrambled(said, seed), nonsense),
    )


BUILT_IN: dict[str, Callable[[], Stimuli]] = {
    "language": language,
    "multiple_demand": multiple_demand,
    "theory_of_mind": theory_of_mind,
}


def find_stimuli(localizer: str | Stimuli) -> Stimuli:
    """The built-in stimuli of a name, those of a path, or the given ones.

    Raises:
        ValueError: neither a localizer nor an existing file or folder.
    """
    if isinstance(localizer, Stimuli):
        return localizer
    if localizer in BUILT_IN:
        return BUILT_IN[localizer]()
    if Path(localizer).exists():
        return load_stimuli(localizer)
    raise ValueError(f"localizer {localizer!r}: {choices(str(localizer), BUILT_IN)} (or give a file or a folder)")


def load_stimuli(path: str | Path, *, pooling: str = "mean", max_tokens: int | None = None) -> Stimuli:
    """Stimuli of your own.

    Args:
        path: a CSV or TSV with the columns ``text`` and ``condition`` (positive or negative, 1 or 0), a JSON file with
            the lists ``positive`` and ``negative`` (and, if wanted, ``pooling`` and ``max_tokens``), or a folder with
            ``positive.txt`` and ``negative.txt``, one text a line.
        pooling: "last" or "mean"; what a JSON file says comes first.
        max_tokens: cut to so many tokens.

    Raises:
        ValueError: another layout, an unknown condition or an empty side; the message names the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        positive, negative = (_lines(path / f"{side}.txt") for side in ("positive", "negative"))
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"positive", "negative"} <= content.keys():
            raise ValueError(f"{path}: expected an object with the lists positive and negative")
        positive, negative = content["positive"], content["negative"]
        pooling, max_tokens = content.get("pooling", pooling), content.get("max_tokens", max_tokens)
    elif path.suffix in (".csv", ".tsv"):
        positive, negative = _table(path)
    else:
        raise ValueError(f"{path}: stimuli must be a .csv, .tsv or .json file, or a folder")
    return Stimuli(path.stem, positive, negative, pooling, max_tokens, source=path.name)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a folder of stimuli holds positive.txt and negative.txt")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _table(path: Path) -> tuple[list[str], list[str]]:
    positive: list[str] = []
    negative: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        if not {"text", "condition"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected the columns text and condition, got {reader.fieldnames}")
        for row in reader:
            condition = (row["condition"] or "").strip().lower()
            if condition not in (*PLUS, *MINUS):
                raise ValueError(
                    f"{path}, line {reader.line_num}: condition {condition!r} must be positive or negative"
                )
            (positive if condition in PLUS else negative).append(row["text"])
    return positive, negative
