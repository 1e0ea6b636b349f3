"""What training sees of a row: each token in the colour of its expert, with the loss mask."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from micro.data.encoding import IGNORED
from micro.experts import COLOURS, DISPLAY_ORDER, MARKS, NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIM, _RESET, _UNDER = "\x1b[2m", "\x1b[0m", "\x1b[4m"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 60em; margin: 2em auto; padding: 0 1em; }
.row { border: 1px solid #dadce0; padding: 12px 16px; margin: 12px 0; line-height: 2.1; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.t { padding: 2px 0; background: color-mix(in srgb, var(--c, white) 25%, white); }
.t.trained { border-bottom: 3px solid var(--c, #202124); } .t.masked { opacity: .55; }
.t:hover { outline: 1px solid #202124; } .quiet { color: #5f6368; font-size: 13px; }
.swatch { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 14px; background: var(--c); }
"""


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds; joined, they are the decoded row.

    A character whose bytes are spread over several tokens stands at the last of them, the others are empty.
    """
    texts: list[str] = []
    pending: list[int] = []
    for index in ids:
        pending.append(int(index))
        text = str(tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        whole = not text.endswith("\ufffd") or len(pending) >= 4  # no character has more than four bytes
        texts.append(text if whole else "")
        if whole:
            pending = []
    if pending:
        texts[-1] = str(tokenizer.decode(pending, skip_special_tokens=False))
    return texts


def _visible(text: str) -> str:
    """Line ends and other control characters made visible, so that a token never moves the cursor."""
    shown = text.replace("\r", "␍").replace("\n", "␤\n").replace("\t", "⇥\t")
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in shown)


def _rows(features: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int | None, bool]]:
    """(text, expert or None, trained) of each token."""
    texts = token_texts(features["input_ids"], tokenizer)
    experts = features.get("routing_labels", [None] * len(texts))
    return [(t, e, label != IGNORED) for t, e, label in zip(texts, experts, features["labels"], strict=True)]


def preview(features: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, colour: bool = True) -> str:
    """One encoded row for a terminal: tokens in the colours of their experts, trained ones underlined, others dim.

    A letter in brackets (M logic, S social, W world, L language) stands where the expert changes. colour=False writes
    no escape codes: trained stretches stand between ⟦ and ⟧ instead.
    """
    out: list[str] = []
    before: tuple[int | None, bool] = (None, False)
    for text, expert, trained in _rows(features, tokenizer):
        if not colour and before[1] and not trained:
            out.append("⟧")
        if expert is not None and expert != before[0]:
            out.append(f"[{MARKS[expert]}]")
        if not colour and trained and not before[1]:
            out.append("⟦")
        out.append(_coloured(_visible(text), expert, trained) if colour else _visible(text))
        before = (expert, trained)
    return "".join(out) + ("⟧" if not colour and before[1] else "")


def _coloured(text: str, expert: int | None, trained: bool) -> str:
    if expert is None:
        hue = ""
    else:
        red, green, blue = (int(COLOURS[expert][i : i + 2], 16) for i in (1, 3, 5))
        hue = f"\x1b[38;2;{red};{green};{blue}m"
    # The underline must not run over a line end, where terminals would draw it to the margin.
    style = hue + (_UNDER if trained else _DIM)
    return "\n".join(f"{style}{part}{_RESET}" if part else "" for part in text.split("\n"))


def preview_html(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, title: str = "What training sees"
) -> str:
    """Encoded rows as one self-contained page: background by expert, a bar under trained tokens, details on hover."""
    legend = "".join(
        f"<span class='swatch' style='--c:{COLOURS[e]}'></span>{NAMES[e]} ({MARKS[e]})" for e in DISPLAY_ORDER
    )
    boxes = "".join(_box(number, row, tokenizer) for number, row in enumerate(rows))
    name = html.escape(title)
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{name}</title>"
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>{name}</h1><p class='quiet'>{legend}. A bar below: trained on. Pale: not trained on.</p>{boxes}"
        "</body></html>\n"
    )


def _box(number: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = _rows(row, tokenizer)
    spans = []
    for index, (text, expert, trained) in zip(row["input_ids"], tokens, strict=True):
        hue = "" if expert is None else f" style='--c:{COLOURS[expert]}'"
        tip = f"id {index}, {'no label' if expert is None else NAMES[expert]}, {'trained on' if trained else 'masked'}"
        kind = "trained" if trained else "masked"
        spans.append(f"<span class='t {kind}'{hue} title='{tip}'>{html.escape(_visible(text))}</span>")
    trained_on = sum(trained for *_, trained in tokens)
    head = f"<p class='quiet'>row {number}: {len(tokens)} tokens, {trained_on} of them trained on</p>"
    return f"{head}<div class='row'>{''.join(spans)}</div>"
