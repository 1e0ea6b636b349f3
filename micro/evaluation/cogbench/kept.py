"""What a run keeps in its folder: the table of every finished experiment, and of the one under way what is played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from micro.errors import require
from micro.evaluation.cogbench.experiment import Row
from micro.files import write_text

Counts = dict[str, int]  # questions, unreadable


class Kept:
    """Files of one experiment. What was made with other settings (agent, preset, runs, seed, variant, ...) is refused.

    Args:
        folder: of the run; made when something is kept.
        name: of the experiment.
        settings: what decides the answers, as JSON types.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self._note, self._table = folder / f"{name}.json", folder / f"{name}.csv"
        self._parts = folder / "parts"

    def table(self) -> tuple[Any, Counts] | None:
        """Table and counts of an earlier call; None if there is none.

        Raises:
            ValueError: it was made with other settings.
        """
        if not self._note.is_file() or not self._table.is_file():
            return None
        content = self._read(self._note)
        return require("pandas", "eval", "micro.evaluation.cogbench").read_csv(self._table), content["replies"]

    def save(self, table: Any, replies: Counts) -> None:
        """Keep a finished experiment; its parts go."""
        self._table.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._table, table.to_csv(index=False))
        # After the table, so that it says the table is whole.
        write_text(self._note, json.dumps({"settings": self.settings, "replies": replies}, indent=1) + "\n")
        for path in self._parts.glob(f"{self.name}-*.json"):
            path.unlink()
        if self._parts.is_dir() and not any(self._parts.iterdir()):
            self._parts.rmdir()

    def part(self, runs: range) -> tuple[list[Row], Counts] | None:
        """Rows and counts of some runs that were played side by side; None if they are not kept.

        Raises:
            ValueError: they were made with other settings.
        """
        path = self._part(runs)
        if not path.is_file():
            return None
        content = self._read(path)
        return content["rows"], content["replies"]

    def save_part(self, runs: range, rows: list[Row], replies: Counts) -> None:
        """Keep runs of an experiment that is not finished."""
        self._parts.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "replies": replies, "rows": rows}
        write_text(self._part(runs), json.dumps(content, default=lambda value: value.item()) + "\n")

    def _part(self, runs: range) -> Path:
        return self._parts / f"{self.name}-{runs.start}-{runs.stop}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != self.settings:
            both = {**self.settings, **content["settings"]}
            other = [key for key in both if content["settings"].get(key) != self.settings.get(key)]
            raise ValueError(
                f"{path}: made with another {' and '.join(other)}; name another output folder, or remove this file to "
                f"play {self.name} again"
            )
        return content
