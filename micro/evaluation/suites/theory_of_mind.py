"""What people believe: every story of a false belief has a twin in which the belief is true.

Twins differ in who saw or heard what, and so in the right answer; a closing sentence names both places in random
order. "Where it is now", "where it was first" and "what was named last" are each right in half of the items. Stories
about photographs and maps ask for a representation that nobody holds in mind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from micro.data.generators.scene import DAYS, PLACES, Slots, draw_scene
from micro.evaluation.suites.items import Draw, Item

VERSION = 1
DOMAIN = "social"
CONTAINERS = ("box", "basket", "drawer", "cupboard", "suitcase", "bucket", "crate", "jar", "bag", "chest")
BELIEF, PICTURE = ("false belief", "true belief"), ("false picture", "true picture")


@dataclass(frozen=True)
class Story:
    """The two versions of a story. old, new: what was so at first, and what is so now; lead: the answer's beginning."""

    before: str
    false: str  # the change, unseen
    true: str  # the change, seen
    after: str
    lead: str
    old: str
    new: str
    rows: tuple[str, str] = BELIEF


def _closing(rng: Random, old: str, new: str, text: str = "The {0} is large, the {1} is small.") -> str:
    return text.format(*rng.sample([old, new], 2))


def _hides(rng: Random, s: Slots) -> tuple[str, str]:
    old, new = rng.sample(CONTAINERS, 2)
    return old, new


# ---- train ----------------------------------------------------------------------------------------------------------


def _goes_out(rng: Random, s: Slots) -> Story:
    old, new = _hides(rng, s)
    return Story(
        f"{s['a']} puts the {s['thing']} into the {old}.",
        f"{s['a']} goes out. While {s['a_he']} is away, {s['b']} moves it to the {new}. {s['a']} returns.",
        f"{s['b']} moves the {s['thing']} to the {new} while {s['a']} watches. {s['a']} goes out and returns.",
        _closing(rng, old, new),
        f"{s['a']} wants the {s['thing']} and looks for it in the",
        old,
        new,
    )


def _reads_note(rng: Random, s: Slots) -> Story:
    old, new = rng.sample(DAYS, 2)
    return Story(
        f"{s['b']} invites {s['a']} for {old}.",
        f"Then {s['b']} changes the day to {new}, but the note about it is lost and never reaches {s['a']}.",
        f"Then {s['b']} changes the day to {new}, and {s['a']} reads the note about it.",
        _closing(rng, old, new, "It may rain on {0} or on {1}."),
        f"{s['a']} thinks that the visit is on",
        old,
        new,
    )


def _old_photo(rng: Random, s: Slots) -> Story:
    old, new = _hides(rng, s)
    photo, move = f"A photo of the {s['place']} is taken.", f"The {s['thing']} is put into the {new}."
    return Story(
        f"In the {s['place']} the {s['thing']} lies in the {old}.",
        f"{photo} Then {move[0].lower()}{move[1:]}",
        f"{move} Then {photo[0].lower()}{photo[1:]}",
        _closing(rng, old, new),
        f"In the photo the {s['thing']} lies in the",
        old,
        new,
        PICTURE,
    )


# ---- test -----------------------------------------------------------------------------------------------------------


def _asleep(rng: Random, s: Slots) -> Story:
    old, new = _hides(rng, s)
    move = f"{s['b']} takes the {s['thing']} out and hides it in the {new}"
    return Story(
        f"{s['a']} and {s['b']} are in the {s['place']}. {s['a']} lays the {s['thing']} in the {old}.",
        f"{s['a']} falls asleep. {move}. {s['a']} wakes up.",
        f"{move}, and {s['a']} looks on. {s['a']} falls asleep and wakes up.",
        _closing(rng, old, new, "Both the {0} and the {1} are shut."),
        f"{s['a']} believes that the {s['thing']} is in the",
        old,
        new,
    )


def _telephone(rng: Random, s: Slots) -> Story:
    old, new = rng.sample(PLACES, 2)
    return Story(
        f"{s['a']} leaves the {s['thing']} in the {old} and travels to town.",
        f"{s['b']} carries it to the {new} and tells nobody.",
        f"{s['b']} carries it to the {new} and calls {s['a']} to say so.",
        _closing(rng, old, new, "Nobody else was in the {0} or in the {1}."),
        f"{s['a']} would say that the {s['thing']} is in the",
        old,
        new,
    )


def _label(rng: Random, s: Slots) -> Story:
    old, new = str(s["things"]), str(s["others"])
    return Story(
        f"On a closed tin stands the word: {old}.",
        f"{s['b']} has filled it with {new}. {s['a']} sees the tin for the first time and has not opened it.",
        f"{s['b']} has filled it with {new}. {s['a']} sees the tin, opens it, looks inside and shuts it again.",
        _closing(rng, old, new, "{a} likes both {{0}} and {{1}}.".format(a=s["a"])),
        f"{s['a']} thinks that the tin is full of",
        old,
        new,
    )


