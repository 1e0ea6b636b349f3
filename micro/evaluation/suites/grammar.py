"""Minimal pairs: which of two words goes on grammatically. For when SyntaxGym is not at hand, and beside it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from micro.data.generators.scene import Slots, draw_scene
from micro.evaluation.suites.items import Draw, Item, mixed

VERSION = 1
DOMAIN = "language"
_VERBS = "carry carries;hide hides;find finds;bring brings;take takes;draw draws;choose chooses;buy buys;keep keeps"
_PAST = "carry carried;hide hid;find found;bring brought;take took;draw drew;choose chose;buy bought;keep kept"

Drawn = tuple[str, str, str]  # the beginning, the right word, the wrong word
Template = Callable[[Random, Slots], Drawn]


def _turn(rng: Random, pair: tuple[str, str]) -> tuple[bool, str, str]:
    """(whether the first is right, right, wrong): each as often as the other."""
    first = rng.random() < 0.5
    return first, *(pair if first else pair[::-1])


def _pick(rng: Random, table: str) -> tuple[str, str]:
    one, other = rng.choice(table.split(";")).split()
    return one, other


# ---- train ----------------------------------------------------------------------------------------------------------


def _agreement(rng: Random, s: Slots) -> Drawn:
    one, right, wrong = _turn(rng, ("is", "are"))
    return f"The {s['colour']} {s['thing'] if one else s['things']} in the {s['place']}", right, wrong


def _this_these(rng: Random, s: Slots) -> Drawn:
    one, right, wrong = _turn(rng, (str(s["thing"]), str(s["things"])))
    return f"{s['a']} wants to have {'this' if one else 'these'} {s['colour']}", right, wrong


def _third_person(rng: Random, s: Slots) -> Drawn:
    many, right, wrong = _turn(rng, _pick(rng, _VERBS))
    who = f"{s['a']} and {s['b']}" if many else s["a"]
    return f"Every {s['day']} {who}", right, wrong


# ---- test -----------------------------------------------------------------------------------------------------------


def _attractor(rng: Random, s: Slots) -> Drawn:
    one, right, wrong = _turn(rng, ("was", "were"))
    subject, near = (s["thing"], s["others"]) if one else (s["things"], s["other"])
    return f"The {subject} beside the {near} in the {s['place']}", right, wrong


def _relative(rng: Random, s: Slots) -> Drawn:
    one, right, wrong = _turn(rng, ("has", "have"))
    subject, inner = (s["thing"], "the boys") if one else (s["things"], "the boy")
    return f"The {subject} that {inner} saw", right, wrong


def _reflexive(rng: Random, s: Slots) -> Drawn:
    right = "himself" if s["a_he"] == "he" else "herself"
    return f"{s['a']} said that {s['a_he']} had hurt", right, "herself" if right == "himself" else "himself"


def _reflexive_number(rng: Random, s: Slots) -> Drawn:
    one, right, wrong = _turn(rng, ("himself", "themselves"))
    return f"The {'baker' if one else 'bakers'} near the {s['place']} blamed", right, wrong


def _auxiliary(rng: Random, s: Slots) -> Drawn:
    base, past = _pick(rng, _PAST)
    helped, right, wrong = _turn(rng, (base, past))
    return f"On {s['day']} {s['a']} {'did not' if helped else 'suddenly'}", right, wrong


def _quantifier(rng: Random, s: Slots) -> Drawn:
    one, right, wrong = _turn(rng, (str(s["thing"]), str(s["things"])))
    return f"In the {s['box']} {s['a']} found {'another' if one else 'several'}", right, wrong


def _polarity(rng: Random, s: Slots) -> Drawn:
    negated, right, wrong = _turn(rng, ("any", "some"))
    return f"{s['a']} has {'never' if negated else 'just'} bought", right, wrong


def _comparison(rng: Random, s: Slots) -> Drawn:
    more, right, wrong = _turn(rng, ("than", "as"))
    return f"The {s['thing']} is {'heavier' if more else 'as heavy'}", right, wrong


def _gap(rng: Random, s: Slots) -> Drawn:
    article, right, wrong = _turn(rng, ("the", "on"))
    start = f"{s['a']} knows that {s['b']} bought" if article else f"{s['a']} knows what {s['b']} bought"
    return start, right, wrong


TEMPLATES: dict[str, dict[str, Template]] = {
    "train": {"agreement": _agreement, "this_these": _this_these, "third_person": _third_person},
    "test": {
        "attractor": _attractor,
        "relative": _relative,
        "reflexive": _reflexive,
        "reflexive_number": _reflexive_number,
        "auxiliary": _auxiliary,
        "quantifier": _quantifier,
        "polarity": _polarity,
        "comparison": _comparison,
        "gap": _gap,
    },
}


def draws(split: str) -> dict[str, Draw]:
    """Template -> function that draws an item."""
    return {name: _draw(template) for name, template in TEMPLATES[split].items()}


def _draw(template: Template) -> Callable[[Random], list[Item]]:
    def draw(rng: Random) -> list[Item]:
        text, right, wrong = template(rng, draw_scene(rng))
        candidates, answer = mixed(rng, f" {right}", [f" {wrong}"])
        return [Item(text, candidates, answer, "grammar", "")]

    return draw
