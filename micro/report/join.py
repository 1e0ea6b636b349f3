"""One page of all saved results: figures drawn from the stored numbers, tables, settings and seeds."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.report.collect import Collection, Found, Training, collect
from micro.report.page import Page, figure_html, table_html, without_repeats
from micro.report.registry import KINDS

if TYPE_CHECKING:
    import pandas as pd

    from micro.analysis.result import Result

ROWS = 24  # of a table; the CSV file beside the result holds all of them
VALUE = 300  # characters of a setting


def build_report(folder: str | Path, title: str = "MiCRo report") -> tuple[Page, Collection]:
    """The page of everything below ``folder``, and what was found there.

    Raises:
        NotADirectoryError: no such folder.
        ValueError: it holds no result.
    """
    found = collect(folder)
    if not found:
        unread = "; ".join(f"{found.place(path)}: {why}" for path, why in found.unread.items())
        raise ValueError(
            f"{folder}: no saved results below it" + (f" that can be read ({unread})" if unread else "")
            + "; run micro route, ablate, localize, evaluate or train first"
        )  # fmt: skip
    count = len(found)
    page = Page(title, f"{count} saved result{'s' if count != 1 else ''} from {Path(folder).name or folder}")
    for path, summary in found.demos:
        _demo(page, found.place(path.parent), summary)
    if found.trainings:
        page.section("Training")
        page.text("Language-modelling loss of each optimizer step, one panel per stage.", quiet=True)
        for run in found.trainings:
            _training(page, found, run)
    for name, kind in KINDS.items():
        members = found.of(name)
        if members:
            page.section(kind.heading)
            page.text(kind.text, quiet=True)
        for member in members:
            _result(page, found, member)
    _unread(page, found)
    return page, found


def _result(page: Page, found: Collection, member: Found) -> None:
    """Figure, table, notes and settings; what fails is said in its place."""
    place, result = found.place(member.path.parent), member.result
    page.subsection(KINDS[member.kind].heading if place == "." else place)
    settings = getattr(result, "settings", None) or {}
    try:
        page.html(figure_html(result.plot(), _caption(found, member, settings)))
    except Exception as error:  # a figure that cannot be drawn must not cost the numbers
        page.text(f"The figure could not be drawn: {type(error).__name__}: {error}", quiet=True)
    try:
        frame = result.table()
        page.html(limited_table(frame, f"{found.place(member.path.with_suffix('.csv'))}"))
        note = notes(result)
    except Exception as error:
        page.text(f"The table could not be made: {type(error).__name__}: {error}", quiet=True)
        note = ""
    if note:
        page.html(f'<pre class="notes">{html.escape(note)}</pre>')
    own = member.path.with_suffix(".html")
    if own.is_file():
        page.text(f"A page of its own shows more: {found.place(own)}", quiet=True)
    page.html(settings_html(settings))


def _caption(found: Collection, member: Found, settings: dict[str, Any]) -> str:
    parts = [f"{KINDS[member.kind].heading}, drawn from {found.place(member.path)}"]
    parts += [f"{key} {settings[key]}" for key in ("model", "data", "seed") if settings.get(key) is not None]
    return "; ".join(parts) + "."


def limited_table(frame: pd.DataFrame, path: str) -> str:
    """The first rows of a table; ``path`` names the file that holds all of them."""
    lean, told = without_repeats(frame)
    if len(frame) > ROWS:
        told.append(f"The first {ROWS} of {len(frame)} rows; all of them: {path}")
    return table_html(lean.head(ROWS)) + "".join(f'<p class="note">{html.escape(text)}</p>' for text in told)


def notes(result: Result) -> str:
    """What a result prints below its table, or all of it where the table is printed in another form."""
    from micro.analysis.result import Result

    return str(result).replace(Result.__str__(result), "", 1).strip("\n")


def settings_html(settings: dict[str, Any]) -> str:
    """Settings, seeds and switches as a list of names and values."""
    if not settings:
        return ""
    entries = []
    for key, value in settings.items():
        if value is None or value in ({}, []):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        text = text if len(text) <= VALUE else f"{text[:VALUE]} ..."
        entries.append(f"<div><dt>{html.escape(str(key))}</dt><dd>{html.escape(text)}</dd></div>")
    return f'<dl class="settings">{"".join(entries)}</dl>'


def _training(page: Page, found: Collection, run: Training) -> None:
    from micro.analysis.figures import loss_figure

    page.subsection(found.place(run.path.parent))
    seed = run.record.get("seed")
    told = "" if seed is None else f"; seed {seed}"
    page.html(figure_html(loss_figure(run.metrics), f"Loss, drawn from {found.place(run.path)}{told}."))
    frame = stages_table(run.record)
    if frame is not None:
        page.html(table_html(frame))


def stages_table(record: dict[str, Any]) -> pd.DataFrame | None:
    """Steps, tokens and state of each stage, from run.json; None where it does not say."""
    import pandas as pd

    plan, states = record.get("plan", {}).get("stages", []), record.get("stages", [])
    rows = [
        {
            "stage": str(stage.get("name", "")),
            "steps": stage.get("steps"),
            "rows": stage.get("rows"),
            "tokens": stage.get("tokens"),
            "state": str(state.get("status", "")),
        }
        for stage, state in zip(plan, states, strict=False)
    ]
    return pd.DataFrame(rows) if rows else None


def _demo(page: Page, place: str, summary: dict[str, Any]) -> None:
    """The claims of a demo; its own page holds the rest."""
    page.section("Demo")
    page.subsection(place)
    for verdict in summary["verdicts"]:
        page.verdict(bool(verdict.get("holds")), str(verdict.get("claim", "")))


def _unread(page: Page, found: Collection) -> None:
    if not found.unread:
        return
    import pandas as pd

    page.section("Not in this page")
    page.text("Files below the folder that look like results and could not be shown.", quiet=True)
    rows = [{"file": found.place(path), "why": why} for path, why in found.unread.items()]
    page.html(table_html(pd.DataFrame(rows)))
