"""Sums in words, from the templates of :mod:`micro.data.generators`: every right answer is computed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from micro.data.generators import TEMPLATES, Slots, Template
from micro.data.generators.scene import draw_scene
from micro.evaluation.suites.items import Draw, Item, question

VERSION = 1
DOMAIN = "logic"
WRONG = 3
_OFFSETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20)

# Templates of the generator whose answer is one number: name -> its slot.
_NUMBERS = {
    "train": {
        "boxes": "product",
        "left": "difference",
        "altogether": "sum",
        "halves": "half",
        "sequence": "next",
        "share": "quotient",
        "percent": "part",
        "steps": "rest",
    },
    "test": {"remainder": "rest", "triple": "triple", "average": "middle", "rows": "product", "clock": "end"},
}


def _missing(rng: Random, _: Slots) -> Slots:
    x, y = rng.randint(5, 60), rng.randint(3, 40)
    return {"x": x, "whole": x + y, "answer": y}


def _down(rng: Random, _: Slots) -> Slots:
    step, last = rng.randint(2, 9), rng.randint(5, 40)
    return {"row": ", ".join(str(last + i * step) for i in (4, 3, 2, 1)), "answer": last}


def _twice(rng: Random, _: Slots) -> Slots:
    n, more = rng.randint(3, 30), rng.randint(2, 12)
    return {"n": n, "more": more, "answer": 2 * n + more}


def _legs(rng: Random, _: Slots) -> Slots:
    birds, dogs = rng.randint(2, 12), rng.randint(2, 12)
    return {"birds": birds, "dogs": dogs, "answer": 2 * birds + 4 * dogs}


# More held-out ones, for the number of templates.
_OWN = (
    Template("missing", "{a} has {x} {things} and needs {whole}. How many are missing?", "{answer}", _missing),
    Template("down", "Which number comes next after {row}?", "{answer}", _down),
    Template(
        "twice",
        "{b} has {n} {things}. {a} has twice as many and finds {more} more. How many has {a}?",
        "{answer}",
        _twice,
    ),
    Template("legs", "How many legs have {birds} birds and {dogs} dogs together?", "{answer}", _legs),
)


def draws(split: str) -> dict[str, Draw]:
    """Template -> function that draws an item."""
    known = {template.name: template for template in TEMPLATES["logic"][split]}
    pairs = [(known[name], slot) for name, slot in _NUMBERS[split].items()]
    if split == "test":
        pairs += [(template, "answer") for template in _OWN]
    return {template.name: _draw(template, slot) for template, slot in pairs}


def _draw(template: Template, slot: str) -> Callable[[Random], list[Item]]:
    def draw(rng: Random) -> list[Item]:
        scene = draw_scene(rng)
        slots = scene | (template.slots(rng, scene) if template.slots else {})
        candidates, answer = near_numbers(rng, int(slots[slot]))
        return [Item(question(template.question.format_map(slots)), candidates, answer, "arithmetic", template.name)]

    return draw


def near_numbers(rng: Random, answer: int, wrong: int = WRONG) -> tuple[tuple[str, ...], int]:
    """The answer among numbers near it, in random order, as candidates; and its index.

    Numbers have as many digits as the answer where that can be; how many of the wrong ones are smaller is drawn evenly,
    so that neither the smallest nor the largest number is right more often than chance.
    """
    sides = []
    for sign in (-1, 1):
        near = [answer + sign * offset for offset in _OFFSETS if answer + sign * offset > 0]
        same = [n for n in near if len(str(n)) == len(str(answer))]
        sides.append(same)
    smaller, larger = sides
    lowest, highest = max(0, wrong - len(larger)), min(wrong, len(smaller))
    if lowest > highest:  # one digit, little room: longer numbers too
        larger = [answer + offset for offset in _OFFSETS]
        lowest = 0
    below = rng.randint(lowest, highest)
    numbers = [answer, *rng.sample(smaller, below), *rng.sample(larger, wrong - below)]
    rng.shuffle(numbers)
    return tuple(f" {n}" for n in numbers), numbers.index(answer)
