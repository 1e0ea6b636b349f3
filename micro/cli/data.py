"""``micro data``: check, show, make and encode training data."""

from __future__ import annotations

import json as format_json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check, show, make and encode training data.")

File = Annotated[Path, typer.Argument(help="JSON list, JSON lines or Parquet: labelled answers or chats (messages).")]
TokenizerFolder = Annotated[str, typer.Option("--tokenizer", "-t", help="Folder or hub id of a tokenizer, or 'tiny'.")]
Preset = Annotated[str | None, typer.Option(help="'official' sets every switch as the published code has it.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest row in tokens (default 4096).")]
Gguf = Annotated[str | None, typer.Option(help="GGUF file in the tokenizer's folder.")]


@app.command()
def validate(
    file: File,
    repair: Annotated[bool, typer.Option(help="Mend duplicate and overlapping spans: the later one wins.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    most: Annotated[int, typer.Option(help="Problems to print at most; 0 prints all.", min=0)] = 50,
) -> None:
    """Report every problem of a file: record, field and reason. Exit status 2 where a record is unusable."""
    from micro.data import validate as check
    from micro.data import validate_chat

    report = validate_chat(file) if _holds_chats(file) else check(file, repair=repair)
    if json:
        fields = ("record", "field", "reason", "severity", "message")
        problems = [{name: getattr(p, name) for name in fields} for p in report.problems]
        typer.echo(
            format_json.dumps({"path": str(file), "ok": report.ok, "counts": report.counts, "problems": problems})
        )
    else:
        typer.echo(report.summary(most or None))
    if not report.ok:
        raise typer.Exit(2)


@app.command()
def preview(
    file: File,
    tokenizer: TokenizerFolder = "tiny",
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows to show.", min=1)] = 3,
    skip: Annotated[int, typer.Option(help="Rows to skip first.", min=0)] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page instead.")] = None,
    preset: Preset = None,
    max_length: MaxLength = None,
    gguf_file: Gguf = None,
) -> None:
    """Show what training sees: tokens in the colours of their experts, trained tokens underlined."""
    from micro.data import preview as as_text
    from micro.data import preview_html

    made = _tokenizer(tokenizer, gguf_file)
    encoded = list(islice(_encoded(file, made, {"preset": preset, "max_length": max_length}), skip, skip + rows))
    if not encoded:
        raise ValueError(f"{file}: no row is left after the first {skip}")
    if html is not None:
        from micro.files import write_text

        write_text(html, preview_html(encoded, made, title=file.name))
        typer.echo(str(html))
        return
    import os

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for number, row in enumerate(encoded, start=skip):
        trained = sum(label != -100 for label in row["labels"])
        typer.echo(f"--- row {number}: {len(row['input_ids'])} tokens, {trained} trained on")
        typer.echo(as_text(row, made, colour=colour))


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(help="File to write: JSON lines.")],
    n: Annotated[int, typer.Option("-n", help="How many records.", min=1)] = 1000,
    domains: Annotated[str, typer.Option(help="Comma list of domains.")] = "logic,social,world,language",
    split: Annotated[str, typer.Option(help="train or test; they share no template.")] = "train",
    seed: Annotated[int, typer.Option(help="Same seed, same file.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Conversations without labels (stage 3).")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
) -> None:
    """Write labelled answers from our own templates, or chats."""
    from micro.data import generate as make
    from micro.data import generate_chat, save_chat, save_records

    if out.exists() and not overwrite:
        raise ValueError(f"{out}: is there already; choose another name or pass --overwrite")
    names = [name.strip() for name in domains.split(",") if name.strip()]
    if chat:
        count = save_chat(generate_chat(n, domains=names, split=split, seed=seed), out)
    else:
        count = save_records(make(n, domains=names, split=split, seed=seed), out)
    typer.echo(f"{out}: {count} {'conversations' if chat else 'labelled answers'}")


@app.command()
def build(
    file: File,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    tokenizer: TokenizerFolder = "tiny",
    preset: Preset = None,
    max_length: MaxLength = None,
    gguf_file: Gguf = None,
) -> None:
    """Encode a file once: rows.parquet, and build.json with counts, options and the hash of the source."""
    from micro.data.dataset import write_encoded

    options = {"preset": preset, "max_length": max_length}
    made = _tokenizer(tokenizer, gguf_file)
    counts = write_encoded(file, out, made, chats=_holds_chats(file), tokenizer_name=tokenizer, **options)
    typer.echo(f"{out}: encoded {counts['encoded']}" + (f", {counts.summary()}" if counts.summary() else ""))


def _holds_chats(file: Path) -> bool:
    """Whether the first row that can be read is a conversation."""
    from micro.data import DataError
    from micro.data.reading import iter_rows

    try:
        row: Any = next(iter_rows(file, on_error=lambda _: None), (0, None))[1]
    except DataError:
        return False  # the check itself will say what is wrong
    return isinstance(row, dict) and "messages" in row and "assistant" not in row


def _tokenizer(name: str, gguf_file: str | None) -> Any:
    if name == "tiny":
        from micro.testing import tiny_tokenizer

        return tiny_tokenizer()
    from micro.errors import require

    require("transformers", "hf", "reading a tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **({} if gguf_file is None else {"gguf_file": gguf_file}))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no tokenizer could be read there ({str(error).splitlines()[0]})") from error


def _encoded(file: Path, tokenizer: Any, options: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    from micro.data import encode, encode_chat, iter_chat, iter_records

    rows: Iterable[dict[str, list[int]] | None]
    if _holds_chats(file):
        rows = (encode_chat(chat, tokenizer, **options) for chat in iter_chat(file))
    else:
        rows = (encode(record, tokenizer, **options) for record in iter_records(file))
    return (row for row in rows if row is not None)
