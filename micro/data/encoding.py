"""Labelled answers to token ids, language-model labels and routing labels (model.md 8.3-8.7), with every switch."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from micro.data.records import DataError, DataWarning, Record, RowCounts, Span, place_of
from micro.data.rendering import Rendered, Renderer, renderer_for
from micro.data.spans import Ints, token_pieces, touches
from micro.experts import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # language-model label of a token that is not trained on
LANGUAGE = LABELS.index("LN")
ROUTING = {label: expert for expert, label in enumerate(LABELS)}

_CHOICES = {
    "label_tokenisation": ("segments", "offsets"),
    "last_span": ("label", "language"),
    "mask": ("assistant_turns", "after_first_header"),
    "truncation": ("plain", "count_separators"),
    "missing_template": ("drop", "train_all"),
    "special_text": ("plain", "special"),
    "long_prompt": ("turns", "first_two"),
}


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """The switches of model.md 11.2 that concern data, with our defaults."""

    max_length: int = 4096
    label_tokenisation: str = "segments"
    last_span: str = "label"
    mask: str = "assistant_turns"
    truncation: str = "plain"
    missing_template: str = "drop"
    special_text: str = "plain"
    double_bos: bool = False
    template_date: str = "26 Jul 2024"
    response_template: str | None = None
    long_prompt: str = "turns"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"encode: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1:
            raise ValueError(f"encode: max_length must be a positive whole number, got {self.max_length!r}")
        if self.response_template == "":
            raise ValueError("encode: response_template must not be empty; None finds it from the generation prompt")


OFFICIAL = EncodeOptions(
    last_span="language",
    mask="after_first_header",
    truncation="count_separators",
    missing_template="train_all",
    special_text="special",
    double_bos=True,
    template_date="today",
    long_prompt="first_two",
)


def resolve_options(preset: str | None = None, **given: Any) -> EncodeOptions:
    """The preset's values (None: our defaults), then every given value that is not None."""
    if preset not in (None, "official"):
        raise ValueError(f"encode: preset must be None or 'official', got {preset!r}")
    known = {f.name for f in fields(EncodeOptions)}
    if unknown := sorted(given.keys() - known):
        raise TypeError(f"encode: unknown option {', '.join(unknown)}; the options are {', '.join(sorted(known))}")
    base = EncodeOptions() if preset is None else OFFICIAL
    return replace(base, **{k: v for k, v in given.items() if v is not None})


def encode(
    record: Record,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int | None = None,
    label_tokenisation: Literal["segments", "offsets"] | None = None,
    last_span: Literal["label", "language"] | None = None,
    mask: Literal["assistant_turns", "after_first_header"] | None = None,
    truncation: Literal["plain", "count_separators"] | None = None,
    missing_template: Literal["drop", "train_all"] | None = None,
    special_text: Literal["plain", "special"] | None = None,
    double_bos: bool | None = None,
    template_date: str | None = None,
    response_template: str | None = None,
    long_prompt: Literal["turns", "first_two"] | None = None,
    preset: Literal["official"] | None = None,
    counts: Counter[str] | None = None,
) -> dict[str, list[int]] | None:
    """One labelled answer as `input_ids`, `attention_mask`, `labels` and `routing_labels`: lists of int, equal lengths.

    None for a switch means the preset's value, and without a preset our default: 4096, "segments", "label",
    "assistant_turns", "plain", "drop", "plain", False, "26 Jul 2024", found from the generation prompt, "turns".
    `template_date="today"` leaves the date to the template. `preset="official"` is the right column of model.md 11.2.

    Routing labels are expert ids; the prompt, the end of the turn and text after the last span carry language.
    Returns None for a row that is dropped: no answer token is left to train on (the response template is missing, or
    `max_length` cut it off). With `counts` the reason is counted there, together with "encoded", "truncated" and
    "answer_cut"; without it a DataWarning names the record that was dropped, or whose answer was cut.

    Errors: ValueError for a bad switch, a tokenizer without chat template, or spans that are not in text order;
    TypeError for a slow tokenizer. Source: model.md 8.4 (labels), 8.5 (mask), 8.6 (truncation), 8.7 (templates).
    """
    options = resolve_options(
        preset,
        max_length=max_length,
        label_tokenisation=label_tokenisation,
        last_span=last_span,
        mask=mask,
        truncation=truncation,
        missing_template=missing_template,
        special_text=special_text,
        double_bos=double_bos,
        template_date=template_date,
        response_template=response_template,
        long_prompt=long_prompt,
    )
    return encode_record(record, tokenizer, options, counts)


