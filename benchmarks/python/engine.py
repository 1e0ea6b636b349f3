"""The engine as a side: greedy decoding and prefill on its own packed weights and its own cache."""

from __future__ import annotations

from typing import Any

import torch
from experiment import MissingError
from jobs import Job
from torch import Tensor


def open_engine(model: Any, **options: Any) -> Any:
    """The engine over a model's parameters."""
    if not hasattr(model, "engine"):
        raise MissingError("this build has no engine: model.engine() is missing")
    return model.engine(**options)


class EnginePrefill(Job):
    """The prompt through an engine that holds nothing."""

    def prepare(self) -> None:
        self.model.reset()

    def run(self) -> Any:
        return self.model.prefill(self.ids.tolist()).logits

    def outputs(self) -> dict[str, Tensor]:
        self.prepare()
        return {"logits": self.run()[:, None].float()}


class EngineDecode(Job):
    """Greedy decoding of ``new`` tokens behind a prompt that is not timed."""

    def __init__(self, engine: Any, ids: Tensor, new: int) -> None:
        super().__init__(engine, ids)
        self.new, self.first = new, torch.empty(0)

    def prepare(self) -> None:
        """Several sides may share an engine: what it holds is told by its lengths."""
        if self.first.numel() == 0 or self.model.rows != self.ids.shape[0]:
            self.model.reset()
            self.first = self.model.prefill(self.ids.tolist()).logits.argmax(-1)
        else:
            self.model.truncate(self.ids.shape[1])

    def run(self) -> Any:
        token, tokens = self.first, [self.first]
        for _ in range(self.new):
            token = self.model.decode(token).logits.argmax(-1)
            tokens.append(token)
        return torch.stack(tokens, 1)

    def outputs(self) -> dict[str, Tensor]:
        self.prepare()
        return {"tokens": self.run()}
