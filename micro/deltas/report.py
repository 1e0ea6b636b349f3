"""Results on experts' deltas: sizes and angles, interference, compression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.result import Result
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.deltas.deltas import ExpertDeltas


@dataclass
class DeltaReport(Result):
    """Sizes and angles of the deltas, per layer and matrix, and over all of an expert's weights.

    rows: layer, matrix, entries, norm [E] (Frobenius), relative [E] (over the base's norm), changed [E] (share of
    entries that differ from the base), cosine [E][E]. overall: the same over all tensors together. Cosines of unrelated
    deltas scatter by 1/sqrt(entries) around 0; against the mean of E experts around -1/(E-1) (``unrelated_cosine``).
    """

    name: ClassVar[str] = "deltas"

    experts: list[str]
    unrelated_cosine: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    overall: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def by_layer(self) -> list[dict[str, Any]]:
        """norm, relative and cosine over all tensors of each layer."""
        layers = sorted({row["layer"] for row in self.rows})
        return [{"layer": layer, **_pool([r for r in self.rows if r["layer"] == layer])} for layer in layers]

    def table(self) -> pd.DataFrame:
        import pandas as pd

        lines = [{"layer": str(row["layer"]), "matrix": row["matrix"], **self._cells(row)} for row in self.rows]
        return pd.DataFrame([*lines, {"layer": "all", "matrix": "all", **self._cells(self.overall)}])

    def _cells(self, row: dict[str, Any]) -> dict[str, float]:
        cells: dict[str, float] = {f"relative_{name}": row["relative"][e] for e, name in enumerate(self.experts)}
        pairs = [(i, j) for i in range(len(self.experts)) for j in range(i)]
        return cells | {f"cosine_{self.experts[j]}_{self.experts[i]}": row["cosine"][i][j] for i, j in pairs}

    def __str__(self) -> str:
        import pandas as pd

        lines = [{"layer": str(row["layer"]), **self._cells(row)} for row in self.by_layer()]
        lines.append({"layer": "all", **self._cells(self.overall)})
        return str(pd.DataFrame(lines).to_string(index=False, float_format=lambda value: f"{value:.4f}"))

    def plot(self) -> Figure:
        from micro.deltas.figures import deltas_figure

        return deltas_figure(self)


def compare(
    deltas: ExpertDeltas,
    *,
    layers: Sequence[int] | None = None,
    matrices: Sequence[str] | None = None,
    progress: bool = False,
) -> DeltaReport:
    """How far each expert went from the base, where, and in how different directions.

    Args:
        deltas: the task vectors.
        layers: which to look at; all if not given.
        matrices: their names (``["q_proj"]``); all if not given, gains included.
        progress: show a bar on stderr.
    """
    groups = list(deltas.select(layers, matrices))
    count = len(deltas.experts)
    report = DeltaReport(
        experts=deltas.experts,
        unrelated_cosine=0.0 if deltas.has_base else -1 / max(count - 1, 1),
        settings={"mixture": deltas.mixture.name, "base": deltas.base_name, "arithmetic": "float64 sums"},
    )
    for group in track(groups, "deltas", unit="tensors", enabled=progress):
        tau = deltas.tau(group).flatten(1).double()
        base = float(deltas.base(group).double().square().sum())
        row = {"layer": group.layer, "matrix": group.name, "entries": prod(group.shape)}
        changed = (tau != 0).double().mean(1)
        report.rows.append(row | _numbers((tau @ tau.mT).cpu().numpy(), base, changed.cpu().numpy()))
    report.overall = _pool(report.rows)
    return report


def _numbers(gram: Any, base_squares: float, changed: Any) -> dict[str, Any]:
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    cosine = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    relative = norms / base_squares**0.5 if base_squares > 0 else np.zeros_like(norms)
    return {
        "norm": norms.tolist(),
        "relative": relative.tolist(),
        "changed": changed.tolist(),
        "cosine": cosine.tolist(),
        "base_norm": base_squares**0.5,
    }


def _pool(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of several tensors as if they were one."""
    entries = np.array([row["entries"] for row in rows], dtype=np.float64)
    norms = np.array([row["norm"] for row in rows])
    gram = np.einsum("rij,ri,rj->ij", np.array([row["cosine"] for row in rows]), norms, norms)
    np.fill_diagonal(gram, (norms**2).sum(0))
    changed = entries @ np.array([row["changed"] for row in rows]) / entries.sum()
    return {"entries": int(entries.sum())} | _numbers(gram, sum(row["base_norm"] ** 2 for row in rows), changed)


@dataclass
class InterferenceReport(Result):
    """Singular task interference per matrix, over the sum of singular values, beside random directions.

    rows: layer, matrix, rank, interference, random (mean of the controls), random_low, random_high, singular_sum,
    energy [E] (share of each delta's squares that the rank holds).
    """

    name: ClassVar[str] = "interference"

    experts: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        keys = ("layer", "matrix", "rank", "interference", "random", "random_low", "random_high", "singular_sum")
        lines = [{key: row[key] for key in keys} | {"energy": float(np.mean(row["energy"]))} for row in self.rows]
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        from micro.deltas.figures import interference_figure

        return interference_figure(self)


@dataclass
class CompressionReport(Result):
    """Sizes and errors of deltas of low rank.

    rows: layer, matrix, rank, parameters (of one expert's matrix), low_rank_parameters, relative_error [E]
    (||delta - approximation||_F / ||delta||_F, the smallest that any matrix of this rank reaches), spectral_error [E]
    (the first singular value left out: |W x - W_k x| <= spectral_error * |x|).
    """

    name: ClassVar[str] = "compression"

    experts: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> float:
        """Weights of base and factors over those of one base: 1 + E * share, against E for full experts."""
        full = sum(row["parameters"] for row in self.rows)
        return float(1 + len(self.experts) * sum(row["low_rank_parameters"] for row in self.rows) / full)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        lines = []
        for row in self.rows:
            cells = {key: row[key] for key in ("layer", "matrix", "rank", "parameters", "low_rank_parameters")}
            errors = {f"relative_error_{n}": row["relative_error"][e] for e, n in enumerate(self.experts)}
            lines.append(cells | errors | {"spectral_error": max(row["spectral_error"])})
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        from micro.deltas.figures import compression_figure

        return compression_figure(self)
