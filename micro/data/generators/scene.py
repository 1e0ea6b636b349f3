"""What the sentences of one record talk about: the same people and things in all four domains.

Names, objects, places and small numbers are drawn once per record and used by every domain, so that a content word says
little about the label of the sentence that it stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

# name, he/she, him/her, his/her
PEOPLE = tuple(
    (name, *(("she", "her", "her") if female else ("he", "him", "his")))
    for female, names in (
        (True, "Mia Anna Leila Nora Ines Yuki Clara Fatima Rosa Edith Hana Greta Amara Sofia Vera Petra"),
        (False, "Tom Omar Felix Ravi Jonas Pablo Kofi Emil Hugo Aron Dario Milan Boris Samuel Theo Ivan"),
    )
    for name in names.split()
)


@dataclass(frozen=True)
class Thing:
    """An object with what the four domains need of it: grammar, a container, a material and what that is like."""

    one: str
    many: str
    box: str
    boxes: str
    material: str
    about: str  # of the material: "which ..." must make a true sentence


_MATERIALS = {
    "wood": "comes from the trunks of trees",
    "glass": "is made by melting sand",
    "paper": "is pressed from the fibres of plants",
    "wool": "is shorn from sheep",
    "steel": "is iron with a little carbon in it",
    "clay": "turns hard when it is baked",
    "leather": "is the tanned skin of animals",
    "wax": "melts near a flame",
    "plastic": "is mostly made from oil",
    "cotton": "grows around the seeds of a shrub",
    "rubber": "stretches and jumps back",
    "brass": "is an alloy of copper and zinc",
}
_THINGS = """
pencil pencils box boxes wood; spoon spoons drawer drawers steel; marble marbles bag bags glass
letter letters folder folders paper; scarf scarves basket baskets wool; key keys tin tins brass
bowl bowls crate crates clay; belt belts chest chests leather; candle candles box boxes wax
bottle bottles crate crates glass; shirt shirts suitcase suitcases cotton; ball balls sack sacks rubber
ruler rulers drawer drawers plastic; book books bag bags paper; needle needles tin tins steel
mug mugs basket baskets clay; glove gloves chest chests leather; bell bells box boxes brass
towel towels suitcase suitcases cotton; ladle ladles drawer drawers wood; lens lenses case cases glass
map maps folder folders paper; sock socks basket baskets wool; knife knives tin tins steel
"""


def _thing(entry: str) -> Thing:
    one, many, box, boxes, material = entry.split()
    return Thing(one, many, box, boxes, material, _MATERIALS[material])


THINGS = tuple(_thing(entry) for entry in _THINGS.replace("\n", ";").split(";") if entry.strip())
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey", "orange", "purple")
PLACES = (
    "kitchen",
    "garden",
    "library",
    "school",
    "station",
    "market",
    "office",
    "attic",
    "workshop",
    "museum",
    "hall",
    "cellar",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Slots = dict[str, str | int]


@dataclass(frozen=True)
class Template:
    """A question and its one-sentence answer. `slots` draws what a scene does not hold; both texts may use it."""

    name: str
    question: str
    answer: str
    slots: Callable[[Random, Slots], Slots] | None = None


def draw_scene(rng: Random) -> Slots:
    """The slots that every template may use."""
    people = rng.sample(PEOPLE, 3)
    thing, other = rng.sample(THINGS, 2)
    place, elsewhere = rng.sample(PLACES, 2)
    slots: Slots = {}
    for letter, (name, he, him, his) in zip("abc", people, strict=True):
        slots |= {letter: name, f"{letter}_he": he, f"{letter}_him": him, f"{letter}_his": his}
    slots |= {"thing": thing.one, "things": thing.many, "box": thing.box, "boxes": thing.boxes}
    slots |= {"material": thing.material, "about": thing.about, "other": other.one, "others": other.many}
    slots |= {"place": place, "elsewhere": elsewhere, "colour": rng.choice(COLOURS), "day": rng.choice(DAYS)}
    return slots | {"k": rng.randint(2, 9)}


def fill(template: Template, rng: Random, scene: Slots) -> tuple[str, str]:
    """(question, answer) of one template in one scene, each beginning with a capital letter."""
    slots = scene if template.slots is None else scene | template.slots(rng, scene)
    question, answer = template.question.format_map(slots), template.answer.format_map(slots)
    return question[0].upper() + question[1:], answer[0].upper() + answer[1:]
