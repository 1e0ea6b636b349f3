"""Labelled answers and chats from our own templates (ecosystem.md 17): no model, no file, the same for the same seed.

Every answer is made of sentences, one span each, drawn from the asked domains; training and held-out answers share no
template. The domains share people, things and numbers, so that content words alone do not give a label away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from micro.data.chat import Chat
from micro.data.generators import language, logic, social, world
from micro.data.generators.scene import Slots, Template, draw_scene, fill
from micro.data.records import Record, Span
from micro.errors import choices
from micro.experts import LABELS, NAMES

TEMPLATES: dict[str, dict[str, tuple[Template, ...]]] = {
    name: {"train": module.TRAIN, "test": module.TEST}
    for name, module in zip(NAMES, (logic, social, world, language), strict=True)
}
_LABEL = dict(zip(NAMES, LABELS, strict=True))
_INTROS = (
    "",
    "",
    "Please answer in order. ",
    "A few short questions. ",
    "Answer one after the other. ",
    "Help me out. ",
)
# Some openers hold a name: otherwise people would stand in answers of two domains only.
_OPENERS = (
    ("First: ", "To begin: ", "For {a}: ", ""),
    ("Then: ", "Next: ", "For {b}: ", "Also: ", ""),
    ("Finally: ", "Last: ", "For {c}: ", ""),
)
_JOINS = (" ", " ", " ", "\n", "\n\n")
_SYSTEMS = ("You answer briefly.", "You are a helpful assistant.", "Answer in plain words.")
_TRIES = 200  # draws that may repeat an earlier record before the templates count as used up


def generate(
    n: int,
    *,
    domains: Sequence[str] = NAMES,
    split: str = "train",
    seed: int = 0,
) -> list[Record]:
    """N labelled answers of three to five sentences, no two alike (model.md 6.8).

    domains: expert names to draw sentences from; each sentence is one span with its domain's label. split: "train" or
    "test"; the two share no template. The first n of a longer list are the same. `Record.meta` names the templates.
    ValueError: an unknown domain or split, a negative n, or more records than the templates hold.
    """
    _check(n, domains, split)
    return list(_distinct(n, "records", domains, split, seed))


def generate_chat(n: int, *, domains: Sequence[str] = NAMES, split: str = "train", seed: int = 0) -> list[Chat]:
    """N conversations without labels, of one to three turns, for a short third stage without downloads.

    Arguments and errors as in :func:`generate`; made from the same templates, with other framing.
    """
    _check(n, domains, split)
    chats, seen = [], set()
    for index in range(n):
        for attempt in range(_TRIES):
            chat = _chat(_rng("chat", split, seed, index, attempt), domains, split, index)
            key = "\0".join(m["content"] for m in chat.messages)
            if key not in seen:
                break
        else:
            raise ValueError(f"generate_chat: the templates do not hold {n} different conversations")
        seen.add(key)
        chats.append(chat)
    return chats


def _check(n: int, domains: Sequence[str], split: str) -> None:
    if isinstance(domains, str):
        raise TypeError(f"generate: domains must be a list of names, got the string {domains!r}")
    if n < 0:
        raise ValueError(f"generate: n must not be negative, got {n}")
    if split not in ("train", "test"):
        raise ValueError(f"generate: split must be 'train' or 'test', got {split!r}")
    if not domains:
        raise ValueError("generate: give at least one domain")
    for name in domains:
        if name not in TEMPLATES:
            raise ValueError(f"generate: unknown domain {name!r}; {choices(name, TEMPLATES)}")


def _rng(kind: str, split: str, seed: int, index: int, attempt: int) -> Random:
    return Random(f"micro {kind} {split} {seed} {index} {attempt}")  # a string is hashed the same way everywhere


def _distinct(n: int, kind: str, domains: Sequence[str], split: str, seed: int) -> Iterator[Record]:
    seen: set[str] = set()
    for index in range(n):
        for attempt in range(_TRIES):
            record = _record(_rng(kind, split, seed, index, attempt), domains, split)
            if record.assistant not in seen:
                break
        else:
            raise ValueError(
                f"generate: the templates of {', '.join(domains)} ({split}) do not hold {n} different answers"
            )
        seen.add(record.assistant)
        yield record


def _plan(rng: Random, domains: Sequence[str], split: str, count: int) -> list[tuple[str, Template]]:
    """`count` different templates, the domains as evenly as they go, in random order."""
    order = rng.sample(list(domains), len(domains))
    names = [order[i % len(order)] for i in range(count)]
    rng.shuffle(names)
    pools = {name: rng.sample(TEMPLATES[name][split], len(TEMPLATES[name][split])) for name in order}
    return [(name, pools[name].pop()) for name in names]


def _record(rng: Random, domains: Sequence[str], split: str) -> Record:
    scene = draw_scene(rng)
    plan = _plan(rng, domains, split, rng.randint(3, 5))
    pairs = [fill(template, rng, scene) for _, template in plan]
    answer, spans = "", []
    with_openers, join = rng.random() < 0.4, rng.choice(_JOINS)
    for i, ((name, _), (_, sentence)) in enumerate(zip(plan, pairs, strict=True)):
        if i:
            answer += join
        start = len(answer)
        place = 0 if i == 0 else 2 if i == len(plan) - 1 else 1
        answer += (rng.choice(_OPENERS[place]).format_map(scene) if with_openers else "") + sentence
        spans.append(Span(start, len(answer), _LABEL[name]))
    prompt = rng.choice(_INTROS) + " ".join(question for question, _ in pairs)
    names = [f"{name}.{template.name}" for name, template in plan]
    dataset = "generated" if len(set(domains)) > 1 else f"generated-{domains[0]}"
    return Record(prompt, answer, spans, dataset, {"templates": names, "split": split})


def _chat(rng: Random, domains: Sequence[str], split: str, index: int) -> Chat:
    scene = draw_scene(rng)
    turns = rng.choices((1, 2, 3), weights=(6, 3, 1))[0]
    sizes = [rng.randint(1, 2) for _ in range(turns)]
    pairs = [fill(t, rng, scene) for _, t in _plan(rng, domains, split, sum(sizes))]
    messages: list[dict[str, str]] = []
    if rng.random() < 0.25:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
    for size in sizes:
        asked, pairs = pairs[:size], pairs[size:]
        messages.append({"role": "user", "content": " ".join(question for question, _ in asked)})
        messages.append({"role": "assistant", "content": " ".join(sentence for _, sentence in asked)})
    return Chat(messages, f"generated-{split}-{index}", "generated")


__all__ = ["TEMPLATES", "Slots", "Template", "generate", "generate_chat"]
