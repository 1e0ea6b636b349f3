"""Arithmetic and logic: every number in an answer is computed."""

from __future__ import annotations

from random import Random

from micro.data.generators.scene import Slots, Template


def _two(rng: Random, _: Slots) -> Slots:
    x, y = rng.sample(range(2, 60), 2)
    x, y = max(x, y), min(x, y)
    z = rng.randint(1, x)
    return {"x": x, "y": y, "z": z, "sum": x + y, "difference": x - y, "rest": x + y - z}


def _product(rng: Random, scene: Slots) -> Slots:
    m, n = rng.randint(2, 12), rng.randint(2, 15)
    return {"m": m, "n": n, "product": m * n, "triple": 3 * n}


def _half(rng: Random, _: Slots) -> Slots:
    half = rng.randint(2, 60)
    return {"half": half, "whole": 2 * half}


def _sequence(rng: Random, _: Slots) -> Slots:
    first, step = rng.randint(1, 30), rng.randint(2, 9)
    return {"row": ", ".join(str(first + i * step) for i in range(4)), "step": step, "next": first + 4 * step}


def _share(rng: Random, _: Slots) -> Slots:
    n, q = rng.randint(3, 9), rng.randint(2, 12)
    r = rng.randint(1, n - 1)
    return {"n": n, "quotient": q, "rest": r, "even": n * q, "uneven": n * q + r}


