"""Memory (G10): every side in a fresh process, peak of resident bytes above what its weights take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from experiment import BF16, Experiment
from goals import Line, Skipped
from lab import Lab
from official import Official
from outputs import compare
from paired import Ratio
from shapes import SMOLLM2_135M, prompt

PROMPT, NEW, TRAINED = 4096, 64, 2048  # tokens


def once(value: float) -> Ratio:
    """Bytes do not scatter as times do: one measurement."""
    return Ratio(value, value, value, value)


def measure(lab: Lab, side: str) -> dict[str, Any]:
    """What memory_side.py prints for one side; {"missing": ...} where this build does not have it."""
    lab.say(f"measuring {side}")
    sizes = [lab.size(PROMPT), 4 if lab.options.quick else NEW, lab.size(TRAINED)]
    command = [sys.executable, str(Path(__file__).with_name("memory_side.py")), side, *map(str, sizes)]
    done = subprocess.run(
        [*command, str(lab.options.threads), "quick" if lab.options.quick else "full"],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"memory_side.py {side} ended with status {done.returncode}; its messages stand above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def reference(lab: Lab, side: str) -> dict[str, Any]:
    """The official side: a worker of its own where there is a copy of the classes, the stand-in otherwise."""
    if lab.official is None:
        return measure(lab, f"all_experts_{side}")
    lab.say(f"measuring the official classes, {side}")
    options, models = lab.options, lab.models(SMOLLM2_135M, BF16)
    assert options.official is not None
    worker = Official(options.official, options.official_python, options.official_revision, options.threads)
    worker.load(models.ours)
    kind = {"loop": "whole_decode", "generate": "whole_generate", "training": "accumulate"}[side]
    new = {} if side == "training" else {"new": 4 if options.quick else NEW}
    for tokens in (8, lab.size(TRAINED if side == "training" else PROMPT)):
        job = worker.job(kind, prompt(models.shape, tokens), **new)
        if tokens == 8:
            job.seconds()  # libraries allocate what they keep
    peak = job.peak_bytes()
    outputs = {name: tensor.tolist() for name, tensor in job.outputs().items()}
    worker.close()
    return {"bytes": peak, "outputs": outputs}


def generation(lab: Lab) -> Iterator[Line | Skipped]:
    """A prompt of 4 k tokens and 64 new ones."""
    lab.release()
    theirs = {way: reference(lab, way) for way in ("loop", "generate")}
    ours = {way: measure(lab, way) for way in ("generate", "generate_chunked", "engine")}
    for key, way, other in (
        ("G10/engine", "engine", "loop"),
        ("G10/generate", "generate", "loop"),
        ("G10/generate/chunked", "generate_chunked", "loop"),
        ("G10/all_logits", "engine", "generate"),
    ):
        yield _line(lab, key, ours[way], theirs[other])


def training(lab: Lab) -> Iterator[Line | Skipped]:
    """Activations, logits and working memory of forward + backward; weights and gradients are there before."""
    lab.release()
    theirs = reference(lab, "training")
    yield _line(lab, "G10/training", measure(lab, "training"), theirs)


def loading(lab: Lab) -> Iterator[Line | Skipped]:
    """The engine reads a folder: resident peak, mapped files included, over the bytes of its packed weights."""
    lab.release()
    found = measure(lab, "load")
    if "missing" in found:
        yield Skipped("G10/load", found["missing"])
        return
    value = once(found["bytes"] / found["packed"])
    yield Line("G10/load", value, _words(found["bytes"]), _words(found["packed"]), "packed weights", {})


def _line(lab: Lab, key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Line | Skipped:
    if "missing" in ours:
        return Skipped(key, ours["missing"])
    got, want = ({n: torch.tensor(v) for n, v in side["outputs"].items()} for side in (ours, theirs))
    compared = compare(key, got, want, BF16)
    value = once(ours["bytes"] / theirs["bytes"])
    return Line(key, value, _words(ours["bytes"]), _words(theirs["bytes"]), lab.reference_name, compared)


def _words(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


EXPERIMENTS = [
    Experiment(
        "memory_generation", ("G10/engine", "G10/generate", "G10/generate/chunked", "G10/all_logits"), 3, generation
    ),
    Experiment("memory_training", ("G10/training",), 2, training),
    Experiment("memory_loading", ("G10/load",), 0.3, loading),
]