def _window(rng: Random, s: Slots) -> Story:
    old, new = _hides(rng, s)
    return Story(
        f"{s['b']} shows {s['a']} that the {s['thing']} is in the {old}. Then {s['a']} walks into the garden.",
        f"{s['b']} draws the curtains and puts the {s['thing']} into the {new}.",
        f"Through the window {s['a']} sees how {s['b']} puts the {s['thing']} into the {new}.",
        _closing(rng, old, new, "The {0} stands beside the {1}."),
        f"Back from the garden, {s['a']} first opens the",
        old,
        new,
    )


def _meeting(rng: Random, s: Slots) -> Story:
    old, new = rng.sample(PLACES, 2)
    return Story(
        f"{s['a']} and {s['b']} agree to meet in the {old}.",
        f"Later {s['b']} decides to wait in the {new} instead, but the message to {s['a']} is not delivered.",
        f"Later {s['b']} decides to wait in the {new} instead, and {s['a']} gets the message.",
        _closing(rng, old, new, "The way to the {0} is as long as the way to the {1}."),
        f"To meet {s['b']}, {s['a']} goes to the",
        old,
        new,
    )


def _second_order(rng: Random, s: Slots) -> Story:
    old, new = _hides(rng, s)
    return Story(
        f"{s['b']} watches {s['a']} put the {s['thing']} into the {old}. {s['b']} says goodbye.",
        f"{s['a']} moves it to the {new}. {s['b']} sees that through the keyhole, which {s['a']} does not notice.",
        f"{s['a']} moves it to the {new}. {s['b']} sees that through the open door, and {s['a']} waves.",
        _closing(rng, old, new, "The {0} and the {1} are of the same colour."),
        f"{s['a']} thinks that {s['b']} would look for the {s['thing']} in the",
        old,
        new,
    )


def _rumour(rng: Random, s: Slots) -> Story:
    old, new = str(s["b"]), str(s["c"])
    return Story(
        f"Everybody, {s['a']} too, has heard that {old} broke the {s['thing']}.",
        f"In truth it was {new}, but this is found out only after {s['a']} has left for a long journey.",
        f"In truth it was {new}, and {s['a']} is the first to find out.",
        _closing(rng, old, new, "Neither {0} nor {1} says a word."),
        f"{s['a']} is sure that the {s['thing']} was broken by",
        old,
        new,
    )


def _menu(rng: Random, s: Slots) -> Story:
    old, new = rng.sample(["soup", "rice", "fish", "bread", "salad", "cake"], 2)
    return Story(
        f"In the morning {s['a']} is told that there will be {old} for lunch.",
        f"At noon the cook makes {new}. {s['a']} comes in with eyes shut and has smelled nothing yet.",
        f"At noon the cook makes {new}. {s['a']} has helped to prepare it.",
        _closing(rng, old, new, "{a} eats {{0}} as gladly as {{1}}.".format(a=s["a"])),
        f"{s['a']} expects to be given",
        old,
        new,
    )


def _sketch(rng: Random, s: Slots) -> Story:
    old, new = _hides(rng, s)
    sketch, move = f"{s['a']} makes a sketch of the room", f"the {s['thing']} is moved to the {new}"
    return Story(
        f"The {s['thing']} is in the {old}.",
        f"{sketch}. Afterwards {move}.",
        f"Soon {move}. Afterwards {sketch}.",
        _closing(rng, old, new, "The {0} and the {1} have not been moved."),
        f"The sketch shows the {s['thing']} in the",
        old,
        new,
        PICTURE,
    )


def _map(rng: Random, s: Slots) -> Story:
    old, new = rng.sample(["kitchen", "hall", "attic", "cellar", "office", "bedroom"], 2)
    return Story(
        f"The telephone stood in the {old}.",
        f"A plan of the house was printed, and then the telephone was brought to the {new}.",
        f"The telephone was brought to the {new}, and then a plan of the house was printed.",
        _closing(rng, old, new, "The {0} is next to the {1}."),
        "On the plan the telephone is in the",
        old,
        new,
        PICTURE,
    )


TEMPLATES: dict[str, dict[str, Callable[[Random, Slots], Story]]] = {
    "train": {"goes_out": _goes_out, "reads_note": _reads_note, "old_photo": _old_photo},
    "test": {
        "asleep": _asleep,
        "telephone": _telephone,
        "label": _label,
        "window": _window,
        "meeting": _meeting,
        "second_order": _second_order,
        "rumour": _rumour,
        "menu": _menu,
        "sketch": _sketch,
        "map": _map,
    },
}


def draws(split: str) -> dict[str, Draw]:
    """Template -> function that draws a story and its twin."""
    return {name: _draw(template) for name, template in TEMPLATES[split].items()}


def _draw(template: Callable[[Random, Slots], Story]) -> Callable[[Random], list[Item]]:
    def draw(rng: Random) -> list[Item]:
        story = template(rng, draw_scene(rng))
        candidates = (f" {story.old}", f" {story.new}")
        return [
            Item(f"{story.before} {change} {story.after} {story.lead}", candidates, answer, row, "")
            for change, answer, row in ((story.false, 0, story.rows[0]), (story.true, 1, story.rows[1]))
        ]

    return draw
