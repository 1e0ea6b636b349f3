"""Errors of the package that are no plain ValueError or TypeError, and the words that all of them share."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class RunError(RuntimeError):
    """A run that was started properly and failed; the message says what is left on disk and how to go on."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` of the optional dependencies ``extra``.

    Raises:
        MissingExtraError: it is not installed. An import error inside an installed module is passed on as it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {module.split('.')[0]}: run `pip install 'micro-reasoners[{extra}]'`",
            name=error.name,
        ) from None


def choices(word: str, valid: Iterable[str]) -> str:
    """A clause for an error about an unknown name: the nearest valid one, or all of them."""
    names = sorted(map(str, valid))
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(repr, names))}"