def encode_record(
    record: Record,
    tokenizer: PreTrainedTokenizerFast,
    options: EncodeOptions,
    counts: Counter[str] | None = None,
    index: int | None = None,
) -> dict[str, list[int]] | None:
    """:func:`encode` with options that are already resolved. index: the record's place, if it came from no file."""
    _check_spans(record)
    messages = record.messages(long_prompt=options.long_prompt)
    where = f"{place_of(record.origin, index)}, field 'assistant'"
    return encode_messages(messages, tokenizer, options, record.spans, counts, where)


def encode_messages(
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    options: EncodeOptions,
    spans: list[Span] | None,
    counts: Counter[str] | None,
    where: str,
) -> dict[str, list[int]] | None:
    """A conversation as features. spans: of the last message; None gives no `routing_labels`. where: for warnings."""
    tally: Counter[str] = Counter()
    features, problem = _Encoder(messages, tokenizer, options, spans, tally).run()
    tally["encoded" if problem is None else problem] += 1
    if counts is not None:
        counts.update(tally)
        if isinstance(counts, RowCounts):
            counts.note((name for name, count in tally.items() if count), where)
    elif finding := problem or ("answer_cut" if tally["answer_cut"] else None):
        message = f"{where}: {_REASONS[finding]} (max_length {options.max_length})"
        warnings.warn(message, DataWarning, stacklevel=4)
    return features


_REASONS = {
    "no_response_template": "dropped, the response template is not in the text, or max_length cut it off",
    "nothing_to_train": "dropped, no token of the answer is left to train on",
    "answer_cut": "the end of the answer was cut off",
}


def _check_spans(record: Record) -> None:
    end = 0
    where = dict(zip(("path", "record"), record.origin or (None, None), strict=True))
    for span in record.spans:
        if span.label not in ROUTING:
            message = f"unknown label {span.label!r}; the labels are {', '.join(LABELS)}"
            raise DataError(message, field=f"spans.{span.start}-{span.end}", **where)  # type: ignore[arg-type]
        if not end <= span.start < span.end <= len(record.assistant):
            message = f"spans must be in text order, without overlap, within 0..{len(record.assistant)}"
            raise DataError(message, field=f"spans.{span.start}-{span.end}", **where)  # type: ignore[arg-type]
        end = span.end


