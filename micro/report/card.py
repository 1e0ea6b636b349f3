"""The part of a model card that results fill: training, routing figure, evaluation with ablations."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.files import write_text
from micro.report.collect import Collection, Found, Training
from micro.report.join import notes, stages_table
from micro.report.page import column_digits, number, without_repeats
from micro.report.registry import KINDS

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- micro report: begin -->", "<!-- micro report: end -->"
PICTURES = "report"  # folder for the pictures, beside the card
ROWS = 24


def update_card(folder: str | Path, found: Collection) -> Path:
    """Write what was found into ``README.md`` of a model folder, between two marks, and its pictures beside it.

    What stood between the marks before is replaced; the rest of the card is left as it is. A card without marks gets
    the part before its limits or, without those, at its end; a folder without a card gets one. Results whose settings
    name another model are left out.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder holds no model, or nothing of what was found belongs to it.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json, so it is no model folder")
    results = [member for member in found.results if KINDS[member.kind].card and _is_about(member, folder)]
    trainings = [run for run in found.trainings if _has_trained(run, folder)]
    if not results and not trainings:
        raise ValueError(
            f"{folder}: none of the {len(found)} results below {found.folder} belongs to this model; run micro route, "
            "ablate or evaluate on it first"
        )
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else _fresh(folder)
    write_text(path, _insert(text, _section(folder, found, results, trainings)))
    return path


def _is_about(member: Found, folder: Path) -> bool:
    """Whether a result names this model, or none."""
    named = (getattr(member.result, "settings", None) or {}).get("model")
    return named is None or Path(str(named)).resolve() == folder.resolve()


def _has_trained(run: Training, folder: Path) -> bool:
    """Whether the folder is a model that the run wrote."""
    return run.path.parent.resolve() in folder.resolve().parents


def _fresh(folder: Path) -> str:
    import micro
    from micro.convert.card import model_card

    return model_card(micro.load(folder))


def _insert(text: str, section: str) -> str:
    """``section`` in its place.

    Raises:
        ValueError: only one of the two marks is there.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if (begin < 0) != (end < 0) or end < begin:
        raise ValueError(f"README.md: the marks {BEGIN!r} and {END!r} must both be there, in this order, or none")
    if begin >= 0:
        return text[:begin] + section + text[end + len(END) :]
    for heading in ("\n## Limits", "\n## Citation"):
        place = text.find(heading)
        if place >= 0:
            return f"{text[: place + 1]}{section}\n\n{text[place + 1 :]}"
    return f"{text.rstrip()}\n\n{section}\n"


def _section(folder: Path, found: Collection, results: list[Found], trainings: list[Training]) -> str:
    parts = [BEGIN]
    for run in trainings:
        parts += _training(run)
    for part, heading in (("routing", "## Routing"), ("evaluation", "## Evaluation")):
        members = [m for kind in KINDS for m in results if m.kind == kind and KINDS[kind].card == part]
        if members:
            parts.append(heading)
        for member in members:
            parts += _result(folder, found, member)
    return "\n\n".join([*parts, END])


def _training(run: Training) -> list[str]:
    frame = stages_table(run.record)
    parts = ["## Training"]
    if frame is not None:
        parts.append(markdown_table(frame))
    sources = [name for stage in run.record.get("data", []) for name in stage.get("files_sha256", {})]
    told = ", ".join(dict.fromkeys(sources)) or "unknown"
    parts.append(f"Seed {run.record.get('seed', 'unknown')}; training data: {told} (licences: unknown).")
    return parts


def _result(folder: Path, found: Collection, member: Found) -> list[str]:
    kind, place = KINDS[member.kind], found.place(member.path.parent)
    title = kind.heading if place in (".", member.kind) else f"{kind.heading} ({place})"
    parts = [f"### {_escaped(title)}", kind.text]
    name = "-".join([*member.path.parent.relative_to(found.folder).parts, member.kind])
    picture = _picture(folder, member, f"{name}.png".replace(" ", "_"))
    if picture is not None:
        parts.append(f"![{kind.heading}]({picture})")
    parts.append(markdown_table(member.result.table()))
    note = notes(member.result)
    if note:
        parts.append("\n".join(f"    {line}" for line in note.splitlines()))
    return parts


def _picture(folder: Path, member: Found, name: str) -> str | None:
    """Save the figure into the model folder and return its relative path; None where it cannot be drawn."""
    try:
        figure = member.result.plot()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    except Exception:  # the card is about the numbers; the page says why a figure is missing
        return None
    target = folder / PICTURES / name
    target.parent.mkdir(exist_ok=True)
    beside = target.with_name(f".{name}.part")
    beside.write_bytes(buffer.getvalue())
    beside.replace(target)
    return f"{PICTURES}/{name}"


def markdown_table(frame: pd.DataFrame) -> str:
    """A pandas frame as a Markdown table, floats with three digits; at most 24 rows, and it says so."""
    lean, told = without_repeats(frame)
    header = [_escaped(str(name).replace("_", " ")) for name in lean.columns]
    aligned = ["---:" if kind.kind in "fiu" else "---" for kind in lean.dtypes]
    columns = [lean.iloc[:ROWS, i].tolist() for i in range(len(header))]
    cells = [[_cell(value, column_digits(column)) for value in column] for column in columns]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, aligned, *zip(*cells, strict=True)])
    if len(frame) > ROWS:
        told.append(f"(the first {ROWS} of {len(frame)} rows)")
    return "\n\n".join([table, *map(_escaped, told)])


def _cell(value: Any, digits: int | None) -> str:
    return number(value, digits) if isinstance(value, float) else _escaped(str(value))


def _escaped(text: str) -> str:
    """Text of users in Markdown: no markup, no new cells, no lines."""
    for character in "\\`*_{}[]<>#|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
