"""A suite of forced choices: the candidate with the highest log-likelihood is the model's answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from micro.analysis.statistics import Array
from micro.analysis.suites import SHARE
from micro.evaluation.candidates import NORMALIZATIONS, CandidateScorer
from micro.evaluation.suites.items import Item, rules

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM


DOCUMENT = "<|endoftext|>"  # what stands between documents in the training of most tokenizers that have it


def document_start(tokenizer: Any) -> list[int]:
    """Ids that a document begins with, where the tokenizer itself puts none: <|endoftext|>, else BOS, else end of text.

    The first token of a text without it serves many models as a sink of attention, and what it says ("As", "No") is
    lost: SmolLM2-135M has 0.0 instead of 0.9 on SyntaxGym's npi_src_any.
    """
    first = list(tokenizer("a")["input_ids"])[:1]
    if first and first[0] in getattr(tokenizer, "all_special_ids", ()):
        return []
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    known = (vocabulary.get(DOCUMENT), *(getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")))
    return [next(int(i) for i in known if i is not None)] if any(i is not None for i in known) else []


class OfflineSuite(Protocol):
    """What :func:`micro.evaluation.suites.run` needs: a suite of :mod:`micro.analysis.suites` with items of its own.

    ``domain``: the expert that it belongs to; ``joint``: index of a row that repeats others (all items of a record
    right), or None; ``rules``: rule -> score per row of what understands nothing; ``outcomes``: one dictionary per
    item with "record", "row", "score" and what else is worth saving; ``score`` adds those up.
    """

    task: str
    domain: str
    names: list[str]
    records: int
    chance: list[float]
    joint: int | None
    settings: dict[str, Any]

    @property
    def fingerprint(self) -> str: ...
    def rules(self) -> dict[str, list[float]]: ...
    def outcomes(
        self, model: Any, controls: Mapping[str, Any], *, progress: bool | str = False
    ) -> list[dict[str, Any]]: ...
    def tally(self, outcomes: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]: ...


class ChoiceSuite:
    """Items with candidates, as the analyses take them: score = share of items answered rightly.

    Args:
        task: name.
        items: what is asked; items of one record are resampled together.
        tokenizer: of the model.
        domain: the expert that the task belongs to.
        normalization: "sum" of log-probabilities, or per "tokens" or "bytes" of the candidate.
        joint: name of a further row that counts records whose items are all right.
        chat: put prompts into the tokenizer's chat template as a user's turn; the answer's beginning (what stands
            behind the last "Answer:") stays the assistant's.
        max_tokens: slots per batch.
        settings: of the items, for the result: split, seed, version, ...

    Raises:
        ValueError: no items, or an unknown normalization.
    """

    higher_is_better = True
    unit = SHARE

    def __init__(
        self,
        task: str,
        items: Sequence[Item],
        tokenizer: Any,
        *,
        domain: str,
        normalization: str = "sum",
        joint: str | None = None,
        chat: bool = False,
        max_tokens: int = 2048,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not items:
            raise ValueError(f"suite {task}: there are no items")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
        self.task, self.domain, self.items, self.tokenizer = task, domain, list(items), tokenizer
        self.names = list(dict.fromkeys(item.row for item in items)) + ([joint] if joint else [])
        self.joint = len(self.names) - 1 if joint else None
        self.records = 1 + max(item.record for item in items)
        self.normalization, self.chat, self.max_tokens = normalization, chat, max_tokens
        self.settings = {**(settings or {}), "normalization": normalization, "chat": chat}
        self.chance = self._mean([1 / len(item.candidates) for item in self.items])

    @property
    def fingerprint(self) -> str:
        """Of the items and of how they are put and scored."""
        what = (self.task, self.names, self.normalization, self.chat, self.items, "from the start of a document")
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def rules(self) -> dict[str, list[float]]:
        """What simple rules would score, per row (:func:`micro.evaluation.suites.items.rules`)."""
        return {rule: self._mean(values) for rule, values in rules(self.items).items()}

    def outcomes(
        self, model: Any, controls: Mapping[str, Any], *, progress: bool | str = False
    ) -> list[dict[str, Any]]:
        """Of each item: chosen candidate, whether it is right, log-likelihoods (nats), and the margin of the right
        answer over the best other one after normalization.
        """
        scorer = CandidateScorer(
            model, controls=controls, max_tokens=self.max_tokens, encode=self._encode, progress=progress
        )
        put = [self._put(item) for item in self.items]
        scores = scorer.score([prompt for prompt, _ in put], [candidates for _, candidates in put])
        found = []
        for item, some in zip(self.items, scores, strict=True):
            values = [score.value(self.normalization) for score in some]
            chosen = int(np.argmax(values))
            others = [v for i, v in enumerate(values) if i != item.answer]
            found.append(
                {
                    "record": item.record,
                    "row": item.row,
                    "template": item.template,
                    "prompt": item.prompt,
                    "candidates": [c.strip() for c in item.candidates],
                    "answer": item.answer,
                    "chosen": chosen,
                    "score": float(chosen == item.answer),
                    "logprobs": [score.logprob for score in some],
                    "margin": values[item.answer] - max(others),
                }
            )
        return found

    def score(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> tuple[Array, Array]:
        """Right answers and items, both float64 [records, rows] (the protocol of the analyses)."""
        return self.tally(self.outcomes(model, controls))

    def tally(self, outcomes: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
        """Sums and counts [records, rows] of saved outcomes."""
        return self._table([float(outcome["score"]) for outcome in outcomes])

    # ------------------------------------------------------------------ helpers
    def _table(self, values: Sequence[float]) -> tuple[Array, Array]:
        sums = np.zeros((self.records, len(self.names)))
        counts = np.zeros_like(sums)
        together = np.ones(self.records)
        for item, value in zip(self.items, values, strict=True):
            row = self.names.index(item.row)
            sums[item.record, row] += value
            counts[item.record, row] += 1
            together[item.record] *= value
        if self.joint is not None:
            sums[:, self.joint] = together
            counts[:, self.joint] = counts.sum(1) > 0
        return sums, counts

    def _mean(self, values: Sequence[float]) -> list[float]:
        sums, counts = self._table(values)
        return [float(mean) for mean in sums.sum(0) / counts.sum(0)]

    @cached_property
    def _start(self) -> list[int]:
        return [] if self.chat else document_start(self.tokenizer)

    def _encode(self, text: str) -> list[int]:
        options = {"add_special_tokens": False} if self.chat else {}
        return [*self._start, *self.tokenizer(text, **options)["input_ids"]]

    def _put(self, item: Item) -> tuple[str, tuple[str, ...]]:
        """Prompt and candidates as the model gets them."""
        if not self.chat:
            return item.prompt, item.candidates
        asked, answer, begun = item.prompt.rpartition("\nAnswer:")
        if not answer:
            asked, begun = f"Continue: {item.prompt}", item.prompt
        turn = [{"role": "user", "content": asked.removeprefix("Question: ")}]
        shown = str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        begun = begun.lstrip()
        # Behind the header of the assistant's turn no space is wanted.
        return shown + begun, item.candidates if begun else tuple(c.lstrip() for c in item.candidates)
