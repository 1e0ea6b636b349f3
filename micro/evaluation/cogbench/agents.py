"""Who answers the questions: a language model, or chance. Anything with ``name`` and ``answer`` is an agent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from micro.analysis.fingerprints import comparable, model_fingerprint, open_session
from micro.analysis.modes import evaluating
from micro.evaluation.cogbench.experiment import Query
from micro.evaluation.cogbench.step_by_step import REASONING_TOKENS, Reasoned
from micro.modeling.controls import ACTIVE, Phases

ANSWER_TOKENS = 2  # behind a forced beginning
Ended = Callable[[int, list[int]], bool]  # (row, tokens of its reply so far)
# (prompts, runs, length, ended) -> tokens
Complete = Callable[[list[list[int]], Sequence[int], int, Ended | None], list[list[int]]]


@runtime_checkable
class Agent(Protocol):
    """Completes prompts. With an attribute ``batch_size``, so many runs are played side by side, else all."""

    name: str  # with what tells it from others, for resuming

    def answer(self, queries: Sequence[Query], runs: Sequence[int]) -> list[str]:
        """Continuations of ``query.text``, one per query; ``runs``: the run that each query belongs to."""
        ...


class RandomAgent:
    """Options at random, numbers uniform over .01 to .99.

    Draws depend on seed, experiment and run alone, so that a run that was stopped goes on as if it had not been.
    """

    def __init__(self, seed: int = 0) -> None:
        self.name = f"random agent, seed {seed}"
        self._seed, self._experiment = seed, 0
        self._generators: dict[int, np.random.Generator] = {}

    def begin(self, experiment: int) -> None:
        """Before the first question of an experiment, by its position in the protocol."""
        self._experiment, self._generators = experiment, {}

    def answer(self, queries: Sequence[Query], runs: Sequence[int]) -> list[str]:
        return [query.reply(query.guess(self._of(run))) for query, run in zip(queries, runs, strict=True)]

    def _of(self, run: int) -> np.random.Generator:
        if run not in self._generators:
            # 0 and 1 in the last place: environment and unreadable replies (``play``).
            self._generators[run] = np.random.default_rng([self._seed, self._experiment, run, 2])
        return self._generators[run]


class ModelAgent:
    """A causal language model that completes text greedily.

    Args:
        model: a MiCRo model, or any causal model of transformers.
        tokenizer: its tokenizer; no chat template is used.
        batch_size: prompts that are completed together; so many runs are played side by side.
        max_new_tokens: length of a reply; default 2, and 350 for one that reasons. Such a reply stops at its final
            answer; where that is missing in the end, it is asked for with two more tokens, if they fit.
        engine: complete with the C++ engine, same tokens as the model; default: where the model has one and is on the
            CPU. Inside ``model.intervene`` the model itself answers.
        controls: steering arguments of every call, ``{"ablate": "social"}`` say.
        trailing_space: keep the space at the end of a forced beginning ("Machine "), as published. Most tokenizers make
            a letter and the space before it one token: after a space of its own such a model goes on with a digit or
            starts a line, and hardly a reply can be read. Without it the model writes the space itself.

    Raises:
        TypeError: ``tokenizer`` is missing.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        engine: bool | None = None,
        controls: Mapping[str, Any] | None = None,
        trailing_space: bool = False,
    ) -> None:
        if tokenizer is None:
            raise TypeError("cogbench: tokenizer is missing; pass the tokenizer of the model, or an agent as the model")
        if batch_size < 1:
            raise ValueError(f"cogbench: batch_size must be at least 1, got {batch_size}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.controls = dict(controls or {})
        self._trailing_space = trailing_space
        self.name = _fingerprint(model, self.controls)
        wanted = hasattr(model, "engine") and model.device.type == "cpu" if engine is None else engine
        self._reader = _Reader(model, self.controls) if wanted else None
        self._limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    def check_keepable(self) -> None:
        """Whether :attr:`name` says what decides the answers, so that a table may be kept under it.

        Raises:
            ValueError: a block of ``model.intervene`` is open.
            TypeError: a control is a function.
        """
        _plain(self.controls)
        if open_session(self.model) is not None:
            raise ValueError(
                "cogbench: a block of model.intervene is open, and tables in output would later be taken for some that "
                "were played without it; leave out output and save the result somewhere else"
            )

    def answer(self, queries: Sequence[Query], runs: Sequence[int]) -> list[str]:
        texts = [query.text if self._trailing_space else query.text.rstrip(" ") for query in queries]
        ids = [list(self.tokenizer(text)["input_ids"]) for text in texts]
        longest = max(map(len, ids))
        length = self._length(queries)
        if self._limit is not None and longest + length > self._limit:
            raise ValueError(
                f"cogbench: a prompt has {longest} tokens, the model reads {self._limit} at most, its reply included; "
                "leave this experiment out (experiments=...)"
            )
        replies: list[str] = []
        for start in range(0, len(ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            # The engine does not meet the actions of a block.
            reader = self._reader if open_session(self.model) is None else None
            complete = self._generate if reader is None else reader.complete
            found = complete(ids[part], runs[part], length, self._ended(queries[part]))
            texts = [self._text(reply) for reply in found]
            replies += self._finished(queries[part], runs[part], ids[part], texts, complete)
        return replies

    def _length(self, queries: Sequence[Query]) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return REASONING_TOKENS if any(isinstance(query, Reasoned) for query in queries) else ANSWER_TOKENS

    def _finished(
        self,
        queries: Sequence[Query],
        runs: Sequence[int],
        prompts: list[list[int]],
        replies: list[str],
        complete: Complete,
    ) -> list[str]:
        """Replies that reason, with a final answer where it was missing and fits."""
        begun: dict[int, str] = {}
        # Rows that need nothing go along with their prompts: the engine drops a row that is left out.
        room = None if self._limit is None else max(self._limit - ANSWER_TOKENS, 1)
        ids = [prompt[:room] for prompt in prompts]
        for row, (query, reply) in enumerate(zip(queries, replies, strict=True)):
            if isinstance(query, Reasoned) and query.read(reply) is None:
                text = query.begun(reply)
                tokens = list(self.tokenizer(query.text + text)["input_ids"])
                if room is None or len(tokens) <= room:
                    ids[row], begun[row] = tokens, text
        if not begun:
            return replies
        found = complete(ids, runs, ANSWER_TOKENS, None)
        return [begun[row] + self._text(found[row]) if row in begun else reply for row, reply in enumerate(replies)]

    def _text(self, reply: list[int]) -> str:
        return str(self.tokenizer.decode(reply, skip_special_tokens=True))

    def _ended(self, queries: Sequence[Query]) -> Ended | None:
        """Whether the reply in a row is over before its last token; None where no reply can be."""
        if not any(isinstance(query, Reasoned) for query in queries):
            return None
        return lambda row, reply: queries[row].ended(self._text(reply))

    def _generate(
        self, prompts: list[list[int]], runs: Sequence[int], length: int, ended: Ended | None
    ) -> list[list[int]]:
        """Of the model itself, with padding on the left."""
        width = max(map(len, prompts))
        padding = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.model.device)
        with evaluating(self.model):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=length,
                do_sample=False,
                pad_token_id=padding,
                **({} if ended is None else {"stopping_criteria": [_criterion(ended, width, len(prompts))]}),
                **self.controls,
            )
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


def _criterion(ended: Ended, width: int, rows: int) -> Any:
    """For transformers: which rows are over, bool [B]; prompts are ``width`` wide."""
    over = torch.zeros(rows, dtype=torch.bool)

    def check(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        for row, reply in enumerate(ids[:, width:].tolist()):
            over[row] = bool(over[row]) or ended(row, reply)
        return over.to(ids.device)

    return check


class _Reader:
    """The engine, which reads of each prompt only what differs from the last prompt of the same run.

    Prompts of a run share their beginning and grow by a line per trial: without this, a run of n trials reads n² lines.
    """

    def __init__(self, model: Any, controls: Mapping[str, Any]) -> None:
        self._engine = model.engine()
        self._controls = dict(controls)
        self._stops = _stop_ids(model)
        self._read: dict[int, list[int]] = {}  # run -> tokens that its row holds; rows stand in this order
        self._steered = ACTIVE.get()  # the blocks under which they were read

    def complete(
        self, prompts: list[list[int]], runs: Sequence[int], length: int, ended: Ended | None
    ) -> list[list[int]]:
        """Greedy continuations, each ending with a stop token, where it is over, or after ``length`` tokens."""
        logits = self._engine.prefill(self._unread(prompts, runs), **self._controls).logits
        replies: list[list[int]] = [[] for _ in prompts]
        open_rows = [True] * len(prompts)
        for step in range(length):
            tokens = logits.reshape(len(prompts), -1).argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                if open_rows[row]:
                    replies[row].append(token)
                    open_rows[row] = token not in self._stops and not (ended and ended(row, replies[row]))
            if step + 1 == length or not any(open_rows):
                break
            logits = self._engine.decode(tokens, **self._controls).logits
            for run, token in zip(runs, tokens.tolist(), strict=True):
                self._read[run].append(token)
        return replies

    def _unread(self, prompts: list[list[int]], runs: Sequence[int]) -> list[list[int]]:
        """Bring the engine's rows to the common beginnings; what is left of each prompt, at least one token."""
        if self._steered is not ACTIVE.get() or not set(runs) <= set(self._read):
            self._engine.reset()
            self._steered = ACTIVE.get()
            self._read = dict(zip(runs, map(list, prompts), strict=True))
            return prompts
        rows = list(self._read)
        if rows != list(runs):
            self._engine.select([rows.index(run) for run in runs])
        left = []
        for row, (run, prompt) in enumerate(zip(runs, prompts, strict=True)):
            same = _common(self._read[run], prompt[:-1])
            self._engine.truncate(same, row)
            left.append(prompt[same:])
        self._read = dict(zip(runs, map(list, prompts), strict=True))
        return left


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _stop_ids(model: Any) -> set[int]:
    found: set[int] = set()
    for holder in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        ids = getattr(holder, "eos_token_id", None)
        found |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return found


def _fingerprint(model: Any, controls: Mapping[str, Any]) -> str:
    """Class, a hash over the config and the bits of all parameters, and the controls: what decides the answers."""
    try:
        told = f", {json.dumps(_plain(controls), sort_keys=True)}" if controls else ""
    except TypeError:
        told = f", {dict(controls)}"
    return f"{type(model).__name__} {model_fingerprint(model)[:16]}{told}"


def _plain(controls: Mapping[str, Any]) -> Any:
    """Controls as JSON types, tensors by their content; TypeError for what cannot be compared between runs."""
    phases = {name: {"phases": vars(value)} for name, value in controls.items() if isinstance(value, Phases)}
    return comparable({**controls, **phases})
