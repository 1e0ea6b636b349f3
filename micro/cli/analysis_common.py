"""What the analysis commands share: a model with its tokenizer, and the records or texts to run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_model(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder of ours or an official one."""
    from transformers import AutoTokenizer

    import micro

    model = micro.load(folder)
    try:
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: no tokenizer in this folder; copy tokenizer.json, tokenizer_config.json and "
            "chat_template.jinja of the backbone there"
        ) from error


def read_inputs(data: Path | None, texts: list[str], limit: int | None) -> list[Any]:
    """Records of a file, or the texts of the command line.

    Raises:
        ValueError: neither or both are given.
    """
    if (data is None) == (not texts):
        raise ValueError("give either --data FILE (labelled records) or one or more --text")
    if data is None:
        return texts[:limit]
    from micro.data import load_records

    return load_records(data)[:limit]


def expert_set(value: str | None) -> list[str] | None:
    """A comma list of experts, as sets are written on the command line."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def save_figure(figure: Any, path: Path) -> None:
    """PNG and SVG of a figure beside the numbers."""
    for suffix in (".png", ".svg"):
        beside = path.with_name(f".{path.name}{suffix}.part")
        figure.savefig(beside, format=suffix[1:], dpi=150)
        beside.replace(path.with_suffix(suffix))
