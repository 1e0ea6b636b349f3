"""What an alignment came to."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.result import Result
from micro.analysis.statistics import Array
from micro.errors import require

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class AlignmentResult(Result):
    """How well feature sets account for measured responses.

    ``sets``: one entry per feature set with ``score`` (median over voxels of the held-out Pearson r), ``interval``
    (95 %, blocks of stimuli resampled), ``quantiles`` over voxels (5, 25, 50, 75, 95 %), ``normalised`` (r over the
    noise ceiling), ``null_95`` (95 % quantile of the score when blocks of responses are shuffled), ``p``, ``p_family``
    (against the best of all sets under each shuffling), and, where asked for, ``rsa``, ``topological_rsa`` and ``cka``
    with their nulls.
    ``contrasts``: differences of groups of sets (expert vs expert, model vs model), over the same folds.
    ``networks``: score of each group in each network of voxels. ``random_units``: a set against others of its size.
    ``self_test``: per metric and target, the rank of a known layer when the responses are made of its noisy units.
    ``voxels``: r per set ``[v]`` over the included voxels, in ``alignment_voxels.npz``.
    """

    name: ClassVar[str] = "alignment"
    apart: ClassVar[tuple[str, ...]] = ("voxels",)

    stimuli: int
    voxels_included: int
    voxels_excluded: dict[str, int]  # by reason
    ceiling: float | None  # median over voxels of √ρ'
    sets: list[dict[str, Any]]
    self_test: dict[str, list[dict[str, Any]]]
    contrasts: list[dict[str, Any]] = field(default_factory=list)
    networks: list[dict[str, Any]] = field(default_factory=list)
    random_units: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    voxels: dict[str, Array] = field(default_factory=dict, repr=False, compare=False)

    @property
    def self_test_passed(self) -> dict[str, bool]:
        """Per metric: did every target come first?"""
        return {metric: all(row["rank"] == 1 for row in rows) for metric, rows in self.self_test.items()}

    def save(self, folder: str | Path) -> None:
        """Write ``alignment.json``, ``alignment.csv`` and, with r per voxel, ``alignment_voxels.npz``."""
        super().save(folder)
        if self.voxels:
            buffer = io.BytesIO()
            names = np.array(list(self.voxels))
            np.savez(buffer, names=names, r=np.stack(list(self.voxels.values())).astype(np.float32))
            path = Path(folder) / "alignment_voxels.npz"
            beside = path.with_name(f".{path.name}.part")
            beside.write_bytes(buffer.getvalue())
            beside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> AlignmentResult:
        """Read a result back, with the voxels that stand beside it."""
        result = super().load(path)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if (folder / "alignment_voxels.npz").is_file():
            with np.load(folder / "alignment_voxels.npz", allow_pickle=False) as file:
                result.voxels = dict(zip(file["names"].tolist(), file["r"].astype(np.float64), strict=True))
        return result

    def table(self) -> pd.DataFrame:
        rows = []
        for entry in self.sets:
            low, high = entry["interval"]
            row = {"set": entry["name"], "width": entry["width"], "r": entry["score"], "low": low, "high": high}
            if entry["normalised"] is not None:
                row["r/ceiling"] = entry["normalised"]
            row |= {"null 95 %": entry["null_95"], "p (family)": entry["p_family"]}
            for metric in ("rsa", "topological_rsa", "cka"):
                if metric in entry:
                    row[metric.replace("_", " ")] = entry[metric]["value"]
            rows.append(row)
        return require("pandas", "eval", "AlignmentResult.table").DataFrame(rows)

    def contrast_table(self) -> pd.DataFrame:
        """Differences of groups, with 95 % intervals and p values."""
        rows = [
            {
                "contrast": f"{c['first']} - {c['second']}",
                "difference": c["difference"],
                "low": c["interval"][0],
                "high": c["interval"][1],
                "p (Holm)": c["p_holm"],
            }
            for c in self.contrasts
        ]
        return require("pandas", "eval", "AlignmentResult.contrast_table").DataFrame(rows)

    def network_table(self) -> pd.DataFrame:
        """Groups of sets (rows) by networks of voxels (columns): mean over layers of the median r."""
        frame = require("pandas", "eval", "AlignmentResult.network_table").DataFrame(self.networks)
        order = list(dict.fromkeys(frame["group"])), list(dict.fromkeys(frame["network"]))
        return frame.pivot(index="group", columns="network", values="score").loc[order[0], order[1]]

    def plot(self) -> Figure:
        from micro.analysis.alignment.figures import alignment_figure

        return alignment_figure(self)

    def __str__(self) -> str:
        lines = [super().__str__()]
        lost = ", ".join(f"{count} {reason}" for reason, count in self.voxels_excluded.items() if count)
        lines.append(f"{self.stimuli} stimuli, {self.voxels_included} voxels" + (f", left out: {lost}" if lost else ""))
        if self.ceiling is not None:
            lines.append(f"a perfect model reaches {self.ceiling:.3f} (median noise ceiling)")
        if self.contrasts:
            lines += ["", str(self.contrast_table().to_string(index=False, float_format=lambda x: f"{x:.3f}")), ""]
        if self.networks:
            lines += ["", str(self.network_table().to_string(float_format=lambda x: f"{x:.3f}")), ""]
        for entry in self.random_units:
            lines.append(
                f"{entry['set']}: {entry['score']:.3f}; random units {np.mean(entry['null']):.3f} on average, "
                f"p = {entry['p']:.3f} ({len(entry['null'])} draws)"
            )
        return "\n".join([*lines, *self.self_test_lines()])

    def self_test_lines(self) -> list[str]:
        """One line per metric, two where the metric cannot be trusted here."""
        out = []
        for metric, rows in self.self_test.items():
            first = sum(row["rank"] == 1 for row in rows)
            out.append(f"self-test, {metric.replace('_', ' ')}: {first} of {len(rows)} known layers came first")
            if first < len(rows):
                worst = max(rows, key=lambda row: row["rank"])
                place = f"worst: {worst['target']} at place {worst['rank']}, behind {worst['first']}"
                out.append(f"    {place}; do not read an order of layers out of it")
        return out


@dataclass
class ReadingTimesResult(Result):
    """Does surprisal account for reading times beyond length, frequency and spill-over?

    ``models``: one entry per surprisal with ``gain`` (log-likelihood per word, nats, of the words fitted: at least 0),
    ``gain_held_out`` with ``interval`` (95 %, sentences resampled): the same on held-out sentences, ``null_95`` and
    ``p`` of the latter when surprisal is shuffled over words, ``coefficient`` (time per nat) with standard error, and
    the F test of the nested models.
    """

    name: ClassVar[str] = "reading_times"

    words: int
    sentences: int
    left_out: dict[str, int]  # by reason
    predictors: list[str]
    models: list[dict[str, Any]]
    contrasts: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        rows = [
            {
                "surprisal of": m["name"],
                "gain per word": m["gain"],
                "held out": m["gain_held_out"],
                "low": m["interval"][0],
                "high": m["interval"][1],
                "null 95 %": m["null_95"],
                "p": m["p"],
                "coefficient": m["coefficient"],
            }
            for m in self.models
        ]
        return require("pandas", "eval", "ReadingTimesResult.table").DataFrame(rows)

    def plot(self) -> Figure:
        from micro.analysis.alignment.figures import reading_times_figure

        return reading_times_figure(self)

    def __str__(self) -> str:
        lost = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items() if count)
        told = f"{self.words} words of {self.sentences} sentences" + (f"; left out: {lost}" if lost else "")
        lines = [super().__str__(), told, f"gains over {', '.join(self.predictors)}; nats per word"]
        for c in self.contrasts:
            low, high = c["interval"]
            lines.append(
                f"{c['first']} - {c['second']}: {c['difference']:+.4f} [{low:+.4f}, {high:+.4f}], p = {c['p']:.3f}"
            )
        return "\n".join(lines)
