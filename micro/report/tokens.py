"""Tokens coloured by expert: a layer slider, one line per layer, the vote over layers, probabilities on hover."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.report.palette import display_order, expert_colours, expert_marks

STYLE = """
.tokens { border: 1px solid var(--line, #dadce0); padding: 12px 16px; margin: 10px 0 18px; position: relative; }
.tokens .bar { display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; font-size: 13px;
  color: var(--quiet, #5f6368); }
.tokens input[type=range] { width: 220px; accent-color: #202124; }
.tokens .text { margin-top: 10px; line-height: 2.0; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens .t { border-bottom: 3px solid var(--c, transparent); border-top: 2px solid var(--y, transparent);
  padding: 1px 0;  background: color-mix(in srgb, var(--c, white) 30%, white); }
.tokens .t:empty::after { content: '\\00b7'; }
.tokens .t.prompt { opacity: 0.62; } .tokens .t:hover { outline: 1px solid #202124; }
.tokens details { margin-top: 10px; font-size: 13px; }
.tokens summary { color: var(--quiet, #5f6368); cursor: pointer; }
.tokens .lines { overflow-x: auto; margin-top: 6px; }
.tokens .lines table { margin: 0; font-size: 12px; } .tokens .lines td { border: 0; padding: 0 8px 2px 0; }
.tokens .lines tr { cursor: pointer; } .tokens .lines tr.on td:first-child { font-weight: 700; }
.tokens .lines td.line { white-space: pre; text-align: left; }
.tokens .lines i { font-style: normal; background: color-mix(in srgb, var(--c) 45%, white); }
.tokens .tip { position: absolute; z-index: 2; background: #202124; color: #fff; padding: 7px 10px;
  font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; pointer-events: none; display: none; white-space: pre;
  border-radius: 3px; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 5px; background: var(--c); }
"""

SCRIPT = """
(() => {
  const decode = s => Uint8Array.from(atob(s), c => c.charCodeAt(0));
  for (const box of document.querySelectorAll('.tokens[data-view]')) {
    if (box.dataset.ready) continue;
    box.dataset.ready = '1';
    const v = JSON.parse(box.dataset.view), E = v.experts.length, S = v.slots, L = v.layers;
    const p = decode(v.probs), first = decode(v.first), votes = decode(v.votes);
    const spans = [...box.querySelectorAll('.t')], tip = box.querySelector('.tip');
    const slider = box.querySelector('input[type=range]'), out = box.querySelector('output');
    const rows = [...box.querySelectorAll('.lines tr')];
    const colour = () => { const l = +slider.value;
      out.textContent = l < 0 ? 'vote of all layers' : 'layer ' + l;
      rows.forEach(r => r.classList.toggle('on', +r.dataset.layer === l));
      spans.forEach((t, s) => t.style.setProperty('--c', v.colours[l < 0 ? votes[s] : first[l * S + s]])); };
    slider.addEventListener('input', colour); colour();
    rows.forEach(r => r.addEventListener('click', () => { slider.value = r.dataset.layer; colour(); }));
    const show = (t, s) => { const l = +slider.value; const lines = [];
      for (const e of v.order) { let q = 0, n = 0;
        if (l < 0) { for (let k = 0; k < L; k++) { q += p[(k * S + s) * E + e] / L; n += first[k * S + s] === e; } }
        else q = p[(l * S + s) * E + e];
        lines.push(v.experts[e].padEnd(10) + (100 * q / 255).toFixed(0).padStart(4) + ' %'
          + (l < 0 ? ('  ' + n + ' of ' + L + ' layers') : '')); }
      const named = v.labels && v.labels[s] >= 0 ? '\\nlabel: ' + v.experts[v.labels[s]] : '';
      const text = t.textContent.replace(/[↵⇥]/g, '');
      tip.textContent = JSON.stringify(text) + (l < 0 ? '  mean over layers' : '  layer ' + l) + '\\n'
        + lines.join('\\n') + named;
      tip.style.display = 'block';
      tip.style.left = Math.min(t.offsetLeft, box.clientWidth - 260) + 'px';
      tip.style.top = (t.offsetTop + t.offsetHeight + 4) + 'px'; };
    const move = (s, key) => { const to = spans[s + (key === 'ArrowRight') - (key === 'ArrowLeft')];
      if (to) to.focus(); };
    spans.forEach((t, s) => { t.tabIndex = 0;
      t.addEventListener('keydown', e => { if (e.key === 'ArrowRight' || e.key === 'ArrowLeft') {
        e.preventDefault(); move(s, e.key); } });
      for (const on of ['mouseenter', 'focus']) t.addEventListener(on, () => show(t, s));
      for (const off of ['mouseleave', 'blur']) t.addEventListener(off, () => { tip.style.display = 'none'; }); });
  }
})();
"""


@dataclass
class TokenView:
    """One text with its routing.

    title: shown above; tokens: text of each slot; probs: float [L,S,E]; labels: expert id per slot or -1;
    prompt_length: slots that belong to the prompt.
    """

    title: str
    tokens: list[str]
    probs: NDArray[np.floating[Any]]
    experts: list[str]
    labels: list[int] | None = None
    prompt_length: int = 0

    def first(self) -> NDArray[np.int64]:
        """The first choice of every layer and slot, [L,S], ties to the lower id."""
        chosen: NDArray[np.int64] = self.probs.argmax(-1).astype(np.int64)
        return chosen

    def votes(self) -> list[int]:
        """The majority vote over layers for each slot, ties to the lower id."""
        counts = (self.first()[..., None] == np.arange(self.probs.shape[-1])).sum(0)
        return [int(v) for v in counts.argmax(-1)]

    def to_html(self) -> str:
        """The box for this text; :data:`STYLE` and :data:`SCRIPT` must stand on the page once."""
        layers, slots, _ = self.probs.shape
        colours, votes = expert_colours(self.experts), self.votes()
        view = {
            "experts": self.experts,
            "colours": colours,
            "order": display_order(self.experts),
            "layers": layers,
            "slots": slots,
            "labels": self.labels,
            "first": _bytes(self.first()),
            "votes": _bytes(np.asarray(votes)),
            "probs": _bytes((self.probs * 255).round()),
        }
        kinds = ["t prompt" if s < self.prompt_length else "t" for s in range(slots)]
        above = [f"--y:{colours[y]};" if y >= 0 else "" for y in self.labels or [-1] * slots]
        spans = "".join(
            f"<span class='{kind}' style='{label}--c:{colours[e]}'>{html.escape(visible(token))}</span>"
            for kind, token, e, label in zip(kinds, self.tokens, votes, above, strict=True)
        )
        data = html.escape(json.dumps(view, separators=(",", ":")), quote=True)
        return (
            f"<h3>{html.escape(self.title)}</h3><div class='tokens' data-view=\"{data}\"><div class='bar'>"
            f"<label>layer <input type='range' min='-1' max='{layers - 1}' value='-1'></label>"
            f"<output>vote of all layers</output>{legend_html(self.experts)}</div>"
            f"<div class='text'>{spans}</div>{self._lines()}<div class='tip'></div></div>"
        )

    def _lines(self) -> str:
        """One coloured line per layer, then the vote: always the same text, so that tokens stand in columns."""
        named = [(str(l), l, row) for l, row in enumerate(self.first())] + [("vote", -1, np.asarray(self.votes()))]
        rows = "".join(
            f"<tr data-layer='{l}'><td>{name}</td><td class='line'>{self._line(row)}</td></tr>"
            for name, l, row in named
        )
        return f"<details><summary>one line per layer</summary><div class='lines'><table>{rows}</table></div></details>"

    def _line(self, experts: NDArray[np.int64]) -> str:
        """Neighbours of one expert as one stretch."""
        colours = expert_colours(self.experts)
        starts = [s for s in range(len(experts)) if s == 0 or experts[s] != experts[s - 1]]
        return "".join(
            f"<i style='--c:{colours[experts[a]]}' title='{html.escape(self.experts[experts[a]], quote=True)}'>"
            f"{html.escape(visible(''.join(self.tokens[a:b]), one_line=True))}</i>"
            for a, b in zip(starts, [*starts, len(experts)][1:], strict=True)
        )

    def _repr_html_(self) -> str:
        """For notebooks: the box with its own style and script."""
        return f"<style>{STYLE}</style>{self.to_html()}<script>{SCRIPT}</script>"

    def to_ansi(self) -> str:
        """The answer coloured for a terminal, with the vote's letter mark before each change of expert."""
        colours, marks = expert_colours(self.experts), expert_marks(self.experts)
        out, previous = [], -1
        for token, e in zip(self.tokens[self.prompt_length :], self.votes()[self.prompt_length :], strict=True):
            red, green, blue = (int(colours[e][i : i + 2], 16) for i in (1, 3, 5))
            mark = f"[{marks[e]}]" if e != previous else ""
            shown = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in token)
            out.append(f"\x1b[38;2;{red};{green};{blue}m{mark}{shown}\x1b[0m")
            previous = e
        return "".join(out)


def _bytes(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values.astype(np.uint8)).tobytes()).decode("ascii")


def visible(text: str, *, one_line: bool = False) -> str:
    """Line ends and tabs with a mark (``one_line``: the mark alone), other control characters as U+FFFD."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\n", "↵" if one_line else "↵\n").replace("\t", "⇥" if one_line else "⇥\t")
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def legend_html(experts: Sequence[str]) -> str:
    """Colour, letter mark and name of each expert, in display order."""
    colours, marks = expert_colours(experts), expert_marks(experts)
    return "".join(
        f"<span><span class='swatch' style='--c:{colours[e]}'></span>{html.escape(experts[e])} ({marks[e]})</span>"
        for e in display_order(experts)
    )


def token_views_html(views: Sequence[TokenView]) -> str:
    """All boxes with their script; pass :data:`STYLE` to the page."""
    return "".join(view.to_html() for view in views) + f"<script>{SCRIPT}</script>"
