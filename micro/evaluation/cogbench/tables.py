"""Reading tables of experiments: frames or CSV files, from any engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import Array
from micro.errors import require

Integers = NDArray[np.int64]
_WORDS = {"true": 1.0, "false": 0.0}


def read_table(table: Any, columns: Sequence[str], experiment: str) -> Any:
    """A pandas frame with the needed columns only, with a fresh index.

    Raises:
        TypeError: ``table`` is neither a frame nor a path.
        ValueError: no rows, or a column is missing.
        FileNotFoundError: the path does not exist.
    """
    pd = require("pandas", "eval", "micro.evaluation.cogbench")
    if isinstance(table, str | Path):
        table = pd.read_csv(table)
    if not isinstance(table, pd.DataFrame):
        raise TypeError(
            f"{experiment}: table must be a pandas DataFrame or the path of a CSV file, got {type(table).__name__}"
        )
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise ValueError(
            f"{experiment}: the table has no column {', '.join(map(repr, missing))}; needed are {', '.join(columns)}"
        )
    if table.empty:
        raise ValueError(f"{experiment}: the table has no rows")
    return table[list(columns)].reset_index(drop=True)


def numbers(frame: Any, column: str) -> Array:
    """A column as float64; True and False (also as words) count as 1 and 0.

    Raises:
        ValueError: an entry is no finite number; the message names column and row.
    """
    raw = frame[column].tolist()
    out = np.empty(len(raw))
    for i, value in enumerate(raw):
        try:
            out[i] = _WORDS.get(str(value).strip().lower(), np.nan) if isinstance(value, str) else float(value)
            if isinstance(value, str) and np.isnan(out[i]):
                out[i] = float(value)
        except (TypeError, ValueError):
            out[i] = np.nan
        if not np.isfinite(out[i]):
            raise ValueError(f"column {column!r}, row {i}: expected a number, got {value!r}")
    return out


def flags(frame: Any, column: str) -> Array:
    """A column of 0 and 1.

    Raises:
        ValueError: another value.
    """
    out = numbers(frame, column)
    wrong = np.flatnonzero((out != 0) & (out != 1))
    if len(wrong):
        raise ValueError(f"column {column!r}, row {wrong[0]}: expected 0 or 1, got {out[wrong[0]]:g}")
    return out


def words(frame: Any, column: str, allowed: Sequence[str]) -> Any:
    """A column of given letters, as an object array.

    Raises:
        ValueError: another value.
    """
    out = np.asarray([str(value).strip().upper() for value in frame[column].tolist()], dtype=object)
    wrong = [i for i, value in enumerate(out) if value not in allowed]
    if wrong:
        raise ValueError(f"column {column!r}, row {wrong[0]}: expected {' or '.join(allowed)}, got {out[wrong[0]]!r}")
    return out


def ordered(frame: Any, *columns: str) -> tuple[Any, Integers]:
    """The frame sorted by run and by columns (rows that tie stay as stored), and the index of each row's run."""
    keys = [numbers(frame, column) for column in reversed(columns)]
    _, run = np.unique(np.asarray(frame["run"].tolist()), return_inverse=True)
    order = np.lexsort((*keys, run))
    return frame.iloc[order].reset_index(drop=True), run[order].astype(np.int64)


def sums(run: Integers, values: Array) -> Array:
    """Sum of values [rows, ...] per run -> [runs, ...]."""
    out = np.zeros((int(run.max()) + 1, *values.shape[1:]))
    np.add.at(out, run, values)
    return out
