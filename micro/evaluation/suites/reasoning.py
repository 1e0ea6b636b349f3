"""Small inferences with few possible answers, as often one as the other."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from micro.data.generators.scene import COLOURS, DAYS, PLACES, Slots, draw_scene
from micro.evaluation.suites.items import Draw, Item, mixed, question

VERSION = 1
DOMAIN = "logic"

# What a template draws: the question, how the answer begins, the right answer, the wrong ones.
Drawn = tuple[str, str, str, list[str]]
Template = Callable[[Random, Slots], Drawn]


def _yes_no(text: str, yes: bool) -> Drawn:
    return text, "", "Yes" if yes else "No", ["No" if yes else "Yes"]


# ---- train ----------------------------------------------------------------------------------------------------------


def _oldest(rng: Random, s: Slots) -> Drawn:
    a, b, c = rng.sample([str(s["a"]), str(s["b"]), str(s["c"])], 3)
    premises = [f"{a} is older than {b}", f"{b} is older than {c}"]
    rng.shuffle(premises)
    first = rng.random() < 0.5
    right, wrong = (a, [b, c]) if first else (c, [a, b])
    name = "oldest" if first else "youngest"
    return f"{premises[0]}, and {premises[1]}. Who is the {name}?", f"The {name} is", right, wrong


def _either(rng: Random, s: Slots) -> Drawn:
    here, there = rng.sample([str(s["place"]), str(s["elsewhere"])], 2)
    both = rng.sample([here, there], 2)
    text = (
        f"The {s['thing']} is either in the {both[0]} or in the {both[1]}, and it is not in the {there}. Where is it?"
    )
    return text, f"The {s['thing']} is in the", here, [there]


def _every(rng: Random, s: Slots) -> Drawn:
    mine, other, third = rng.sample(COLOURS, 3)
    rules = rng.sample([f"all {s['things']} here are {mine}", f"all {s['others']} here are {other}"], 2)
    text = f"{rules[0]}, and {rules[1]}. This is one of the {s['things']}. Which colour has it?"
    return text, "Its colour is", mine, [other, third]


def _full(rng: Random, s: Slots) -> Drawn:
    x, y = rng.sample(range(4, 30), 2)
    text = f"A full {s['box']} holds {max(x, y)} {s['things']}. This one holds {min(x, y)}. "
    full = rng.random() < 0.5
    return _yes_no(text + ("Is there room in it?" if full else "Is it full?"), full)


def _pairs(rng: Random, s: Slots) -> Drawn:
    n = rng.randint(5, 60)
    return _yes_no(f"Can {n} {s['things']} be put in pairs so that none is left over?", n % 2 == 0)


# ---- test -----------------------------------------------------------------------------------------------------------


def _row(rng: Random, s: Slots) -> Drawn:
    a, b, c = rng.sample([str(s["a"]), str(s["b"]), str(s["c"])], 3)
    premises = rng.sample([f"{a} stands right before {b}", f"{c} stands right behind {b}"], 2)
    first = rng.random() < 0.5
    right, wrong = (a, [b, c]) if first else (c, [a, b])
    text = f"{premises[0]}, and {premises[1]}. Who is {'first' if first else 'last'} in the row?"
    return text, f"The {'first' if first else 'last'} in the row is", right, wrong


def _converse(rng: Random, s: Slots) -> Drawn:
    text = f"In the {s['place']} all {s['things']} are {s['colour']}. "
    if rng.random() < 0.5:
        return _yes_no(text + f"{s['a']} took one of these {s['things']}. Must it be {s['colour']}?", True)
    return _yes_no(text + f"{s['a']} took something {s['colour']} there. Must it be one of the {s['things']}?", False)


def _contraposition(rng: Random, s: Slots) -> Drawn:
    text = f"Whenever it rains, {s['a']} stays in the {s['place']}. "
    if rng.random() < 0.5:
        return _yes_no(text + f"{s['a']} is not in the {s['place']}. Can it be raining?", False)
    return _yes_no(text + f"It is not raining. Can {s['a']} be in the {s['place']}?", True)


def _three(rng: Random, s: Slots) -> Drawn:
    where = rng.sample(PLACES, 3)
    right, *ruled_out = rng.sample(where, 3)
    text = f"The {s['thing']} is in the {where[0]}, the {where[1]} or the {where[2]}. "
    text += f"It is not in the {ruled_out[0]}, and not in the {ruled_out[1]}. Where is it?"
    return text, f"The {s['thing']} is in the", right, ruled_out


def _taller(rng: Random, s: Slots) -> Drawn:
    a, b, c = rng.sample([str(s["a"]), str(s["b"]), str(s["c"])], 3)
    yes = rng.random() < 0.5
    premises = rng.sample([f"{a} is taller than {b}", f"{b} is taller than {c}"], 2)
    asked = f"Is {a} taller than {c}?" if yes else f"Is {c} taller than {a}?"
    return _yes_no(f"{premises[0]}, and {premises[1]}. {asked}", yes)


def _weekday(rng: Random, s: Slots) -> Drawn:
    start, days = rng.randrange(7), rng.randint(2, 6)
    right = DAYS[(start + days) % 7]
    others = [d for d in DAYS if d != right]
    text = f"Today is {DAYS[start]}. Which day is it in {days} days?"
    return text, f"In {days} days it is", right, rng.sample(others, 3)


def _liar(rng: Random, s: Slots) -> Drawn:
    here, there = rng.sample([str(s["place"]), str(s["elsewhere"])], 2)
    lies = rng.random() < 0.5
    both = rng.sample([here, there], 2)
    text = f"The {s['thing']} is in the {both[0]} or in the {both[1]}. "
    text += f"{s['a']}, who {'always lies' if lies else 'never lies'}, says that it is in the {here}. Where is it?"
    return text, f"The {s['thing']} is in the", there if lies else here, [here if lies else there]


def _swap(rng: Random, s: Slots) -> Drawn:
    a, b = str(s["a"]), str(s["b"])
    times = rng.randint(1, 2)
    text = f"{a} holds the {s['thing']} and {b} holds the {s['other']}. They swap what they hold. "
    text += "Then they swap again. " if times == 2 else ""
    asked = rng.choice(["thing", "other"])
    owner = (asked == "thing") == (times == 2)
    return text + f"Who holds the {s[asked]} now?", f"The {s[asked]} is held by", a if owner else b, [b if owner else a]


def _excluded(rng: Random, s: Slots) -> Drawn:
    no = rng.random() < 0.5
    text = f"{'None' if no else 'Some'} of the {s['things']} are in the {s['box']}. "
    text += f"Everything in the {s['place']} that is {s['colour']} is in the {s['box']}, and nothing else is. "
    return _yes_no(text + f"Is any of the {s['things']} in the {s['place']} {s['colour']}?", not no)


TEMPLATES: dict[str, dict[str, Template]] = {
    "train": {"oldest": _oldest, "either": _either, "every": _every, "full": _full, "pairs": _pairs},
    "test": {
        "row": _row,
        "converse": _converse,
        "contraposition": _contraposition,
        "three": _three,
        "taller": _taller,
        "weekday": _weekday,
        "liar": _liar,
        "swap": _swap,
        "excluded": _excluded,
    },
}


def draws(split: str) -> dict[str, Draw]:
    """Template -> function that draws an item."""
    return {name: _draw(template) for name, template in TEMPLATES[split].items()}


def _draw(template: Template) -> Callable[[Random], list[Item]]:
    def draw(rng: Random) -> list[Item]:
        text, lead, right, wrong = template(rng, draw_scene(rng))
        candidates, answer = mixed(rng, f" {right}", (f" {w}" for w in wrong))
        prompt = question(text, lead) if lead else question(text, "").rstrip()
        return [Item(prompt, candidates, answer, "logic", "")]

    return draw
