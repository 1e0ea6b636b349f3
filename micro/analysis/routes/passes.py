"""The forward pass of all routing analyses: samples, the slots that count, and counts per sample."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from micro.analysis.batches import IGNORED, Row, batches, encoded, shifted, text_row
from micro.analysis.modes import evaluating
from micro.analysis.statistics import Array
from micro.progress import track

if TYPE_CHECKING:
    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM, RoutingTrace

Positions = Literal["published", "answer"]
SentenceTokens = Literal["sentence", "published"]
TEMPLATE_DATE = "26 Jul 2024"  # the default of micro.data.encode
MAX_SAMPLES, SAMPLE_SEED = 1000, 42  # the published rule
POSITIONS = {
    "published": "from the last prompt token (header of the answer counts as answer) to the last but one token",
    "answer": "those that predict an answer token",
}


@dataclass(frozen=True)
class Samples:
    """Encoded samples: (index into ``data``, features) each, and the slots first..last-1 of each that count.

    ``drawn``: the indices into the data given, ascending; ``labelled``: whether the rows carry routing labels.
    """

    data: list[Any]
    drawn: list[int]
    rows: list[tuple[int, Row]]
    spans: dict[int, tuple[int, int]]
    labelled: bool = False
    positions: Positions = "published"

    @property
    def rule(self) -> str:
        """Which slots count, in words."""
        return POSITIONS[self.positions] if self.labelled else "all but the last; of pairs, from the last prompt token"

    def counted(self, indices: Sequence[int], batch: Mapping[str, Tensor]) -> Tensor:
        """Bool [B,S]: the slots that count."""
        if self.positions == "answer" and self.labelled:
            return shifted(batch["labels"]) != IGNORED
        slots = torch.arange(batch["input_ids"].shape[1])
        first, last = torch.tensor([self.spans[i] for i in indices]).T[..., None]
        counted: Tensor = (slots >= first) & (slots < last)
        return counted


def drawn_samples(
    data: Sequence[Any],
    tokenizer: Any,
    *,
    what: str,
    positions: Positions = "published",
    max_samples: int | None = MAX_SAMPLES,
    sample_seed: int = SAMPLE_SEED,
    options: Mapping[str, Any] | None = None,
) -> Samples:
    """Texts, (prompt, answer) pairs or labelled records, at most ``max_samples`` of them, encoded.

    Raises:
        ValueError: no data, kinds that are mixed, or nothing left after encoding.
    """
    if not data:
        raise ValueError(f"{what}: data is empty; give texts, (prompt, answer) pairs or records")
    if positions not in POSITIONS:
        raise ValueError(f"{what}: positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    drawn = list(range(len(data)))
    if max_samples is not None and len(data) > max_samples:
        generator = np.random.default_rng(sample_seed)
        drawn = sorted(generator.choice(len(data), max_samples, replace=False).tolist())
    kept = [data[i] for i in drawn]
    if len({_kind(item) for item in kept}) > 1:
        raise ValueError(f"{what}: data mixes {', '.join(sorted({_kind(i) for i in kept}))}; give one kind")
    if _kind(kept[0]) == "records":
        return _records(kept, drawn, tokenizer, what, positions, dict(options or {}))
    return _texts(kept, drawn, tokenizer, what)


def _kind(item: Any) -> str:
    return "texts" if isinstance(item, str) else "pairs" if isinstance(item, tuple) else "records"


def _records(
    kept: list[Any], drawn: list[int], tokenizer: Any, what: str, positions: Positions, options: dict[str, Any]
) -> Samples:
    rows = encoded(kept, tokenizer, **options)
    if not rows:
        raise ValueError(f"{what}: none of the {len(kept)} records could be encoded")
    spans = {i: (_offset(kept[i], row, tokenizer, options), len(row["input_ids"]) - 1) for i, row in rows}
    return Samples(kept, drawn, rows, spans, True, positions)


def _offset(record: Record, row: Row, tokenizer: Any, options: Mapping[str, Any]) -> int:
    """(prompt tokens) - 1, where the prompt is the template of all turns but the last, without generation prompt."""
    from micro.data.encoding import resolve_options
    from micro.data.rendering import renderer_for

    chosen = resolve_options(**options)
    renderer = renderer_for(tokenizer)
    before = record.messages(long_prompt=chosen.long_prompt)[:-1]
    text = renderer.apply(before, chosen.template_date)
    prompt = tokenizer(text, add_special_tokens=chosen.double_bos).input_ids
    if row["input_ids"][: len(prompt)] == prompt:
        return len(prompt) - 1
    # The text of a message looks like a special token, or the template ends a turn otherwise when it is the last one:
    # then the header's own tokens, which end where the answer begins, are taken off.
    header = renderer.apply(before, chosen.template_date, prompt=True)[len(text) :]
    labels = row["labels"]
    start = max(s for s in range(len(labels)) if labels[s] != IGNORED and (s == 0 or labels[s - 1] == IGNORED))
    return max(start - len(tokenizer(header, add_special_tokens=False).input_ids) - 1, 0)


def _texts(kept: list[Any], drawn: list[int], tokenizer: Any, what: str) -> Samples:
    rows, spans = [], {}
    for i, item in enumerate(kept):
        prompt, answer = ("", item) if isinstance(item, str) else item
        encoding = tokenizer(prompt + answer, return_offsets_mapping=bool(prompt))
        ids = encoding["input_ids"]
        first = 0
        if prompt:  # a token across the border belongs to the answer
            ends = [s for s, (_, end) in enumerate(encoding["offset_mapping"]) if end > len(prompt)]
            first = max(ends[0] - 1, 0) if ends else len(ids)
        if len(ids) - 1 > first:
            rows.append((i, text_row(ids)))
            spans[i] = (first, len(ids) - 1)
    if not rows:
        raise ValueError(f"{what}: every text has fewer than two tokens after its prompt")
    return Samples(kept, drawn, rows, spans)


def sentence_samples(
    sentences: Sequence[str], tokenizer: Any, *, what: str, tokens: SentenceTokens = "sentence", chat: bool = True
) -> Samples:
    """Each sentence as the only user turn; the tokens of the sentence itself count.

    tokens: "sentence": those that hold a character of it; "published": from (tokens of the template with an empty
    text) - 1 to the last token but one, the same where the template puts one token behind the text, as Llama's does.
    chat: False = plain text without a template.

    Raises:
        ValueError: no sentences, one that is empty, or no chat template.
    """
    from micro.data.rendering import renderer_for

    if isinstance(sentences, str) or not len(sentences):
        raise ValueError(f"{what}: give a list of sentences")
    if tokens not in ("sentence", "published"):
        raise ValueError(f'{what}: tokens must be "sentence" or "published", got {tokens!r}')
    rows, spans = [], {}
    for i, sentence in enumerate(sentences):
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"{what}: sentence {i} is empty: {sentence!r}")
        text, low, high = sentence, 0, len(sentence)
        if chat:
            turn = [{"role": "user", "content": sentence}]
            rendered = renderer_for(tokenizer).render(turn, TEMPLATE_DATE, [])
            text, (low, high) = rendered.text, rendered.contents[0]
        encoding = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
        touching = [s for s, (a, b) in enumerate(encoding["offset_mapping"]) if a < high and b > low]
        span = (touching[0], touching[-1] + 1)
        if tokens == "published" and chat:
            empty = renderer_for(tokenizer).apply([{"role": "user", "content": ""}], TEMPLATE_DATE)
            span = (len(tokenizer(empty, add_special_tokens=False)["input_ids"]) - 1, len(encoding["input_ids"]) - 1)
        rows.append((i, text_row(encoding["input_ids"])))
        spans[i] = span
    return Samples(list(sentences), list(range(len(sentences))), rows, spans)


@torch.no_grad()
def traces(
    model: MiCRoForCausalLM,
    samples: Samples,
    tokenizer: Any,
    *,
    controls: Mapping[str, Any] | None = None,
    max_tokens: int = 2048,
    progress: bool = False,
    description: str = "routing",
) -> Iterator[tuple[list[int], dict[str, Tensor], RoutingTrace, Tensor]]:
    """(sample indices, batch, trace, bool [B,S] of counted slots) of every batch, teacher-forced, in eval mode."""
    work = list(batches(samples.rows, tokenizer, max_tokens=max_tokens))
    with evaluating(model):
        for indices, batch in track(work, description, unit="batches", enabled=progress):
            trace = model.model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                use_cache=False,
                output_routing=True,
                **(controls or {}),
            ).routing
            yield indices, batch, trace, samples.counted(indices, batch)


@dataclass
class SampleCounts:
    """What was counted, per sample (N) and layer; the numbers behind every routing table and figure.

    tokens [N]: counted slots; usage [N,L,E]: first choices (float32 probability, ties to the lower id); load [N,L,E]:
    choices of all K ranks with a weight above 0; mass [N,L,E]: sum of probabilities; entropies [N,L]: sum of
    -sum p log p, nats; confusion [N,L,label,E]: first choices at labelled answer tokens (N is 0 where labels were not
    compared);
    transitions [L-1,E,E]: first choice in a layer and in the next; together [L,L]: slots with the same first choice in
    both layers; index [N]: place of the sample in the data that were given.
    """

    tokens: Array
    usage: Array
    load: Array
    mass: Array
    entropies: Array
    confusion: Array
    transitions: Array
    together: Array
    index: Array

    @classmethod
    def zeros(cls, samples: int, layers: int, experts: int, *, labelled: bool = False) -> SampleCounts:
        n, l, e, m = samples, layers, experts, samples if labelled else 0
        shapes = ((n,), (n, l, e), (n, l, e), (n, l, e), (n, l), (m, l, e, e), (max(l - 1, 0), e, e), (l, l), (n,))
        return cls(*(np.zeros(shape) for shape in shapes))

    def add(self, indices: Sequence[int], trace: RoutingTrace, counted: Tensor, labels: Tensor | None) -> None:
        """Take in one batch. counted: bool [B,S]; labels: int64 [B,S], negative where there is none; None: nowhere."""
        experts = self.usage.shape[-1]
        rows = list(indices)
        probs = trace.probs.double().cpu()
        ranks = torch.nn.functional.one_hot(trace.ids.cpu().long(), experts).double()  # [L,B,S,K,E]
        used = (trace.weights.cpu() > 0)[..., None]  # surplus ranks, where fewer experts than K are allowed, have 0
        chosen, every = ranks[..., 0, :], (ranks * used).sum(-2)
        m = counted.double()
        h = -torch.special.xlogy(probs, probs).sum(-1)
        self.tokens[rows] += m.sum(1).numpy()
        for table, values in ((self.usage, chosen), (self.load, every), (self.mass, probs)):
            table[rows] += torch.einsum("lbse,bs->ble", values, m).numpy()
        self.entropies[rows] += torch.einsum("lbs,bs->bl", h, m).numpy()
        if len(self.confusion) and labels is not None:
            expected = torch.nn.functional.one_hot(labels.clamp(min=0), experts).double()
            known = (labels >= 0).double()
            self.confusion[rows] += torch.einsum("lbse,bsk,bs->blke", chosen, expected, known).numpy()
        picked = chosen[:, counted]  # [L,T,E]
        self.transitions += torch.einsum("lte,ltf->lef", picked[:-1], picked[1:]).numpy()
        flat = picked.flatten(1)
        self.together += (flat @ flat.T).numpy()

    def save(self, path: str | Path) -> None:
        """All arrays as ``.npz``, written beside and renamed."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as stream:
                np.savez_compressed(stream, **{f.name: getattr(self, f.name) for f in fields(self)})
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load_file(cls, path: str | Path) -> SampleCounts:
        """What :meth:`save` wrote.

        Raises:
            ValueError: another kind of file.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(**{f.name: data[f.name] for f in fields(cls)})
        except (KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path}: no routing counts of `micro route` ({error})") from error


def experts_per_token(model: MiCRoForCausalLM, controls: Mapping[str, Any] | None) -> int:
    """K of these calls."""
    given = (controls or {}).get("experts_per_token")
    return int(model.config.num_experts_per_tok if given is None else given)


def labels_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Routing labels of the answer tokens, -1 elsewhere, int64 [B,S]."""
    if "routing_labels" not in batch:
        return None
    return torch.where(batch["labels"] != IGNORED, batch["routing_labels"], -1)