def _percent(rng: Random, _: Slots) -> Slots:
    percent, tens = rng.choice([10, 20, 25, 50, 75]), rng.randint(1, 9)
    return {"percent": percent, "whole": 20 * tens, "part": 20 * tens * percent // 100}


def _three(rng: Random, _: Slots) -> Slots:
    x, y, z = sorted(rng.sample(range(2, 90), 3), reverse=True)
    return {"x": x, "y": y, "z": z}


def _mean(rng: Random, _: Slots) -> Slots:
    middle, away = rng.randint(10, 50), rng.randint(1, 9)
    return {"x": middle - away, "y": middle + away, "sum": 2 * middle, "middle": middle}


def _clock(rng: Random, _: Slots) -> Slots:
    start, hours = rng.randint(1, 8), rng.randint(1, 4)
    return {"start": start, "hours": hours, "end": start + hours}


def _square(rng: Random, _: Slots) -> Slots:
    side = rng.randint(3, 15)
    return {"side": side, "area": side * side}


def _pack(rng: Random, _: Slots) -> Slots:
    price, count = rng.randint(2, 12), rng.randint(2, 9)
    return {"price": price, "count": count, "cost": price * count, "paid": price * count + 5}


TRAIN = (
    Template(
        "boxes",
        "How many {things} are there in {m} {boxes} of {n}?",
        "{m} {boxes} with {n} {things} each hold {m} times {n}, which is {product} {things}.",
        _product,
    ),
    Template(
        "left",
        "{a} had {x} {things} and gave {y} to {b}. How many are left?",
        "taking {y} away from {x} leaves {difference}, so {a} still has {difference} {things}.",
        _two,
    ),
    Template(
        "altogether",
        "{a} found {x} {things} in the {place} and {y} in the {elsewhere}. How many is that?",
        "{x} and {y} add up to {sum}, so there are {sum} {things} altogether.",
        _two,
    ),
    Template(
        "difference",
        "{a} owns {x} {things} and {b} owns {y}. Who has more?",
        "{x} is larger than {y} by {difference}, so {a} has {difference} {things} more than {b}.",
        _two,
    ),
    Template(
        "every",
        "All {things} in the {place} are {colour}, and this is one of them. What follows?",
        "every one of these {things} is {colour}, and this is one of them, so it must be {colour}.",
    ),
    Template(
        "oldest",
        "{a} is older than {b}, and {b} is older than {c}. Who is the oldest?",
        "{a} comes before {b} and {b} before {c}, so of the three {a} must be the oldest.",
    ),
    Template(
        "halves",
        "What is half of {whole} {things}?",
        "{whole} is twice {half}, so half of the {things} is {half}.",
        _half,
    ),
    Template(
        "sequence",
        "Which number follows {row}?",
        "each number is {step} more than the one before it, so the next number is {next}.",
        _sequence,
    ),
    Template(
        "full",
        "A full {box} holds {x} {things}. This one holds {y}. Is it full?",
        "if the {box} were full it would hold {x} {things}, but it holds {y}, so it cannot be full.",
        _two,
    ),
    Template(
        "pairs",
        "Can {whole} {things} be put in pairs?",
        "{whole} is even, since it is two times {half}, so the {things} make exactly {half} pairs.",
        _half,
    ),
    Template(
        "share",
        "{n} friends share {even} {things}. How many does each get?",
        "{even} divided by {n} is {quotient}, so each of the {n} friends gets {quotient} {things}.",
        _share,
    ),
    Template(
        "percent",
        "{percent} percent of {whole} {things} are {colour}. How many is that?",
        "{percent} percent of {whole} is {part}, so exactly {part} of the {things} are {colour}.",
        _percent,
    ),
    Template(
        "either",
        "The {thing} is either in the {place} or in the {elsewhere}, and it is not in the {place}. Where is it?",
        "one of the two must be true and the {place} is ruled out, so the {thing} is in the {elsewhere}.",
    ),
    Template(
        "steps",
        "{a} has {x} {things}, buys {y} more and sells {z}. How many now?",
        "{x} plus {y} makes {sum}, and {sum} minus {z} makes {rest}, so the result is {rest}.",
        _two,
    ),
)

TEST = (
    Template(
        "remainder",
        "{a} deals {uneven} {things} to {n} people. What remains?",
        "{n} goes into {uneven} {quotient} times, with {rest} left over, so {rest} {things} remain.",
        _share,
    ),
    Template(
        "triple",
        "{a} has {n} {things} and {b} has three times as many. How many has {b}?",
        "three times {n} equals {triple}, hence {b} owns {triple} {things}.",
        _product,
    ),
    Template(
        "transitive",
        "Is {x} greater than {z} if {x} exceeds {y} and {y} exceeds {z}?",
        "since {x} exceeds {y} and {y} exceeds {z}, the first number {x} must exceed {z} as well.",
        _three,
    ),
    Template(
        "average",
        "What is the average of {x} and {y} {things}?",
        "the total of {x} and {y} is {sum}, and half of that is {middle}, so the average is {middle}.",
        _mean,
    ),
    Template(
        "clock",
        "It is {start} o'clock in the {place}. What time is it {hours} hours later?",
        "counting {hours} on from {start} gives {end}, so it will be {end} o'clock.",
        _clock,
    ),
    Template(
        "rows",
        "The {things} stand in {m} rows of {n}. How many are there?",
        "{m} rows of {n} make {product}, so {product} {things} stand there in total.",
        _product,
    ),
    Template(
        "converse",
        "All the {things} are {colour}, and this is {colour}. Is it one of the {things}?",
        "other objects may be {colour} too, so from the colour alone it does not follow that this is one of them.",
    ),
    Template(
        "square",
        "The {things} form a square with {side} on each side. How many are there?",
        "a square of {side} by {side} holds {area}, hence {area} {things} are needed to fill it.",
        _square,
    ),
    Template(
        "change",
        "{a} buys {count} {things} for {price} coins each and pays with {paid}. What does {a_he} get back?",
        "{count} times {price} comes to {cost}, and {paid} less {cost} gives {a} 5 coins back.",
        _pack,
    ),
    Template(
        "contrapositive",
        "Whenever {a} takes the {thing}, {b} is in the {place}. {b} is not in the {place}. What follows?",
        "had {a} taken the {thing}, then {b} would be in the {place}, which is false, hence {a} did not take it.",
    ),
)
