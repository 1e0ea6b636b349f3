"""Records and conversations as Hugging Face data sets of encoded rows."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.data.chat import Chat, encode_conversation, iter_chat
from micro.data.encoding import encode_record, resolve_options
from micro.data.loading import iter_records
from micro.data.records import DataWarning, Record, RowCounts
from micro.errors import require
from micro.files import replace_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


def encode_all(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerFast, **encode_options: Any
) -> tuple[list[dict[str, list[int]]], RowCounts]:
    """The rows that `encode` keeps, and its counts."""
    options, counts = resolve_options(**encode_options), RowCounts()
    rows = (encode_record(record, tokenizer, options, counts, index) for index, record in enumerate(records))
    return [row for row in rows if row is not None], counts


def encode_all_chats(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerFast, **encode_options: Any
) -> tuple[list[dict[str, list[int]]], RowCounts]:
    """The rows that `encode_chat` keeps, and its counts."""
    options, counts = resolve_options(**encode_options), RowCounts()
    rows = (encode_conversation(chat, tokenizer, options, counts, index) for index, chat in enumerate(chats))
    return [row for row in rows if row is not None], counts


def to_dataset(records: Iterable[Record], tokenizer: PreTrainedTokenizerFast, **encode_options: Any) -> Dataset:
    """A `datasets.Dataset` with one encoded row per kept record; options as in :func:`micro.data.encode`.

    Dropped and truncated rows are counted in a DataWarning. ValueError if no row is left.
    """
    return _dataset(*encode_all(records, tokenizer, **encode_options))


def chat_to_dataset(chats: Iterable[Chat], tokenizer: PreTrainedTokenizerFast, **encode_options: Any) -> Dataset:
    """The same for conversations: rows without routing labels."""
    return _dataset(*encode_all_chats(chats, tokenizer, **encode_options))


def _dataset(rows: list[dict[str, list[int]]], counts: RowCounts) -> Dataset:
    datasets = require("datasets", "hf", "to_dataset")
    found = counts.summary()
    if not rows:
        raise ValueError(f"to_dataset: no row is left to train on ({found or 'there were no records'})")
    if found:
        warnings.warn(f"to_dataset: {counts['encoded']} rows encoded; {found}", DataWarning, stacklevel=3)
    return datasets.Dataset.from_list(rows)


def write_encoded(
    source: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    chats: bool,
    tokenizer_name: str,
    **encode_options: Any,
) -> RowCounts:
    """Encodes a file into a new folder: `rows.parquet` and `build.json` (counts, options, hashes). Returns the counts.

    The folder is written beside and renamed. FileExistsError: it is there already. ValueError: no row is left.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder or remove it")
    options = resolve_options(**encode_options)
    if chats:
        rows, counts = encode_all_chats(iter_chat(source), tokenizer, **encode_options)
    else:
        rows, counts = encode_all(iter_records(source), tokenizer, **encode_options)
    if not rows:
        raise ValueError(f"{source}: no row is left to train on ({counts.summary()})")
    receipt = {
        "source": str(source),
        "source_sha256": _sha256(source),
        "tokenizer": tokenizer_name,
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "options": asdict(options),
        "counts": dict(counts),
        "tokens": sum(len(row["input_ids"]) for row in rows),
    }
    pyarrow = require("pyarrow", "hf", "writing Parquet")
    parquet = require("pyarrow.parquet", "hf", "writing Parquet")
    with replace_folder(folder) as beside:
        parquet.write_table(pyarrow.Table.from_pylist(rows), beside / "rows.parquet")
        (beside / "build.json").write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    return counts


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
