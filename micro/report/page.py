"""One self-contained HTML page: no script, style, font or picture from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SHORT = 28  # characters of a text that is not broken into lines
WIDE = 9  # columns of a table in small print

STYLE = """
:root { --ink: #202124; --quiet: #5f6368; --line: #dadce0; --paper: #fff; --soft: #f8f9fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--soft); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 48px 64px; background: var(--paper); min-height: 100vh; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p, ul { margin: 6px 0 12px; max-width: 78ch; }
.lead { color: var(--quiet); font-size: 16px; }
.note, figcaption { color: var(--quiet); font-size: 13px; }
figure { margin: 14px 0; } figure img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; margin: 10px 0 16px; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid var(--ink); padding: 4px 12px 4px 0; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0; vertical-align: top; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { max-width: 56ch; } td.short { white-space: nowrap; }
.verdict { border-left: 5px solid var(--c); background: color-mix(in srgb, var(--c) 8%, white);
  padding: 10px 16px; margin: 10px 0; max-width: 86ch; }
.verdict b { color: var(--c); }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; background: var(--soft); padding: 1px 4px; }
nav a { margin-right: 14px; color: #1a73e8; text-decoration: none; font-size: 14px; }
nav.contents { columns: 3 240px; margin: 18px 0 8px; padding: 12px 16px; background: var(--soft); }
nav.contents a { margin: 0; } nav.contents > div { break-inside: avoid; padding-bottom: 4px; }
nav.contents div div { padding-left: 14px; } nav.contents div div a { color: var(--quiet); font-size: 13px;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table.dense { font-size: 12.5px; } table.dense :is(th, td) { padding-right: 9px; }
pre.notes { font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; background: var(--soft); padding: 10px 14px;
  overflow-x: auto; white-space: pre; margin: 8px 0; }
dl.settings { display: flex; flex-wrap: wrap; gap: 2px 22px; margin: 8px 0 18px; font-size: 12.5px;
  color: var(--quiet); }
dl.settings dt { display: inline; } dl.settings dt::after { content: ": "; }
dl.settings dd { display: inline; margin: 0; color: var(--ink); overflow-wrap: anywhere; }
@media print {
  body, main { background: #fff; } main { max-width: none; padding: 0; }
  figure, .verdict, dl.settings { break-inside: avoid; } h2, h2 + p, h3 { break-after: avoid; }
  .wide, pre.notes { overflow: visible; } pre.notes { white-space: pre-wrap; } table { font-size: 11px; }
  thead { display: table-header-group; } tr { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


class Page:
    """Builds the page section by section; everything that is not marked as HTML is escaped.

    Args:
        title: of the page.
        lead: one sentence under the title.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._lead = lead
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._subsections: dict[str, list[tuple[str, str]]] = {}  # by anchor of the section
        self._styles = [STYLE]

    def section(self, title: str) -> None:
        """Start a section; it gets an entry in the navigation line."""
        anchor = f"s{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def subsection(self, title: str) -> None:
        """Start a part of the section; the navigation becomes a table of contents with two levels."""
        if not self._sections:
            raise ValueError("Page.subsection: start a section first")
        section = self._sections[-1][0]
        parts = self._subsections.setdefault(section, [])
        anchor = f"{section}-{len(parts) + 1}"
        parts.append((anchor, title))
        self._parts.append(f'<h3 id="{anchor}">{html.escape(title)}</h3>')

    def text(self, text: str, *, quiet: bool = False) -> None:
        """A paragraph."""
        kind = "note" if quiet else "body"
        self._parts.append(f"<p class='{kind}'>{html.escape(text)}</p>")

    def verdict(self, holds: bool, text: str) -> None:
        """A claim and whether it holds."""
        colour, word = ("#188038", "holds") if holds else ("#c5221f", "does not hold")
        self._parts.append(f'<div class="verdict" style="--c:{colour}"><b>{word}</b> · {html.escape(text)}</div>')

    def html(self, fragment: str, *, style: str = "") -> None:
        """A fragment that is already HTML, with its own style rules."""
        if style and style not in self._styles:
            self._styles.append(style)
        self._parts.append(fragment)

    def render(self) -> str:
        """The page as one string."""
        return (
            "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(self.title)}</title><style>{''.join(self._styles)}</style></head><body><main>"
            f"<h1>{html.escape(self.title)}</h1><p class='lead'>{html.escape(self._lead)}</p>{self._navigation()}\n"
            + "\n".join(self._parts)
            + "\n</main></body></html>\n"
        )

    def _navigation(self) -> str:
        """A line of links, or a table of contents where there are subsections."""

        def link(anchor: str, title: str) -> str:
            return f'<a href="#{anchor}">{html.escape(title)}</a>'

        if not self._subsections:
            return f"<nav>{''.join(link(*section) for section in self._sections)}</nav>"
        entries = []
        for section in self._sections:
            below = "".join(f"<div>{link(*part)}</div>" for part in self._subsections.get(section[0], []))
            entries.append(f"<div>{link(*section)}{below}</div>")
        return f'<nav class="contents" aria-label="Contents">{"".join(entries)}</nav>'

    def write(self, path: str | Path) -> None:
        """Write beside, then rename."""
        write_text(Path(path), self.render())


def figure_html(figure: Figure, caption: str) -> str:
    """A matplotlib figure as an embedded picture with a caption; the caption is also its alternative text."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "micro"}):  # the same numbers give the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def table_html(frame: pd.DataFrame, *, digits: int = 3) -> str:
    """A pandas frame as an HTML table, floats with fixed digits, everything escaped."""

    def cell(value: Any, places: int | None) -> str:
        if isinstance(value, float):
            return f"<td>{number(value, places)}</td>"
        kind = "" if not isinstance(value, str) else ' class="text"' if len(value) > SHORT else ' class="text short"'
        return f"<td{kind}>{html.escape(str(value)).replace(chr(10), '<br>')}</td>"

    names = list(frame.columns)
    columns = [frame.iloc[:, i].tolist() for i in range(len(names))]  # names may repeat
    texts = [any(isinstance(value, str) for value in column) for column in columns]
    places = [column_digits(column, digits) for column in columns]
    head = "".join(
        f"<th{' class=text' if text else ''}>{html.escape(str(name).replace('_', ' '))}</th>"
        for name, text in zip(names, texts, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(cell(v, d) for v, d in zip(row, places, strict=True))}</tr>"
        for row in zip(*columns, strict=True)
    )
    dense = " class='dense'" if len(names) > WIDE else ""
    table = f"<table{dense}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def without_repeats(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """(the frame without columns that repeat one long text in three rows or more, those texts with their names)."""
    repeated = [
        i
        for i in range(frame.shape[1])
        if len(frame) > 2 and len(str(frame.iloc[0, i])) > SHORT and len(set(map(str, frame.iloc[:, i]))) == 1
    ]
    told = [f"{frame.columns[i]}: {frame.iloc[0, i]}" for i in repeated]
    return frame.iloc[:, [i for i in range(frame.shape[1]) if i not in repeated]], told


def column_digits(values: Sequence[Any], digits: int = 3) -> int | None:
    """How many digits a column of numbers needs; None: two significant ones, where fixed digits would show zeros."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value)]
    largest = max(sizes, default=0.0)
    return digits if largest == 0 or 10.0**-digits <= largest < 1e7 else None


def number(value: float, digits: int | None = 3) -> str:
    """Fixed digits, or two significant ones where ``digits`` is None; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.2g}" if digits is None else f"{value:.{digits}f}"
