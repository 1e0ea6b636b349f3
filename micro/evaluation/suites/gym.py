"""Tasks of ``reasoning-gym`` with short answers. Its verifiers must accept the right candidate and refuse the others.

Its own tasks are open questions; as forced choices they are easier, and scores here are not its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from micro.errors import require
from micro.evaluation.suites.arithmetic import near_numbers
from micro.evaluation.suites.items import Draw, Item, mixed, question

VERSION = 1
DOMAIN = "logic"
_TRIES = 30

# Task of reasoning-gym -> its configuration: small numbers, short texts.
TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "train": {
        "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 20},
        "leg_counting": {"min_animals": 2, "max_animals": 3, "max_instances": 6},
        "aiw": {},
    },
    "test": {
        "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 4, "max_value": 90},
        "number_sequence": {"min_terms": 4, "max_terms": 5, "max_complexity": 1},
        "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 20},
        "gsm_symbolic": {},
        "syllogism": {},
        "knights_knaves": {"n_people": 2},
        "family_relationships": {"max_family_size": 5},
    },
}


def draws(split: str) -> dict[str, Draw]:
    """Task -> function that draws an item.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
    """
    gym = require("reasoning_gym", "eval", "suite reasoning_gym")
    return {name: _draw(gym, name, options) for name, options in TASKS[split].items()}


def _draw(gym: Any, name: str, options: dict[str, Any]) -> Callable[[Random], list[Item]]:
    def draw(rng: Random) -> list[Item]:
        for _ in range(_TRIES):
            data = gym.create_dataset(name, size=1, seed=rng.randrange(2**31), **options)
            entry = data[0]
            found = _candidates(rng, str(entry["answer"]), entry)
            if found is None:
                continue
            candidates, answer = found
            verdicts = [data.score_answer(c.strip(), entry) for c in candidates]
            if verdicts[answer] == 1.0 and all(v < 1.0 for i, v in enumerate(verdicts) if i != answer):
                text = " ".join(entry["question"].split())
                return [Item(question(text), candidates, answer, "reasoning_gym", "")]
        raise ValueError(f"suite reasoning_gym: {name} gave no usable item in {_TRIES} tries")

    return draw


def _candidates(rng: Random, answer: str, entry: dict[str, Any]) -> tuple[tuple[str, ...], int] | None:
    """Candidates for an answer of a known kind."""
    if answer.isdigit() and answer != "0":
        return near_numbers(rng, int(answer))
    if answer in ("Yes", "No"):
        return mixed(rng, f" {answer}", [" No" if answer == "Yes" else " Yes"])
    task = entry["metadata"].get("source_dataset")
    if task == "knights_knaves":
        return _knights(rng, answer, entry["metadata"])
    if task == "family_relationships":
        return mixed(rng, f" {answer}", (f" {w}" for w in rng.sample([r for r in _RELATIVES if r != answer], 3)))
    return None


_RELATIVES = (
    "mother",
    "father",
    "son",
    "daughter",
    "husband",
    "wife",
    "grandmother",
    "grandfather",
    "sister",
    "brother",
)


def _knights(rng: Random, answer: str, metadata: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """All ways in which people may be knights and knaves, in the words of the answer."""
    terms = metadata["knight_knave_terms"]
    kinds = (terms["a_knight"], terms["a_knave"])
    ways: Sequence[str] = [""]
    for name in metadata["names"]:
        ways = [f"{way}{', and ' if way else ''}{name} is {kind}" for way in ways for kind in kinds]
    wrong = [f"{way}." for way in ways if f"{way}." != answer]
    return mixed(rng, f" {answer}", (f" {w}" for w in wrong))
