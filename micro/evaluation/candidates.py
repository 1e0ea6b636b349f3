"""Log-likelihood of candidate answers: a prompt is read once, its candidates go on from its keys and values.

    scorer = CandidateScorer(model, tokenizer, controls={"ablate": "social"})
    scorer.score(["The capital of France is"], [[" Paris", " Rome"]])

The engine has no part in this: it reads prompts no faster than the model does, would have to be packed first, and knows
nothing of hooks and interventions on the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro.analysis.batches import CHUNK_BYTES
from micro.analysis.modes import evaluating
from micro.errors import choices
from micro.modeling.cache import MiCRoCache, MiCRoCacheLayer
from micro.modeling.config import MiCRoConfig
from micro.modeling.controls import NAMES_OF_CONTROLS, ControlReader, Phases, TensorPhases
from micro.progress import Progress

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

Ids = tuple[int, ...]
HEAD = 32  # prompts that agree in so many first tokens are worked off together: worked examples are read once
MIN_PREFIX = 8  # shared tokens that are worth a pass of their own
NORMALIZATIONS = ("sum", "tokens", "bytes")


@dataclass(frozen=True, slots=True)
class Score:
    """Of one candidate. logprob: nats, summed over its tokens, the first one included; greedy: whether each of them is
    the most probable one; text_bytes: its length in UTF-8 (0 where only ids were given).
    """

    logprob: float
    tokens: int
    greedy: bool
    text_bytes: int = 0

    def value(self, by: str = "sum") -> float:
        """The sum, or nats per token or per byte."""
        if by not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {by!r}")
        return self.logprob / max(1, {"sum": 1, "tokens": self.tokens, "bytes": self.text_bytes}[by])


class CandidateScorer:
    """Scores (prompt, candidate) pairs under steering, up to rounding as if each were computed alone.

    Equal prompts are read once. Prompts of similar length share a batch, and what a batch has in common at its
    beginning (worked examples, a chat header) is read in one row and kept for the next batch. Of a prompt only the last
    slot meets the vocabulary.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: needed for texts; ids go without.
        controls: steering arguments of every forward: ``ablate``, ``keep``, ``bias``, ``force``,
            ``experts_per_token``. ``Phases`` give the prompt and the candidate different ones; the first token of a
            candidate is predicted in the last slot of the prompt. Forms with an axis of rows or slots are refused,
            since batches are formed here.
        max_tokens: slots per batch; also bounds cached slots: L * E * G * D * 8 bytes each, for float32.
        encode: text -> ids, in place of ``tokenizer(text)["input_ids"]``.
        progress: show a bar on stderr, with this name if it is one.

    Raises:
        TypeError: the model has no experts.
        ValueError: a control that counts rows or slots, or one that does not exist.

    Source: model.md 9.3 (candidate scoring).
    """

    def __init__(
        self,
        model: MiCRoForCausalLM,
        tokenizer: Any = None,
        *,
        controls: Mapping[str, Any] | None = None,
        max_tokens: int = 2048,
        encode: Callable[[str], Sequence[int]] | None = None,
        progress: bool | str = False,
    ) -> None:
        if not isinstance(getattr(model, "config", None), MiCRoConfig):
            raise TypeError(
                f"CandidateScorer: expected a MiCRo model, got {type(model).__name__}; micro.upcycle makes one of a "
                "dense model"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.model, self.max_tokens, self.progress = model, max_tokens, progress
        if encode is None and tokenizer is not None:
            encode = _encoder(tokenizer)
        self._encode = encode
        self._prompt_controls, self._answer_controls = split_controls(model.config, controls or {})

    # ------------------------------------------------------------------ texts
    def score(self, prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Scores of the candidates of each prompt.

        Raises:
            ValueError: there is no tokenizer, an empty candidate, or a prompt without tokens.
        """
        if self._encode is None:
            raise ValueError("CandidateScorer: texts need a tokenizer; pass tokenizer=... or use score_ids")
        if len(prompts) != len(candidates):
            raise ValueError(f"there are {len(prompts)} prompts but candidates for {len(candidates)}")
        pairs = [
            encode_pair(self._encode, prompt, candidate)
            for prompt, some in zip(prompts, candidates, strict=True)
            for candidate in some
        ]
        found = iter(self.score_ids(pairs))
        return [
            [
                Score(score.logprob, score.tokens, score.greedy, len(candidate.encode()))
                for candidate, score in zip(some, found, strict=False)
            ]
            for some in candidates
        ]

    # ------------------------------------------------------------------ ids
    def score_ids(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Scores of (prompt ids, candidate ids) in their order; equal pairs are computed once.

        Raises:
            ValueError: an empty prompt or candidate, or a pair longer than the model reads.
        """
        wanted = [(tuple(map(int, prompt)), tuple(map(int, candidate))) for prompt, candidate in pairs]
        self._check(wanted)
        found: dict[tuple[Ids, Ids], Score] = {}
        work = _batches(wanted, self.max_tokens)
        with evaluating(self.model):
            shared = _Shared(self.model, self._prompt_controls)
            told = self.progress if isinstance(self.progress, str) else "candidates"
            shown = None if self.progress else False
            with Progress(told, len(set(wanted)), unit="candidates", enabled=shown) as bar:
                for batch in work:
                    found.update(self._score_batch(batch, shared))
                    bar.advance(sum(len(some) for _, some in batch))
        return [found[pair] for pair in wanted]

    def _check(self, pairs: Sequence[tuple[Ids, Ids]]) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for i, (prompt, candidate) in enumerate(pairs):
            if not prompt or not candidate:
                what = "candidate" if prompt else "prompt"
                raise ValueError(f"pair {i}: the {what} has no tokens; a first token needs one before it (BOS, say)")
            if limit is not None and len(prompt) + len(candidate) - 1 > limit:
                raise ValueError(
                    f"pair {i}: prompt and candidate have {len(prompt)} + {len(candidate)} tokens, the model reads "
                    f"{limit}; shorten the prompt"
                )

    def _score_batch(self, batch: list[tuple[Ids, list[Ids]]], shared: _Shared) -> dict[tuple[Ids, Ids], Score]:
        """All candidates of some prompts."""
        logits = shared.read([prompt for prompt, _ in batch])
        rows = [(r, candidate) for r, (_, some) in enumerate(batch) for candidate in some]
        picked, best = _picked(
            logits, torch.tensor([r for r, _ in rows]), torch.tensor([candidate[0] for _, candidate in rows])
        )
        sums, greedy = picked.double().tolist(), best.tolist()
        longer = [i for i, (_, candidate) in enumerate(rows) if len(candidate) > 1]
        if longer:
            going_on = [rows[i][1][:-1] for i in longer]
            hidden = shared.follow([rows[i][0] for i in longer], going_on, self._answer_controls)
            targets = [list(rows[i][1][1:]) for i in longer]
            more = self._picked_from_hidden(hidden, [t for some in targets for t in some])
            for i, some in zip(longer, targets, strict=True):
                for _ in some:
                    logprob, top = next(more)
                    sums[i] += logprob
                    greedy[i] = greedy[i] and top
        return {
            (batch[r][0], candidate): Score(sums[i], len(candidate), bool(greedy[i]))
            for i, (r, candidate) in enumerate(rows)
        }

    def _picked_from_hidden(self, hidden: Tensor, targets: list[int]) -> Iterator[tuple[float, bool]]:
        """(log-probability, is it the most probable?) of each target; logits of a chunk of slots at a time."""
        size = max(1, CHUNK_BYTES // (4 * self.model.lm_head.weight.shape[0]))
        for start in range(0, len(targets), size):
            logits = self.model.lm_head(hidden[start : start + size])
            some = torch.tensor(targets[start : start + size])
            picked, best = _picked(logits, torch.arange(len(some)), some)
            yield from zip(picked.double().tolist(), best.tolist(), strict=True)


class _Shared:
    """The keys and values of one batch of prompts, and those of the beginning that they share."""

    def __init__(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> None:
        self.model, self.controls = model, controls
        self._kept = MiCRoCache(model.config)  # one row: what the last batch had in common
        self._kept_ids: Ids = ()
        self._cache, self._mask = self._kept, torch.empty(0)

    def read(self, prompts: list[Ids]) -> Tensor:
        """Logits [B,V] behind each prompt."""
        device = self.model.device
        common = _common(prompts)
        if common < MIN_PREFIX or (len(prompts) == 1 and _agree(self._kept_ids, prompts[0]) < MIN_PREFIX):
            common = 0
        if common:
            self._keep(prompts[0][:common])
        rests = [prompt[common:] for prompt in prompts]
        width = max(map(len, rests))
        gaps = torch.tensor([width - len(rest) for rest in rests], device=device)
        ids = torch.tensor([[0] * (width - len(rest)) + list(rest) for rest in rests], device=device)
        slots = torch.arange(width, device=device)
        own = slots >= gaps[:, None]
        self._mask = torch.cat([torch.ones(len(prompts), common, dtype=torch.bool, device=device), own], 1)
        room = common + width
        self._cache = _copied(self._kept, self.model.config, [0] * len(prompts), common, room)
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=(common + slots - gaps[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            **self.controls,
        ).last_hidden_state
        logits: Tensor = self.model.lm_head(hidden[:, -1])
        return logits

    def _keep(self, ids: Ids) -> None:
        """Read the beginning that all prompts of the next batch share, as far as it is not kept."""
        same = _agree(self._kept_ids, ids)
        if same == len(ids):
            return
        self._kept.truncate(same)
        self.model.model(
            input_ids=torch.tensor([ids[same:]], device=self.model.device),
            past_key_values=self._kept,
            use_cache=True,
            **self.controls,
        )
        self._kept_ids = ids

    def follow(self, rows: list[int], tokens: list[Ids], controls: Mapping[str, Any]) -> Tensor:
        """Hidden states [N,H] of tokens that go on from the given rows, one after the other."""
        device = self.model.device
        width, before = max(map(len, tokens)), self._mask.shape[1]
        ids = torch.tensor([[*some, *[0] * (width - len(some))] for some in tokens], device=device)
        slots = torch.arange(width, device=device)
        own = slots < torch.tensor([len(some) for some in tokens], device=device)[:, None]
        mask = self._mask[torch.tensor(rows, device=device)]
        hidden: Tensor = self.model.model(
            input_ids=ids,
            attention_mask=torch.cat([mask, own], 1),
            position_ids=mask.sum(1)[:, None] + slots,
            past_key_values=_copied(self._cache, self.model.config, rows, before, before + width),
            use_cache=True,
            **controls,
        ).last_hidden_state
        return hidden[own]


def _copied(cache: MiCRoCache, config: Any, rows: list[int], length: int, room: int) -> MiCRoCache:
    """A cache whose row i holds the first ``length`` slots of ``rows[i]``, with room for more."""
    new = MiCRoCache(config)
    if length == 0:
        return new
    for old, layer in zip(cache.layers, new.layers, strict=True):
        assert isinstance(layer, MiCRoCacheLayer) and isinstance(old, MiCRoCacheLayer)
        assert old.keys is not None and old.values is not None
        parts = [part.unflatten(1, (cache.experts, -1))[:, :, :, :length] for part in (old.keys, old.values)]
        _, experts, groups, _, size = parts[0].shape
        stores = layer.room(parts[0], len(rows), experts, groups, size, room)
        for store, part in zip(stores, parts, strict=True):
            for new_row, row in enumerate(rows):
                store[new_row, :, :, :length].copy_(part[row])
        layer.filled(length)
    return new


def _picked(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target in its row of logits [N,V] (float64 stays, the rest is float32), and whether it is
    the most probable token.
    """
    logits = logits.double() if logits.dtype == torch.float64 else logits.float()
    rows, targets = rows.to(logits.device), targets.to(logits.device)
    return torch.log_softmax(logits, -1)[rows, targets], logits.argmax(-1)[rows] == targets


# ---------------------------------------------------------------- batches
def _batches(pairs: Sequence[tuple[Ids, Ids]], max_tokens: int) -> list[list[tuple[Ids, list[Ids]]]]:
    """Prompts with their distinct candidates: those with the same beginning, then those of similar length, together.

    A prompt with more candidates than a batch may hold stands in several.
    """
    by_prompt: dict[Ids, dict[Ids, None]] = {}
    for prompt, candidate in pairs:
        by_prompt.setdefault(prompt, {})[candidate] = None
    heads = Counter(prompt[:HEAD] for prompt in by_prompt)

    def place(prompt: Ids) -> tuple[bool, Ids, int, Ids]:
        head = prompt[:HEAD] if len(prompt) > HEAD and heads[prompt[:HEAD]] > 1 else ()
        return head == (), head, -len(prompt), prompt  # the longest first: what does not fit fails at once

    batches: list[list[tuple[Ids, list[Ids]]]] = []
    used, longest, last = 0, 0, None
    for prompt in sorted(by_prompt, key=place):
        length = max(len(prompt) + len(candidate) for candidate in by_prompt[prompt])
        at_once = max(1, max_tokens // length)
        candidates = list(by_prompt[prompt])
        for start in range(0, len(candidates), at_once):
            some = candidates[start : start + at_once]
            head = place(prompt)[:2]
            longest = max(longest, length)
            if not batches or head != last or (used + len(some)) * longest > max_tokens:
                batches.append([])
                used, longest, last = 0, length, head
            batches[-1].append((prompt, some))
            used += len(some)
    return batches


def _common(prompts: list[Ids]) -> int:
    """Number of first tokens that all prompts share; each keeps one token of its own."""
    return min(min(_agree(prompts[0], other) for other in prompts), *(len(p) - 1 for p in prompts))


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- texts and controls
def encode_pair(encode: Callable[[str], Sequence[int]], prompt: str, candidate: str) -> tuple[Ids, Ids]:
    """Ids of a prompt and of the candidate behind it, tokenised as one text.

    Spaces at the end of the prompt are moved to the candidate: most tokenizers join a space and the word behind it.
    Where a token reaches from the prompt into the candidate it counts as the candidate's: everything from the first
    token that differs from the prompt's own.

    Raises:
        ValueError: the candidate is empty.
    """
    if not candidate:
        raise ValueError(f"the candidate after {prompt[-40:]!r} is empty")
    whole, own = tuple(encode(prompt + candidate)), tuple(encode(prompt.rstrip(" ")))
    cut = min(_agree(whole, own), len(whole) - 1)
    return whole[:cut], whole[cut:]


def _encoder(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    def encode(text: str) -> Sequence[int]:
        return list(tokenizer(text)["input_ids"])

    return encode


def split_controls(config: MiCRoConfig, controls: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Controls of the prompt and of the candidate, checked: batches are formed here, so none may count rows or slots.

    Raises:
        ValueError: an unknown control or expert, or a form with an axis of rows or slots.
    """
    reader = ControlReader(config)
    for name, value in controls.items():
        if name == "experts_per_token":
            continue
        if name not in NAMES_OF_CONTROLS:
            raise ValueError(f"controls: {name!r}; {choices(name, [*NAMES_OF_CONTROLS, 'experts_per_token'])}")
        read = reader.read(name, value)
        for part in (read.prompt, read.answer) if isinstance(read, TensorPhases) else (read,):
            if part is not None and not (isinstance(part, Tensor) and part.shape[0] == part.shape[2] == 1):
                raise ValueError(
                    f"controls: {name} is given row by row, slot by slot or step by step, but batches are formed by "
                    "the scorer; give experts, one set per layer, or a tensor with one row and one slot"
                )
    prompt = {n: v.prompt if isinstance(v, Phases) else v for n, v in controls.items()}
    answer = {n: v.answer if isinstance(v, Phases) else v for n, v in controls.items()}
    return prompt, answer
