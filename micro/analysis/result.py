"""What every analysis returns: a table, numbers in JSON and CSV, a figure drawn from the numbers alone."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plain(value: Any) -> Any:
    """Numbers, arrays and (nested) lists of them as JSON types; NaN, which JSON does not know, becomes None."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Result(ABC):
    """Base of all reports. A subclass is a dataclass that names itself, holds JSON types only, and draws itself."""

    name: ClassVar[str]
    apart: ClassVar[tuple[str, ...]] = ()  # fields that :meth:`save` of a subclass writes to files of their own
    settings: dict[str, Any]  # how the numbers were made; commands add what they were called with

    def to_dict(self) -> dict[str, Any]:
        """All numbers and settings, as JSON types, without what is kept apart."""
        return {
            f.name: deepcopy(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if f.name not in self.apart
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        return cls(**content)

    @abstractmethod
    def table(self) -> pd.DataFrame:
        """The numbers that a paper would print, as a pandas frame."""

    @abstractmethod
    def plot(self) -> Figure:
        """A matplotlib figure, drawn from the stored numbers."""

    def save(self, folder: str | Path) -> None:
        """Write ``<name>.json`` (everything) and ``<name>.csv`` (the table) into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.name}.json", json.dumps({"kind": self.name, **self.to_dict()}, indent=1) + "\n")
        write_text(folder / f"{self.name}.csv", self.table().to_csv(index=False))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read ``<name>.json`` back, from its folder or the file itself.

        Raises:
            ValueError: the file holds another kind of result.
        """
        path = Path(path)
        path = path / f"{cls.name}.json" if path.is_dir() else path
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("kind", None) != cls.name:
            raise ValueError(f"{path}: this file does not hold a result of kind {cls.name!r}")
        return cls.from_dict(content)

    def __str__(self) -> str:
        return str(self.table().to_string(index=False, float_format=lambda value: f"{value:.3f}"))
