"""Forced-choice items, and what simple rules would score on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

SPLITS = ("train", "test")
_TRIES = 50  # draws that may repeat an earlier item before a template counts as used up


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt whose continuation is one of the candidates (which begin with the space behind the prompt).

    answer: index of the right one; row: what it is counted under; template: what it was made from (splits never share
    one); record: items of one record, such as a story and its control, are resampled together.
    """

    prompt: str
    candidates: tuple[str, ...]
    answer: int
    row: str
    template: str
    record: int = 0


def question(text: str, lead: str = "The answer is") -> str:
    """The plain form of a question whose answer is scored."""
    return f"Question: {text[0].upper()}{text[1:]}\nAnswer: {lead}"


def mixed(rng: Random, right: str, wrong: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """(candidates in random order, index of the right one)."""
    options = [right, *wrong]
    if len(set(options)) != len(options):
        raise ValueError(f"candidates repeat: {options}")
    rng.shuffle(options)
    return tuple(options), options.index(right)


Draw = Callable[[Random], Sequence[Item]]


def draw_records(draws: dict[str, Draw], count: int, *, task: str, split: str, seed: int) -> list[Item]:
    """Up to ``count`` records, the templates in turn, no prompt twice; the first n of a longer list are the same.

    There are fewer where the templates do not hold so many.

    Args:
        draws: template -> a function that draws the items of one record.
        count: records.
        task: name for the seed.
        split: name for the seed.
        seed: another one gives other items.
    """
    items: list[Item] = []
    seen: set[tuple[str, ...]] = set()
    names = list(draws)
    used_up: set[str] = set()
    record = index = 0
    while record < count and len(used_up) < len(names):
        name = names[index % len(names)]
        turn, index = index, index + 1
        if name in used_up:
            continue
        for attempt in range(_TRIES):
            found = draws[name](Random(f"micro suite {task} {split} {name} {seed} {turn} {attempt}"))
            key = tuple(item.prompt for item in found)
            if key not in seen:
                break
        else:
            used_up.add(name)
            continue
        seen.add(key)
        items += [Item(i.prompt, i.candidates, i.answer, i.row, name, record) for i in found]
        record += 1
    return items


# ---------------------------------------------------------------- simple rules
def rules(items: Sequence[Item]) -> dict[str, list[float]]:
    """What rules that understand nothing get right: rule -> probability of being right, item by item.

    "mentioned first" and "mentioned last": the candidate that the prompt names first or last; "smallest" and "largest":
    of numbers; "always ...": the one answer that is right most often, where it is a candidate. A rule that does not
    apply to an item guesses.
    """
    found: dict[str, list[float]] = {
        "mentioned first": [_one(i, _by_place(i, first=True)) for i in items],
        "mentioned last": [_one(i, _by_place(i, first=False)) for i in items],
    }
    if all(_number(c) is not None for item in items for c in item.candidates):
        for name, pick in (("smallest", min), ("largest", max)):
            picked = [pick(item.candidates, key=lambda c: _number(c) or 0) for item in items]
            found[name] = [_one(i, i.candidates.index(c)) for i, c in zip(items, picked, strict=True)]
    golds = Counter(item.candidates[item.answer] for item in items)
    if golds:
        common = golds.most_common(1)[0][0]
        always = [_one(i, i.candidates.index(common) if common in i.candidates else None) for i in items]
        found[f"always {common.strip()!r}"] = always
    return found


def _one(item: Item, choice: int | None) -> float:
    return 1 / len(item.candidates) if choice is None else float(choice == item.answer)


def _by_place(item: Item, *, first: bool) -> int | None:
    text = item.prompt.lower()
    places = [(text.find if first else text.rfind)(c.strip().lower()) for c in item.candidates]
    named = [(place, i) for i, place in enumerate(places) if place >= 0]
    if not named:
        return None
    return (min(named) if first else max(named))[1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
