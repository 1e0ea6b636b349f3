"""Measured responses to stimuli: arrays, or files of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from micro.analysis.alignment.ceiling import Ceiling, split_half
from micro.analysis.alignment.ridge import matrix
from micro.analysis.statistics import Array

KEYS = ("responses", "repetitions", "reliability", "networks", "groups")


@dataclass
class Responses:
    """Responses of v voxels (or electrodes, regions, readers) to n stimuli.

    Args:
        values: ``[n,v]``; the mean over repetitions where those are given instead.
        repetitions: ``[k,n,v]``, repetitions or subjects: their split halves give the noise ceiling.
        reliability: ρ' per voxel ``[v]``, where it is known already.
        networks: name of the network of each voxel ``[v]``.
        groups: passage, story or run of each stimulus ``[n]``, equal ones adjacent; folds do not cut them.
        source: where the data come from, for the record.

    Raises:
        ValueError: shapes that do not agree, or values that are not finite.
    """

    values: Array
    repetitions: Array | None = None
    reliability: Array | None = None
    networks: list[str] | None = None
    groups: NDArray[Any] | None = None
    source: str = "arrays"

    def __post_init__(self) -> None:
        self.values = matrix(self.values, "responses")
        n, v = self.values.shape
        if self.reliability is not None:
            self.reliability = np.asarray(self.reliability, dtype=np.float64)
            if self.reliability.shape != (v,):
                raise ValueError(f"reliability must hold one number for each of {v} voxels")
        if self.networks is not None:
            self.networks = [str(name) for name in self.networks]
            if len(self.networks) != v:
                raise ValueError(f"networks must name one network for each of {v} voxels, got {len(self.networks)}")
        if self.groups is not None and np.asarray(self.groups).shape != (n,):
            raise ValueError(f"groups must hold one label for each of {n} stimuli")

    @classmethod
    def repeated(cls, repetitions: ArrayLike, **fields: Any) -> Responses:
        """From repetitions or subjects ``[k,n,v]``; their mean is what models predict."""
        data = np.asarray(repetitions, dtype=np.float64)
        if data.ndim != 3:
            raise ValueError(f"repetitions must be [repetitions, stimuli, voxels], got shape {list(data.shape)}")
        return cls(data.mean(0), repetitions=data, **fields)

    def ceiling(self, *, splits: int = 100, seed: int = 0) -> Ceiling | None:
        """The noise ceiling; None where neither repetitions nor reliabilities are known."""
        if self.reliability is not None:
            return Ceiling(self.reliability)
        if self.repetitions is None:
            return None
        return Ceiling(split_half(self.repetitions, splits=splits, seed=seed))


def load_responses(path: str | Path) -> Responses:
    """Read responses from a file.

    ``.npz`` holds ``responses`` [n,v] or ``repetitions`` [k,n,v] and, as wanted, ``reliability`` [v], ``networks`` [v]
    and ``groups`` [n]; ``.npy`` one array [n,v] or [k,n,v]; ``.csv`` a header with the names of the voxels and one row
    per stimulus (a column ``group`` labels the passages).

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, unknown names, or what :class:`Responses` refuses; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    readers = {".npz": _from_npz, ".npy": _from_npy, ".csv": _from_csv}
    if path.suffix not in readers:
        raise ValueError(f"{path}: responses are read from .npz, .npy or .csv files")
    try:
        return readers[path.suffix](path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_npz(path: Path) -> Responses:
    with np.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    unknown = sorted(set(content) - set(KEYS))
    if unknown or ("responses" in content) == ("repetitions" in content):
        raise ValueError(
            f"needs either 'responses' [n,v] or 'repetitions' [k,n,v], and may hold {', '.join(KEYS[2:])}; "
            f"it holds {', '.join(sorted(content)) or 'nothing'}"
        )
    fields: dict[str, Any] = {name: content[name] for name in ("reliability", "groups") if name in content}
    if "networks" in content:
        fields["networks"] = content["networks"].tolist()
    if "repetitions" in content:
        return Responses.repeated(content["repetitions"], source=str(path), **fields)
    return Responses(content["responses"], source=str(path), **fields)


def _from_npy(path: Path) -> Responses:
    array = np.load(path, allow_pickle=False)
    return Responses.repeated(array, source=str(path)) if array.ndim == 3 else Responses(array, source=str(path))


def _from_csv(path: Path) -> Responses:
    from micro.errors import require

    frame = require("pandas", "eval", "reading a table of responses").read_csv(path)
    groups = frame.pop("group").to_numpy() if "group" in frame else None
    words = [str(name) for name in frame.columns if frame[name].dtype.kind not in "biuf"]
    if words:
        raise ValueError(f"column {words[0]!r} holds no numbers; one column per voxel, one row per stimulus")
    return Responses(frame.to_numpy(dtype=np.float64), groups=groups, source=str(path))
