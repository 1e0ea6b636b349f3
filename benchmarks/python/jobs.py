"""What is timed, for any causal language model of transformers: a job prepares, runs, and gives outputs to compare.

Imports torch only: the same file runs in this process and in a worker with another transformers (worker.py).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SHORTEST = 1e-3  # seconds; a shorter region is looped


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Job(ABC):
    """One region to time. ``prepare`` is not timed, ``run`` is."""

    def __init__(self, model: Any, ids: Any, controls: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.ids = torch.as_tensor(ids).to(getattr(model, "device", "cpu"))  # an engine is on the CPU
        self.controls = dict(controls or {})

    def prepare(self) -> None:  # noqa: B027 - a region may start from any state
        """Bring the model into the state in which ``run`` starts."""

    @abstractmethod
    def run(self) -> Any:
        """The region itself."""

    @abstractmethod
    def outputs(self) -> dict[str, Tensor]:
        """What another implementation must give as well."""

    def seconds(self) -> float:
        """Time of one run; short runs are repeated, each with its preparation outside the clock."""
        total, done = 0.0, 0
        while done == 0 or total < SHORTEST:
            self.prepare()
            settle(self.ids.device)
            begin = time.perf_counter()
            self.run()
            settle(self.ids.device)
            total += time.perf_counter() - begin
            done += 1
        return total / done


class Prefill(Job):
    """One forward over a prompt with an empty cache, logits of the last position."""

    compared = 64  # positions

    def prepare(self) -> None:
        self.model.eval()

    @torch.no_grad()
    def run(self) -> Any:
        return self.model(self.ids, logits_to_keep=1, use_cache=True, **self.controls)

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        self.prepare()
        out = self.model(self.ids, logits_to_keep=self.compared, use_cache=True, **self.controls)
        return {"logits": out.logits.float(), **routes_of(out)}


class Decode(Job):
    """A greedy loop over forward with a cache that holds the prompt; the prompt is not timed."""

    def __init__(self, model: Any, ids: Any, new: int, controls: Mapping[str, Any] | None = None) -> None:
        super().__init__(model, ids, controls)
        self.new, self.tokens = new, torch.empty(0)
        self.cache: Any = None

    @torch.no_grad()
    def prepare(self) -> None:
        self.model.eval()
        if self.cache is None:
            out = self.model(self.ids, logits_to_keep=1, use_cache=True, **self.controls)
            self.cache, self.first = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        else:
            crop(self.cache, self.ids.shape[1])

    @torch.no_grad()
    def run(self) -> Any:
        token, tokens = self.first, [self.first]
        for _ in range(self.new):
            logits = self.model(token, past_key_values=self.cache, use_cache=True, **self.controls).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        self.tokens = torch.cat(tokens, 1)
        return self.tokens

    def outputs(self) -> dict[str, Tensor]:
        self.prepare()
        return {"tokens": self.run()}


class Generate(Decode):
    """``generate`` over a cache that holds all but the last token of the prompt, greedy."""

    @torch.no_grad()
    def prepare(self) -> None:
        self.model.eval()
        if self.cache is None:
            out = self.model(self.ids[:, :-1], logits_to_keep=1, use_cache=True, **self.controls)
            self.cache = out.past_key_values
        else:
            crop(self.cache, self.ids.shape[1] - 1)

    @torch.no_grad()
    def run(self) -> Any:
        new = self.new + 1  # as many as the loop has with its first token
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        mask = torch.ones_like(self.ids)
        out = self.model.generate(
            self.ids, attention_mask=mask, past_key_values=self.cache, do_sample=False, **lengths, **self.controls
        )
        self.tokens = out[:, self.ids.shape[1] :]
        return self.tokens


class WholeDecode(Decode):
    """Prompt and loop together, for the memory of both."""

    @torch.no_grad()
    def run(self) -> Any:
        self.cache = None
        Decode.prepare(self)
        return super().run()

    def prepare(self) -> None:
        """Everything is part of the run."""


class WholeGenerate(Generate):
    """``generate`` with the prompt, as a user calls it."""

    def prepare(self) -> None:
        """Everything is part of the run."""

    @torch.no_grad()
    def run(self) -> Any:
        self.model.eval()
        new = self.new + 1
        mask = torch.ones_like(self.ids)
        out = self.model.generate(
            self.ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, **self.controls
        )
        self.tokens = out[:, self.ids.shape[1] :]
        return self.tokens


class ForwardBackward(Job):
    """Loss on all tokens and its gradients; the gradients of the last run are dropped outside the clock."""

    def prepare(self) -> None:
        self.model.train()
        self.model.zero_grad(set_to_none=True)

    def run(self) -> Any:
        loss = self.model(self.ids, labels=self.ids, use_cache=False, **self.controls).loss
        loss.backward()
        return loss

    def outputs(self) -> dict[str, Tensor]:
        self.prepare()
        self.model.zero_grad(set_to_none=True)
        loss = self.run().detach().float()
        norm = gradient_norm(self.model)
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss, "gradient_norm": norm}


class Accumulate(ForwardBackward):
    """The same, added to gradients that are there: what a micro batch needs beside them."""

    def prepare(self) -> None:
        self.model.train()


class Step(Job):
    """A whole optimizer step: forward, backward, clipping to norm 1, AdamW.

    ``autocast``: float32 weights, products in bfloat16. ``routers_only``: everything else is frozen.
    """

    rate, decay, clip = 1e-4, 0.01, 1.0

    def __init__(
        self,
        model: Any,
        ids: Any,
        controls: Mapping[str, Any] | None = None,
        *,
        autocast: bool = False,
        routers_only: bool = False,
        optimizer: Callable[[list[Tensor]], Any] | None = None,
    ) -> None:
        super().__init__(model, ids, controls)
        self.autocast = autocast
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not routers_only or is_router(name))
        trained = [p for p in model.parameters() if p.requires_grad]
        self.trained, self.clips_itself = trained, optimizer is not None
        self.optimizer = (
            torch.optim.AdamW(trained, lr=self.rate, weight_decay=self.decay, fused=True)
            if optimizer is None
            else optimizer(trained)
        )

    def run(self) -> Any:
        self.model.train()
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(self.ids, labels=self.ids, use_cache=False, **self.controls).loss
        loss.backward()
        if not self.clips_itself:  # an optimizer of ours clips in its own pass
            torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def outputs(self) -> dict[str, Tensor]:
        """The losses of three steps: the second and third show what the first ones did to the parameters."""
        return {"losses": torch.stack([self.run().detach().float() for _ in range(3)])}


def crop(cache: Any, length: int) -> None:
    """Keep the first slots. By a negative number, which transformers of all versions understand alike."""
    if (surplus := int(cache.get_seq_length()) - length) > 0:
        cache.crop(-surplus)


def is_router(name: str) -> bool:
    """By the official name (`layers.0.gate.1`) or ours (`layers.0.router.out_proj`)."""
    parts = name.split(".")
    return "router" in parts or "gate" in parts


def gradient_norm(model: Any) -> Tensor:
    squares = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt()


def routes_of(out: Any) -> dict[str, Tensor]:
    """The expert of every token and layer [L,T], where the model tells."""
    routing = getattr(out, "routing", None)
    if routing is not None:  # ours
        return {"routes": routing.ids[..., 0].flatten(1).long()}
    scores = getattr(out, "routing_weights", None)  # the official field: logits of the routers
    if scores is None:
        return {}
    layers = [s.float().reshape(-1, s.shape[-1]) for s in scores]
    return {"routes": torch.stack([layer.argmax(-1) for layer in layers])}


JOBS: dict[str, type[Job]] = {
    "prefill": Prefill,
    "decode": Decode,
    "generate": Generate,
    "whole_decode": WholeDecode,
    "whole_generate": WholeGenerate,
    "forward_backward": ForwardBackward,
    "accumulate": Accumulate,
    "step": Step,
}
