"""micro: mixtures of cognitive reasoners.

Public names are loaded on first use, so that ``import micro`` needs torch and numpy only and ``micro --help`` neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro.convert.collapse import collapse
    from micro.convert.load import load
    from micro.convert.upcycle import upcycle
    from micro.curriculum import Curriculum, FreezeRule, Stage
    from micro.engine import Engine

    __version__: str

# name -> module that defines it
_LAZY = {
    "upcycle": "micro.convert",
    "load": "micro.convert",
    "collapse": "micro.convert",
    "Curriculum": "micro.curriculum",
    "Stage": "micro.curriculum",
    "FreezeRule": "micro.curriculum",
    "Engine": "micro.engine",
}
# `micro.convert` is a package and, called, the function of interface.md 1.
_MODULES = (
    "analysis",
    "convert",
    "curriculum",
    "data",
    "deltas",
    "engine",
    "errors",
    "evaluation",
    "experts",
    "modeling",
    "ops",
    "optim",
    "progress",
    "report",
    "steering",
    "training",
)

__all__ = ["Curriculum", "Engine", "FreezeRule", "Stage", "__version__", "build_info", "collapse", "load", "upcycle"]


def build_info() -> dict[str, Any]:
    """The compiled core: torch it was built against, instruction set, CUDA architectures, compiler, path of each op."""
    from micro import _native

    return _native.build_info()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("micro-reasoners")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"micro.{name}")
    raise AttributeError(f"module 'micro' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", "build_info", *_LAZY, *_MODULES])