class _Encoder:
    """One conversation on its way to features. T: tokens, n: spans.

    ids int64 [T]; offsets int64 [T,2] into the rendered text; pieces int64 [T]: how many cuts stand before the token.
    """

    def __init__(
        self,
        messages: list[dict[str, str]],
        tokenizer: PreTrainedTokenizerFast,
        options: EncodeOptions,
        spans: list[Span] | None,
        tally: Counter[str],
    ) -> None:
        self.messages, self.tokenizer, self.options, self.tally = messages, tokenizer, options, tally
        self.spans = spans or []
        self.labelled = spans is not None
        self.renderer = renderer_for(tokenizer)
        self.cut_up = options.label_tokenisation == "segments"
        self.rendered = self._render(messages, [s.end for s in self.spans])
        self.response = options.response_template or self.renderer.response_template(options.template_date)

    def _render(self, messages: list[dict[str, str]], ends: list[int]) -> Rendered:
        """The text with span ends as cuts. In offsets mode no mark may change how the template trims the answer."""
        if self.cut_up:
            return self.renderer.render(messages, self.options.template_date, ends)
        rendered = self.renderer.render(messages, self.options.template_date, [])
        low, high = rendered.contents[-1]
        lead = messages[-1]["content"].index(rendered.text[low:high])  # what the template trimmed before the answer
        return replace(rendered, cuts=[min(max(low + end - lead, low), high) for end in ends])

    def run(self) -> tuple[dict[str, list[int]] | None, str | None]:
        """(features, None), or (None, reason) for a row that is dropped."""
        self._tokenise()
        self._truncate()
        start = self._start()
        if start is None and self.options.missing_template == "drop":
            return None, "no_response_template"
        routing = self._routing(start)
        trained = self._trained(start)
        keep = ~self._separators()
        labels = np.where(trained, self.ids, IGNORED)[keep]
        if self.options.missing_template == "drop" and not np.any(labels != IGNORED):
            return None, "nothing_to_train"
        ids = self.ids[keep]
        features = {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "labels": labels.tolist(),
        }
        if self.labelled:
            features["routing_labels"] = routing[keep].tolist()
        return features, None

    def _tokenise(self) -> None:
        text, cuts = self.rendered.text, self.rendered.cuts if self.cut_up else []
        bounds = [0, *cuts, len(text)]
        plain = self.options.special_text == "plain" and self._has_added_text()
        runs = _plain_runs if plain else _runs
        ids, offsets, pieces = [], [], []
        for piece, (run_ids, run_offsets) in enumerate(runs(self.tokenizer, self.renderer, self.rendered, bounds)):
            ids += run_ids
            offsets += run_offsets
            pieces += [piece] * len(run_ids)
        offsets = _without_gaps(offsets, pieces, bounds)
        if self.options.double_bos:
            before, after = self.renderer.wrapping()
            ids = [*before, *ids, *after]
            offsets = [*[(0, 0)] * len(before), *offsets, *[(len(text), len(text))] * len(after)]
            pieces = [*[0] * len(before), *pieces, *[len(bounds) - 2] * len(after)]
        self.ids: Ints = np.array(ids, dtype=np.int64)
        self.offsets: Ints = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        self.pieces: Ints = np.array(pieces, dtype=np.int64)

    def _has_added_text(self) -> bool:
        return any(self.renderer.added_pattern.search(m["content"]) for m in self.messages)

    def _truncate(self) -> None:
        place = np.arange(len(self.ids))
        if self.options.truncation == "count_separators":
            place = place + self.pieces  # one separator would stand before each piece but the first
        kept = int(np.searchsorted(place, self.options.max_length))
        if kept == len(self.ids):
            return
        self.tally["truncated"] += 1
        self.tally["answer_cut"] += int(self.offsets[kept, 0] < self.rendered.contents[-1][1])
        self.ids, self.offsets, self.pieces = self.ids[:kept], self.offsets[:kept], self.pieces[:kept]

    def _start(self) -> int | None:
        """Index of the first token after the response template.

        Officially ("special") the first occurrence of its ids, wherever it stands; else the place where the template
        itself put it: before the labelled answer, or before the first answer of a chat.
        """
        if self.options.special_text == "special":
            pattern = self.tokenizer(self.response, add_special_tokens=False).input_ids
            return _find(self.ids, np.array(pattern, dtype=np.int64))
        roles = [m["role"] for m in self.messages]
        turn = len(roles) - 1 if self.labelled else roles.index("assistant")
        low, high = self.rendered.literals[turn]
        at = self.rendered.text.rfind(self.response, low, high)
        if at < 0:
            return None
        start = int(np.searchsorted(self.offsets[:, 0], at + len(self.response)))
        return start if start < len(self.ids) else None

    def _separators(self) -> NDArray[np.bool_]:
        """Bool [T]: separators that stand in the user's own text, which the official code takes for its own."""
        separator = self.renderer.separator
        if self.options.special_text != "special" or not self.labelled or not self.cut_up or separator is None:
            return np.zeros(len(self.ids), dtype=bool)
        found: NDArray[np.bool_] = self.ids == separator
        return found

    def _routing(self, start: int | None) -> Ints:
        """Expert of each token, int64 [T] (model.md 8.4)."""
        names = [ROUTING[s.label] for s in self.spans]
        experts = np.array([*names, LANGUAGE], dtype=np.int64)
        if names and self.options.last_span == "language":
            experts[len(names) - 1] = LANGUAGE
        if start is None and names:
            experts[0] = names[0]  # a row without template: the first span's label, even where it is the last span
        first = start or 0
        pieces = self.pieces
        if not self.cut_up:
            pieces = token_pieces(self.rendered.text, self.offsets, np.array(self.rendered.cuts, dtype=np.int64))
        extra = self._separators()
        extra[:first] = False
        routing = experts[np.minimum(pieces + np.cumsum(extra), len(names))]
        routing[:first] = LANGUAGE
        return routing

    def _trained(self, start: int | None) -> NDArray[np.bool_]:
        """Bool [T]: the tokens that the language loss sees (model.md 8.5)."""
        if start is None:
            return np.ones(len(self.ids), dtype=bool)
        if self.options.mask == "after_first_header":
            return np.arange(len(self.ids)) >= start
        return touches(self.offsets, np.array(self._answer_regions(), dtype=np.int64).reshape(-1, 2))

    def _answer_regions(self) -> list[tuple[int, int]]:
        """(start, end) of every answer, its end-of-turn token included: an added token that follows at once."""
        regions = []
        for turn, message in enumerate(self.messages):
            if message["role"] == "assistant":
                low, high = self.rendered.contents[turn]
                closing = self.renderer.added_pattern.match(self.rendered.text, high)
                regions.append((low, closing.end() if closing else high))
        return regions


