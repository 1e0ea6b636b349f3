"""Metrics on disk: metrics.jsonl, flushed at every record, and on request a CSV table and TensorBoard files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micro.files import write_text

JSONL, CSV, TENSORBOARD = "metrics.jsonl", "metrics.csv", "tensorboard"
# Bounded keys: nested records become "load.logic", "load_by_layer.3.logic"; those of every layer stay out of
# TensorBoard.
PER_LAYER = ("load_by_layer", "label_accuracy_by_layer")


class MetricsWriter:
    """Appends records of a run. `trim` first removes what an interrupted run wrote after the point that is resumed
    from.
    """

    def __init__(self, folder: Path, reporters: Sequence[str] = ()) -> None:
        self.folder, self.reporters = folder, tuple(reporters)
        self._board: Any = None
        if "tensorboard" in self.reporters:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("report_to: tensorboard needs the package: pip install tensorboard") from None
            self._board = SummaryWriter(str(folder / TENSORBOARD))

    def trim(self, stage_index: int, step: int) -> None:
        """Drop records of later stages, and of this stage after `step`: they are about to be made again."""
        path = self.folder / JSONL
        if not path.is_file():
            return
        kept, records = [], []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while writing it
            if (record["stage_index"], record["step"]) <= (stage_index, step):
                kept.append(line)
                records.append(record)
        write_text(path, "".join(f"{line}\n" for line in kept))
        if "csv" in self.reporters:
            (self.folder / CSV).unlink(missing_ok=True)
            for record in records:
                self._write_csv(record)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on its way to the disk when this returns."""
        with (self.folder / JSONL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record)) + "\n")
        if "csv" in self.reporters:
            self._write_csv(record)
        if self._board is not None:
            self._write_board(record)

    def _write_csv(self, record: dict[str, Any]) -> None:
        """A long table stage, step, name, value: stages differ in their columns, and every reader can pivot it."""
        path = self.folder / CSV
        fresh = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            if fresh:
                table.writerow(["stage", "stage_index", "step", "name", "value"])
            head = [record["stage"], record["stage_index"], record["step"]]
            for name, value in flat(record).items():
                if name not in ("stage", "stage_index", "step"):
                    table.writerow([*head, name, value])

    def _write_board(self, record: dict[str, Any]) -> None:
        for name, value in flat({k: v for k, v in record.items() if k not in PER_LAYER}).items():
            if isinstance(value, (int, float)) and name not in ("stage_index", "step"):
                self._board.add_scalar(f"{record['stage']}/{name.replace('.', '/')}", value, record["step"])
        self._board.flush()

    def close(self) -> None:
        """Close what is open."""
        if self._board is not None:
            self._board.close()


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists with dotted names; None is left out."""
    result: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            result[f"{prefix}{name}"] = value
    return result


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON: they are written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
