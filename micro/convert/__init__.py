"""Conversion: dense -> experts, official <-> ours, experts -> dense, and the folders that hold them.

``micro.convert`` is both this package and a function (``micro.convert(model, out, to="official")``): the package can be
called, and does what :func:`micro.convert.official.convert` does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from micro.errors import require

require("transformers", "hf", "micro.convert")  # before the imports below fail with less to say

from micro.convert.collapse import collapse, save_dense  # noqa: E402
from micro.convert.load import load  # noqa: E402
from micro.convert.official import convert, save  # noqa: E402
from micro.convert.upcycle import upcycle  # noqa: E402

__all__ = ["collapse", "convert", "load", "save", "save_dense", "upcycle"]


class _CallablePackage(ModuleType):
    """Importing a subpackage binds it as ``micro.convert``, over the function of that name; so it is callable."""

    def __call__(self, model_or_folder: Any, out: str | Path, **options: Any) -> Path:
        """See :func:`micro.convert.official.convert`."""
        return convert(model_or_folder, out, **options)


sys.modules[__name__].__class__ = _CallablePackage
