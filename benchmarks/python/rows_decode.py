"""Decoding: loop over forward, generate() and engine, over the official way, the dense model and bandwidth (G3, G4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

from engine import EngineDecode, open_engine
from experiment import BF16, Experiment, MissingError, Table, wants
from goals import Line, Skipped
from jobs import Decode, Generate
from lab import Lab, Models, Side
from machine import StreamProbe
from outputs import compare
from shapes import SMOLLM2_135M, prompt

NEW = 64  # tokens
DENSE = "dense transformers, sdpa"


def new_tokens(lab: Lab) -> int:
    return 4 if lab.options.quick else NEW


def engines(lab: Lab, models: Models, ids: Any) -> tuple[dict[str, Side], str]:
    """The engine in both numerics modes, or nothing and the reason."""
    try:
        lab.say("packing weights for the engine")
        made = {"engine": open_engine(models.ours), "engine fast": open_engine(models.ours, numerics="fast")}
        return {name: EngineDecode(engine, ids, new_tokens(lab)) for name, engine in made.items()}, ""
    except MissingError as missing:
        return {}, str(missing)


def decode(lab: Lab, keys: int) -> Iterator[Line | Skipped]:
    """64 tokens behind a prompt; every side gives the same greedy tokens."""
    models = lab.models(SMOLLM2_135M, BF16)
    ids, new = prompt(models.shape, lab.size(keys)), new_tokens(lab)
    sides: dict[str, Side] = {}
    sides["forward"], sides["generate"] = Decode(models.ours, ids, new), Generate(models.ours, ids, new)
    sides["forward fast"] = Decode(models.fast, ids, new)
    engine, why = engines(lab, models, ids)
    sides |= engine
    if wants(lab, "G3/512/forward"):
        sides["their forward"] = lab.reference(models, "decode", ids, new=new)
        sides["their generate"] = lab.reference(models, "generate", ids, new=new)
    over_dense = keys == 512 and wants(lab, "G3b/forward")
    compared = same_tokens(sides, models)
    if over_dense:
        sides["dense forward"], sides["dense generate"] = (kind(models.dense, ids, new) for kind in (Decode, Generate))
        compared |= forced_tokens(models, ids, new)
    table = Table(lab, lab.rounds({name: side.seconds for name, side in sides.items()}))
    for way, other in (("forward", "forward"), ("generate", "generate"), ("engine", "forward")):
        goals = []
        if f"their {other}" in sides:
            goals.append((f"G3/{keys}/{way}", f"their {other}", lab.reference_name))
        if f"dense {other}" in sides:
            goals.append((f"G3b/{way}", f"dense {other}", DENSE))
        for key, theirs, against in goals:
            if way in sides:
                yield table.line(key, way, theirs, against, compared, fast=f"{way} fast", note=f"{new} tokens")
            else:
                yield Skipped(key, why)


def same_tokens(sides: dict[str, Side], models: Models) -> dict[str, float]:
    """Greedy tokens of all sides against those of the first."""
    found: dict[str, float] = {}
    first, *others = sides
    want = sides[first].outputs()
    for name in others:
        found |= {f"{name} tokens": compare(name, sides[name].outputs(), want, models.dtype)["tokens"]}
    return found


def forced_tokens(models: Models, ids: Any, new: int) -> dict[str, float]:
    """The dense model against ours with every token forced to expert 0."""
    forced = Decode(models.ours, ids, new, {"force": models.ours.config.expert_names[0]}).outputs()
    want = Decode(models.dense, ids, new).outputs()
    return {"dense tokens, forced to expert 0": compare("forced against dense", forced, want, models.dtype)["tokens"]}


def batched(lab: Lab) -> Iterator[Line | Skipped]:
    """Eight rows with 128 keys each."""
    models = lab.models(SMOLLM2_135M, BF16)
    ids, new = prompt(models.shape, lab.size(128), rows=8), new_tokens(lab)
    sides: dict[str, Side] = {"forward": Decode(models.ours, ids, new), "forward fast": Decode(models.fast, ids, new)}
    engine, why = engines(lab, models, ids)
    sides |= engine
    sides["theirs"] = lab.reference(models, "decode", ids, new=new)
    compared = same_tokens(sides, models)
    table = Table(lab, lab.rounds({name: side.seconds for name, side in sides.items()}))
    for way in ("forward", "engine"):
        if way in sides:
            rate = 8 * new / table.rounds.median(way)
            note = f"{rate:.0f} row tokens/s"
            yield table.line(f"G3c/{way}", way, "theirs", lab.reference_name, compared, fast=f"{way} fast", note=note)
        else:
            yield Skipped(f"G3c/{way}", why)


def bandwidth(lab: Lab) -> Iterator[Line | Skipped]:
    """Bytes that a token needs, times tokens per second, over what a plain read of memory gives in the same round."""
    models = lab.models(SMOLLM2_135M, BF16)
    ids, new = prompt(models.shape, lab.size(512)), new_tokens(lab)
    sides: dict[str, Side] = {"forward": Decode(models.ours, ids, new), "forward fast": Decode(models.fast, ids, new)}
    engine, why = engines(lab, models, ids)
    sides |= engine
    compared = same_tokens(sides, models)
    with closing(StreamProbe(lab.options.threads)) as probe:
        timed = {name: side.seconds for name, side in sides.items()}
        table = Table(lab, lab.rounds(timed | {"stream": probe.seconds}))
    for way, lazy in (("forward", False), ("engine", True)):
        if way not in sides:
            yield Skipped(f"G4/{way}", why)
            continue
        needed = models.shape.decode_bytes(ids.shape[1] + new // 2, lazy=lazy)
        note = f"{needed / 1e6:.0f} MB a token ({'lazy' if lazy else 'eager'} keys and values)"
        note += f", {new / table.rounds.median(way):.1f} tokens/s"
        read = f"{1 / table.rounds.median('stream'):.1f} GB/s"
        factor = needed * new / 1e9
        line = table.line(
            f"G4/{way}", way, "stream", "stream read", compared, fast=f"{way} fast", factor=factor, note=note
        )
        line.theirs = read
        yield line


def _goals(keys: int) -> tuple[str, ...]:
    over_dense = ("G3b/forward", "G3b/generate", "G3b/engine") if keys == 512 else ()
    return (*(f"G3/{keys}/{way}" for way in ("forward", "generate", "engine")), *over_dense)


EXPERIMENTS = [
    Experiment("decode_512", _goals(512), 7, partial(decode, keys=512)),
    Experiment("decode_4096", _goals(4096), 15, partial(decode, keys=4096)),
    Experiment("decode_8_rows", ("G3c/forward", "G3c/engine"), 7, batched),
    Experiment("decode_bandwidth", ("G4/forward", "G4/engine"), 1, bandwidth),
]
