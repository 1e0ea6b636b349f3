"""Answers up to a stop string: by the C++ engine on the CPU, by the model elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro.errors import choices
from micro.interventions.session import active

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most probable one."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, given: Mapping[str, Any], max_new_tokens: int) -> Sampling:
        """Of a task's options.

        Raises:
            ValueError: an option that does not exist here (beams, for example).
        """
        known = [f.name for f in fields(cls) if f.name != "max_new_tokens"]
        for name in given:
            if name not in known:
                raise ValueError(f"generation option {name!r} is not supported; {choices(name, known)}")
        return cls(max_new_tokens, **{name: type(getattr(cls, name))(value) for name, value in given.items()})


class Completer:
    """Continues prompts under steering. With the engine, a row's answer does not depend on the rows beside it.

    Args:
        model: a MiCRo model.
        tokenizer: of the model.
        controls: steering arguments of every call.
        engine: use the C++ engine, which is packed here; default: where the model is on the CPU. Inside
            ``model.intervene`` the model itself is used. ``model.generate`` draws from torch's generator, which rows
            beside each other share.
    """

    def __init__(
        self,
        model: MiCRoForCausalLM,
        tokenizer: Any,
        *,
        controls: Mapping[str, Any] | None = None,
        engine: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.controls = model, tokenizer, dict(controls or {})
        self.uses_engine = model.device.type == "cpu" if engine is None else engine
        self._engine = model.engine() if self.uses_engine else None

    def complete(
        self, prompts: Sequence[Sequence[int]], until: Sequence[str], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[str]:
        """Texts behind the prompts (ids), each cut before the first stop string in it."""
        watch = _Watch(self.tokenizer, until, len(prompts))
        if self._engine is not None and active(self.model.model) is None:
            tokens = self._with_engine(prompts, sampling, seeds, watch)
        else:
            tokens = self._with_model(prompts, sampling, seeds, watch)
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]
        return [cut(text, until) for text in texts]

    def _with_engine(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], watch: _Watch
    ) -> list[list[int]]:
        assert self._engine is not None
        found = self._engine.generate(
            [list(prompt) for prompt in prompts],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=list(seeds),
            on_token=watch.sees if watch.until else None,
            **self.controls,
        )
        return found.tokens

    def _with_model(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], watch: _Watch
    ) -> list[list[int]]:
        width, device = max(map(len, prompts)), self.model.device
        padding = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
        ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            options = {"do_sample": True, **drawn}
        if watch.until:
            options["stopping_criteria"] = [watch.criterion()]
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seeds[0])
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                repetition_penalty=sampling.repetition_penalty,
                pad_token_id=padding,
                **options,
                **self.controls,
            )
        rows: list[list[int]] = out[:, width:].tolist()
        return rows


class _Watch:
    """Tells when a row's answer holds a stop string."""

    def __init__(self, tokenizer: Any, until: Sequence[str], rows: int) -> None:
        self.tokenizer, self.until = tokenizer, [text for text in until if text]
        # A token is a byte at least; two more may hold the rest of a character.
        self._tail = 2 + max((len(text.encode()) for text in self.until), default=0)
        self._last: list[list[int]] = [[] for _ in range(rows)]

    def sees(self, row: int, token: int) -> bool:
        """Whether the row has ended with this token."""
        last = self._last[row]
        last.append(token)
        del last[: -self._tail]
        text = self.tokenizer.decode(last, skip_special_tokens=False)
        return any(stop in text for stop in self.until)

    def criterion(self) -> Any:
        """The same for ``transformers``: which rows have ended, bool [B]."""
        ended = torch.zeros(len(self._last), dtype=torch.bool)

        def check(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            for row, token in enumerate(ids[:, -1].tolist()):
                ended[row] |= self.sees(row, token)
            return ended.to(ids.device)

        return check


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text
