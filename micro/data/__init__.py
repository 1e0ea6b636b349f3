"""Labelled answers and chat data: reading, checking, generating, and turning them into tokens, labels and batches.

Every name is loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro.data.baseline import BagOfWords as BagOfWords
    from micro.data.baseline import bag_of_words_baseline as bag_of_words_baseline
    from micro.data.chat import Chat as Chat
    from micro.data.chat import encode_chat as encode_chat
    from micro.data.chat import iter_chat as iter_chat
    from micro.data.chat import load_chat as load_chat
    from micro.data.chat import save_chat as save_chat
    from micro.data.chat import validate_chat as validate_chat
    from micro.data.collator import Collator as Collator
    from micro.data.dataset import chat_to_dataset as chat_to_dataset
    from micro.data.dataset import to_dataset as to_dataset
    from micro.data.encoding import encode as encode
    from micro.data.generators import generate as generate
    from micro.data.generators import generate_chat as generate_chat
    from micro.data.loading import Report as Report
    from micro.data.loading import iter_records as iter_records
    from micro.data.loading import load_records as load_records
    from micro.data.loading import save_records as save_records
    from micro.data.loading import validate as validate
    from micro.data.previews import preview as preview
    from micro.data.previews import preview_html as preview_html
    from micro.data.records import DataError as DataError
    from micro.data.records import DataWarning as DataWarning
    from micro.data.records import Record as Record
    from micro.data.records import Span as Span

_HOMES = {
    "baseline": ("BagOfWords", "bag_of_words_baseline"),
    "chat": ("Chat", "encode_chat", "iter_chat", "load_chat", "save_chat", "validate_chat"),
    "collator": ("Collator",),
    "dataset": ("chat_to_dataset", "to_dataset"),
    "encoding": ("encode",),
    "generators": ("generate", "generate_chat"),
    "loading": ("Report", "iter_records", "load_records", "save_records", "validate"),
    "previews": ("preview", "preview_html"),
    "records": ("DataError", "DataWarning", "Record", "Span"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'micro.data' has no attribute {name!r}")
    value = getattr(import_module(f"micro.data.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
