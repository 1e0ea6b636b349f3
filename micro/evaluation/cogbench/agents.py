"""Who answers the questions: a language model, or chance. Anything with ``name`` and ``answer`` is an agent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from micro.evaluation.cogbench.experiment import Query


@runtime_checkable
class Agent(Protocol):
    """Completes prompts."""

    name: str  # with what tells it from others, for resuming

    def answer(self, queries: Sequence[Query], runs: Sequence[int]) -> list[str]:
        """Continuations of ``query.text``, one per query; ``runs``: the run that each query belongs to."""
        ...


class RandomAgent:
    """Options at random, numbers uniform over .01 to .99."""

    def __init__(self, seed: int = 0) -> None:
        self.name = f"random agent, seed {seed}"
        self._generator = np.random.default_rng(seed)

    def answer(self, queries: Sequence[Query], runs: Sequence[int]) -> list[str]:
        return [reply_text(query, query.guess(self._generator)) for query in queries]


def reply_text(query: Query, answer: float) -> str:
    """An answer as the text that continues the prompt: the option, or four decimals at most."""
    if query.options:
        return query.options[int(answer)]
    return f"{min(max(answer, 0.0), 0.9999):.4f}"[2:]


class ModelAgent:
    """A causal language model that completes text greedily.

    Args:
        model: a MiCRo model, or any causal model of transformers.
        tokenizer: its tokenizer; no chat template is used.
        batch_size: prompts that are completed together.
        max_new_tokens: length of a reply.
        engine: complete with the C++ engine, same tokens as the model; default: where the model has one and is on the
            CPU.
        controls: steering arguments of every call, ``{"ablate": "social"}`` say.

    Raises:
        TypeError: ``tokenizer`` is missing.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        max_new_tokens: int = 2,
        engine: bool | None = None,
        controls: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer is None:
            raise TypeError("cogbench: tokenizer is missing; pass the tokenizer of the model, or an agent as the model")
        if batch_size < 1:
            raise ValueError(f"cogbench: batch_size must be at least 1, got {batch_size}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.controls = dict(controls or {})
        self.name = _fingerprint(model, self.controls)
        wanted = hasattr(model, "engine") and model.device.type == "cpu" if engine is None else engine
        self._engine = model.engine() if wanted else None
        self._limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)

    def answer(self, queries: Sequence[Query], runs: Sequence[int]) -> list[str]:
        ids = [list(self.tokenizer(query.text)["input_ids"]) for query in queries]
        longest = max(map(len, ids))
        if self._limit is not None and longest + self.max_new_tokens > self._limit:
            raise ValueError(
                f"cogbench: a prompt has {longest} tokens, the model reads {self._limit} at most, its reply included; "
                "leave this experiment out (experiments=...)"
            )
        replies: dict[int, list[int]] = {}
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # prompts of a batch have about the same length
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            replies |= zip(part, self._complete([ids[i] for i in part]), strict=True)
        return [self.tokenizer.decode(replies[i], skip_special_tokens=True) for i in range(len(ids))]

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        if self._engine is not None:
            found = self._engine.generate(prompts, max_new_tokens=self.max_new_tokens, **self.controls)
            return [list(row) for row in found.tokens]
        width = max(map(len, prompts))
        padding = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.model.device)
        was_training = self.model.training
        self.model.train(False)
        try:
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    pad_token_id=padding,
                    **self.controls,
                )
        finally:
            self.model.train(was_training)
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


def _fingerprint(model: Any, controls: Mapping[str, Any]) -> str:
    """Class, name and a hash over shapes and first values of all parameters: enough to tell two models apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().reshape(-1)[:16].float().cpu().numpy().tobytes())
    told = f", {dict(sorted(controls.items()))}" if controls else ""
    return f"{type(model).__name__} {digest.hexdigest()[:12]}{told}"
