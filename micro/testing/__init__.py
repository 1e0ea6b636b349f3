"""Fixtures for tests and examples. Names are loaded on first use: importing this package loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro.testing.tokenizers import tiny_tokenizer as tiny_tokenizer

_HOMES = {"tiny_tokenizer": "micro.testing.tokenizers"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'micro.testing' has no attribute {name!r}")
