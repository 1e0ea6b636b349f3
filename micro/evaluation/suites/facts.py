"""Facts of everyday knowledge as sentences to complete, from own tables. Wrong answers come from the same column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from micro.evaluation.suites.items import Draw, Item, mixed

VERSION = 1
DOMAIN = "world"
WRONG = 3


@dataclass(frozen=True)
class Relation:
    """Sentences with one gap at their end. begin: of the sentence, with {} for the subject; pairs: subject, object."""

    begin: str
    pairs: tuple[tuple[str, str], ...]


def _table(begin: str, text: str) -> Relation:
    pairs = [entry.split(":") for entry in " ".join(text.split()).split(";") if entry.strip()]
    return Relation(begin, tuple((a.strip(), b.strip()) for a, b in pairs))


RELATIONS: dict[str, dict[str, Relation]] = {
    "train": {
        "capital": _table(
            "The capital of {} is",
            """France: Paris; Japan: Tokyo; Kenya: Nairobi; Peru: Lima; Norway: Oslo; Egypt: Cairo; Thailand: Bangkok;
            Poland: Warsaw; Ghana: Accra; Hungary: Budapest; Vietnam: Hanoi; Morocco: Rabat; Italy: Rome; Spain: Madrid;
            Russia: Moscow; China: Beijing; Cuba: Havana; Greece: Athens; Sweden: Stockholm; Germany: Berlin""",
        ),
        "workplace": _table(
            "You would most likely meet a {} in a",
            """surgeon: hospital; judge: court; teacher: school; waiter: restaurant; librarian: library; pilot: plane;
            sailor: ship; priest: church; baker: bakery; cashier: shop; farmer: field; soldier: barracks""",
        ),
        "material": _table(
            "{} is made from",
            """Paper: wood; Bread: flour; Cheese: milk; Glass: sand; Leather: skin; Wine: grapes;
            Steel: iron; Concrete: cement; Beer: barley; Silk: cocoons; Porcelain: clay""",
        ),
        "colour": _table(
            "The usual colour of {} is",
            """snow: white; grass: green; coal: black; blood: red; a lemon: yellow; a clear sky: blue; a carrot: orange;
            chocolate: brown; a plum: purple; ash: grey""",
        ),
    },
    "test": {
        "continent": _table(
            "{} is a country in",
            """France: Europe; Japan: Asia; Kenya: Africa; Norway: Europe; Egypt: Africa; Thailand: Asia;
            Poland: Europe; Ghana: Africa; Vietnam: Asia; Morocco: Africa; Brazil: South America; Peru: South America;
            Chile: South America; Canada: North America; Mexico: North America; India: Asia; Italy: Europe""",
        ),
        "language": _table(
            "Most people in {} speak",
            """France: French; Japan: Japanese; Germany: German; Brazil: Portuguese; Mexico: Spanish; Italy: Italian;
            Russia: Russian; China: Chinese; Greece: Greek; Turkey: Turkish; Egypt: Arabic; Sweden: Swedish;
            Poland: Polish; Hungary: Hungarian; Australia: English; Finland: Finnish""",
        ),
        "young": _table(
            "A young {} is called a",
            """dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; bear: cub; goat: kid; pig: piglet;
            frog: tadpole; duck: duckling; goose: gosling; kangaroo: joey; hen: chick""",
        ),
        "season": _table(
            "In Europe the month of {} belongs to",
            """January: winter; February: winter; April: spring; May: spring; July: summer; August: summer;
            October: autumn; November: autumn""",
        ),
        "tool": _table(
            "What you need most to {} is a",
            """drive in a nail: hammer; cut paper: pair of scissors; sweep the floor: broom; dig a hole: spade;
            measure the temperature: thermometer; see distant stars: telescope; saw through a plank: saw;
            lock a door: key; tell the time: clock; eat soup: spoon; paint a wall: brush; light a candle: match;
            weigh flour: scale; find north: compass; open a bottle of wine: corkscrew""",
        ),
        "group": _table(
            "{} belong to the",
            """Eagles: birds; Salmon: fish; Ants: insects; Whales: mammals; Frogs: amphibians; Snakes: reptiles;
            Penguins: birds; Sharks: fish; Bees: insects; Bats: mammals; Newts: amphibians; Lizards: reptiles;
            Owls: birds; Beetles: insects; Dolphins: mammals; Crocodiles: reptiles""",
        ),
        "organ": _table(
            "In the body, the task of the {} is to",
            """heart: pump blood; lungs: take up oxygen; stomach: digest food; eyes: see; ears: hear; nose: smell;
            teeth: chew; brain: think; legs: walk; kidneys: filter waste; skin: keep germs out; tongue: taste""",
        ),
        "number": _table(
            "The number of {} is",
            """legs of a spider: eight; wheels of a bicycle: two; days of a week: seven; months of a year: twelve;
            sides of a triangle: three; legs of an insect: six; strings of a violin: four; minutes of an hour: sixty;
            fingers of a hand: five; letters of the English alphabet: twenty-six; hours of a day: twenty-four""",
        ),
        "opposite_season": _table(
            "While it is {0} in Norway, in Argentina it is",
            "winter: summer; summer: winter; spring: autumn; autumn: spring",
        ),
        "fame": _table(
            "{} is best known as a",
            """Marie Curie: chemist; Ludwig van Beethoven: composer; William Shakespeare: playwright;
            Vincent van Gogh: painter; Charles Darwin: naturalist; Neil Armstrong: astronaut; Plato: philosopher;
            Napoleon: general; Florence Nightingale: nurse; Muhammad Ali: boxer; Agatha Christie: novelist""",
        ),
    },
}


def draws(split: str) -> dict[str, Draw]:
    """Relation -> function that draws an item."""
    return {name: _draw(relation) for name, relation in RELATIONS[split].items()}


def _draw(relation: Relation) -> Callable[[Random], list[Item]]:
    objects = sorted({b for _, b in relation.pairs})

    def draw(rng: Random) -> list[Item]:
        subject, right = rng.choice(relation.pairs)
        others = [b for b in objects if b != right]
        wrong = rng.sample(others, min(WRONG, len(others)))
        candidates, answer = mixed(rng, f" {right}", (f" {w}" for w in wrong))
        return [Item(relation.begin.format(subject), candidates, answer, "facts", "")]

    return draw
