"""What a localizer found, and what the lesion of its units costs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from micro.analysis.localizers.statistics import Mask
from micro.analysis.result import Result
from micro.analysis.statistics import Array
from micro.files import write_text
from micro.report.palette import display_order

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ARRAYS = ("t", "p", "q", "mask")


@dataclass
class LocalizerResult(Result):
    """The units that a localizer selects, and how they are spread over layers and experts.

    Shares of experts are of the selected units. ``rate`` is the share of a cell's units that are selected (a *cell* is
    one expert in one layer). Bands are 95 % intervals: ``random`` of masks of the same size drawn at random (chance),
    ``permuted`` of masks found under shuffled labels of the stimuli. t, p, q: float64 [L,E,W]; mask: bool [L,E,W]; they
    are saved beside the JSON file in ``localizer.npz``.
    """

    name: ClassVar[str] = "localizer"
    apart: ClassVar[tuple[str, ...]] = ARRAYS

    localizer: str
    source: str
    unit: str
    experts: list[str]
    stimuli: list[int]  # positive, negative
    selected: int
    units: int
    units_per_cell: int
    counts: list[list[int]]  # [L][E]
    rate: list[list[float]]  # [L][E]
    rate_random: list[list[list[float]]]  # [L][E][2]
    share: list[float]  # [E]
    share_random: list[list[float]]  # [E][2]
    share_permuted: list[list[float]] | None
    stimuli_used: list[list[list[int]]]  # [L][E][2], where n varies with routing
    significant: int  # units with t > 0 and q <= settings["q"]
    significant_by_cell: list[list[int]]  # [L][E]
    specificity: dict[str, Any] | None = None
    distractors: dict[str, Any] | None = None
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    t: Array | None = field(default=None, repr=False, compare=False)
    p: Array | None = field(default=None, repr=False, compare=False)
    q: Array | None = field(default=None, repr=False, compare=False)
    mask: Mask | None = field(default=None, repr=False, compare=False)

    def save(self, folder: str | Path) -> None:
        """Write ``localizer.json``, ``.csv`` (experts), ``localizer_cells.csv`` and the arrays, ``localizer.npz``."""
        super().save(folder)
        folder = Path(folder)
        write_text(folder / f"{self.name}_cells.csv", self.cells().to_csv(index=False))
        arrays = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        beside = folder / f".{self.name}.{os.getpid()}.npz"
        try:
            np.savez_compressed(beside, allow_pickle=False, **arrays)
            beside.replace(folder / f"{self.name}.npz")
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the result back from its folder or JSON file; the arrays are None where ``localizer.npz`` is missing."""
        result = super().load(path)
        path = Path(path)
        arrays = (path if path.is_dir() else path.parent) / f"{cls.name}.npz"
        if arrays.is_file():
            with np.load(arrays, allow_pickle=False) as found:
                for name in found.files:
                    setattr(result, name, found[name])
        return result

    def table(self) -> pd.DataFrame:
        """One row per expert: selected units, their share, and the bands of chance and of shuffled labels."""
        import pandas as pd

        counts = np.asarray(self.counts).sum(0)
        rows: dict[str, list[Any]] = {
            "expert": self.experts,
            "units selected": counts.tolist(),
            "share": self.share,
            "chance low": [low for low, _ in self.share_random],
            "chance high": [high for _, high in self.share_random],
        }
        if self.share_permuted is not None:
            rows["permuted low"] = [low for low, _ in self.share_permuted]
            rows["permuted high"] = [high for _, high in self.share_permuted]
        return pd.DataFrame(rows).iloc[display_order(self.experts)].reset_index(drop=True)

    def cells(self) -> pd.DataFrame:
        """One row per layer and expert."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": layer,
                "expert": self.experts[e],
                "units": self.units_per_cell,
                "selected": self.counts[layer][e],
                "rate": self.rate[layer][e],
                "chance low": self.rate_random[layer][e][0],
                "chance high": self.rate_random[layer][e][1],
                "significant": self.significant_by_cell[layer][e],
                "positive stimuli": self.stimuli_used[layer][e][0],
                "negative stimuli": self.stimuli_used[layer][e][1],
            }
            for layer in range(len(self.counts))
            for e in display_order(self.experts)
        )

    def plot(self) -> Figure:
        """Share of each cell's units that are selected, a panel per expert."""
        from micro.analysis.localizers.figures import localizer_figure

        return localizer_figure(self)

    def __str__(self) -> str:
        first, second = self.stimuli
        lines = [
            f"{self.localizer}: {first} + {second} stimuli, {self.source}",
            super().__str__(),
            f"{self.selected} of {self.units} units ({self.unit}) selected; "
            f"{self.significant} with t > 0 and q <= {self.settings.get('q', 0.05):g}",
        ]
        if self.selected > self.settings.get("k", self.selected):
            lines.append(
                f"{self.settings['k']} distinct values of t were asked for; units that tie share one, as those of "
                "identical experts do"
            )
        if self.specificity is not None:
            found = self.specificity
            lines.append(
                f"shuffled labels: a discovery in {found['share_with_discovery']:.3f} of {found['permutations']} "
                f"permutations, bound {found['bound']:.3f}: {'passed' if found['passed'] else 'FAILED'}"
            )
        if self.distractors is not None:
            lines.append(
                f"distractors: {self.distractors['overlap']:.3f} of the selected units also answer to the distractors, "
                f"chance {self.distractors['chance']:.3f}"
            )
        if self.note:
            lines.append(f"note: {self.note}")
        return "\n".join(lines)


@dataclass
class LesionResult(Result):
    """What it costs to silence selected units, beside random units outside the mask.

    ``harm`` is the rise of a loss or the drop of a score; ``excess`` the harm minus the mean harm of the random masks,
    with a 95 % bootstrap interval over records. ``p`` (does a random mask harm as much?) needs at least 99 masks.
    """

    name: ClassVar[str] = "lesion"

    rows: list[str]
    unlesioned: list[float]
    harm: list[float]
    random: list[list[float]]  # [rows][masks]
    excess: list[float]
    excess_interval: list[list[float]]
    p: list[float] | None
    selected: int
    units: int
    unit: str
    scale: str
    records: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def above_all_random(self) -> dict[str, bool]:
        """For each row: does the lesion harm more than every random mask?"""
        return {row: self.harm[r] > max(self.random[r]) for r, row in enumerate(self.rows)}

    def table(self) -> pd.DataFrame:
        import pandas as pd

        rows: dict[str, list[Any]] = {
            "rows": self.rows,
            "unlesioned": self.unlesioned,
            "harm": self.harm,
            "random mean": [float(np.mean(values)) for values in self.random],
            "random max": [max(values) for values in self.random],
            "excess": self.excess,
            "low": [low for low, _ in self.excess_interval],
            "high": [high for _, high in self.excess_interval],
        }
        if self.p is not None:
            rows["p"] = self.p
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """The lesion's harm among those of the random masks."""
        from micro.analysis.localizers.figures import lesion_figure

        return lesion_figure(self)

    def __str__(self) -> str:
        masks = len(self.random[0])
        kind = "matched in every cell" if self.settings.get("matched") else "of the same size"
        lines = [
            super().__str__(),
            f"{self.selected} of {self.units} units ({self.unit}) silenced; {masks} random masks {kind}, outside the "
            f"lesion; {self.scale}, {self.records} records",
        ]
        if self.p is None:
            lines.append("no p value: that takes at least 99 random masks")
        return "\n".join(lines)