def _without_gaps(offsets: list[tuple[int, int]], pieces: list[int], bounds: list[int]) -> list[tuple[int, int]]:
    """Offsets in which a token begins where the one before it ended, or earlier, but not before its piece.

    Tokenizers with `trim_offsets` leave white space out: "␣cat" has the range of "cat", and "␣" an empty one, which
    stands at its end or, for the first of a text, at its start.
    """
    result, before = [], 0
    for (start, end), piece in zip(offsets, pieces, strict=True):
        begin = max(min(start, before), bounds[piece])
        before = max(end, min(begin + 1, bounds[piece + 1]))
        result.append((begin, before))
    return result


Run = tuple[list[int], list[tuple[int, int]]]


def _runs(tokenizer: PreTrainedTokenizerFast, _: Renderer, rendered: Rendered, bounds: list[int]) -> list[Run]:
    """Ids and offsets of each piece of the text, added tokens recognised."""
    pieces = [rendered.text[a:b] for a, b in pairwise(bounds)]
    batch = tokenizer(
        pieces,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return [
        (ids, [(a + base, b + base) for a, b in offsets])
        for ids, offsets, base in zip(batch["input_ids"], batch["offset_mapping"], bounds[:-1], strict=True)
    ]


def _plain_runs(_: PreTrainedTokenizerFast, renderer: Renderer, rendered: Rendered, bounds: list[int]) -> list[Run]:
    """The same, with added tokens recognised in the template's own text only: messages are plain text."""
    special = list(_template_tokens(renderer, rendered))
    runs: list[Run] = []
    for low, high in pairwise(bounds):
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = low
        for a, b, index in [*((a, b, i) for a, b, i in special if low <= a and b <= high), (high, high, None)]:
            plain_ids, plain_offsets = renderer.plain_ids(rendered.text[at:a])
            ids += plain_ids
            offsets += [(x + at, y + at) for x, y in plain_offsets]
            if index is not None:
                ids.append(index)
                offsets.append((a, b))
            at = b
        runs.append((ids, offsets))
    return runs


def _template_tokens(renderer: Renderer, rendered: Rendered) -> Any:
    """(start, end, id) of the added tokens in the template's own text, with the white space that they absorb."""
    text = rendered.text
    for low, high in rendered.literals:
        for match in renderer.added_pattern.finditer(text, low, high):
            token = renderer.added[match[0]]
            start, end = match.span()
            while token.lstrip and start > 0 and text[start - 1].isspace():
                start -= 1
            while token.rstrip and end < len(text) and text[end].isspace():
                end += 1
            yield start, end, token.id


def _find(ids: Ints, pattern: Ints) -> int | None:
    """Index after the first occurrence of a non-empty pattern, or None."""
    if not 0 < len(pattern) <= len(ids):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
    hits = np.flatnonzero((windows == pattern).all(axis=1))
    return int(hits[0]) + len(pattern) if len(hits) else None
