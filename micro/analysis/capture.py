"""Activations of many calls, in memory or streamed to disk: reads of ``model.intervene`` (ecosystem.md 9)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro.interventions import Point, Reading, read
from micro.interventions.readings import Moments
from micro.interventions.session import LayerHooks, Session, opened

if TYPE_CHECKING:
    from micro.modeling import MiCRoModel, MiCRoPreTrainedModel
    from micro.modeling.call import Call

PART_BYTES = 64 * 2**20


class Capture(Session):
    """What a :func:`capture` block saw: ``captured[point]`` is a :class:`~micro.interventions.Reading`.

    Its ``row`` numbers the rows of all calls, one call after the other. With a folder, rows are written to
    ``<point>-<number>.safetensors`` as they come, parts of about 64 MiB, each beside its name and renamed.
    """

    def __init__(
        self, model: MiCRoModel, names: Sequence[Point], where: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.points, self.folder = list(names), options["folder"]
        self._device, self._dtype = options["device"], options["dtype"]
        self._call: Call | None = None
        self._rows_before, self._bytes = 0, [0] * len(names)
        self._written = [0] * len(names)
        super().__init__(
            model, [read(point, name=point, **where) for point in names], all_experts=options["all_experts"]
        )

    def layer(self, index: int, call: Call) -> LayerHooks | None:
        """As in every session; rows of a new call are numbered behind those of the last."""
        if call is not self._call:
            self._rows_before += 0 if self._call is None else self._call.rows
            self._call = call
        return super().layer(index, call)

    def keep(self, number: int, found: Reading | Moments) -> None:
        """Take in rows, moved to where they are kept."""
        assert isinstance(found, Reading)
        found.row = found.row + self._rows_before
        parts = {part.name: getattr(found, part.name).to(self._device) for part in fields(found)}
        parts["values"] = parts["values"].to(self._dtype or found.values.dtype)
        super().keep(number, Reading(**parts))
        self._bytes[number] += parts["values"].nbytes
        if self.folder is not None and self._bytes[number] >= PART_BYTES:
            self.flush(number)

    def flush(self, number: int) -> None:
        """Write what a point has in memory."""
        assert self.folder is not None
        if parts := self.drop_readings(number):
            path = self.folder / f"{self.points[number]}-{self._written[number]:05d}.safetensors"
            _write(path, Reading.cat(parts))
            self._written[number] += 1
        self._bytes[number] = 0

    def __getitem__(self, name: str | int) -> Reading | Moments:
        if self.folder is None:
            return super().__getitem__(name)
        if name in self.points:
            self.flush(self.points.index(name))
        return load(self.folder, str(name))


@contextmanager
def capture(
    model: MiCRoPreTrainedModel,
    points: Sequence[Point] = ("block_output",),
    *,
    folder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    all_experts: bool = False,
    **where: Any,
) -> Iterator[Capture]:
    """A block in which every forward call's activations are kept.

        with analysis.capture(model, ["units"], layers=[3], folder="activations") as captured:
            for batch in batches:
                model(**batch)
        captured["units"].values

    Args:
        model: with or without a head.
        points: what to keep; ``micro.interventions.points(model)`` lists them.
        folder: stream to files there, a new or empty folder; None: in memory.
        dtype: of the kept values; None: that of the activations.
        device: where they are kept.
        all_experts: run every expert on every token, as in ``model.intervene``.
        where: layers, experts, heads, units, rows, positions, only_chosen, as in ``micro.interventions.read``.

    Raises:
        ValueError: no such point, layer, ...; or points named twice.
        FileExistsError: the folder holds something.
    """
    target = None if folder is None else Path(folder).expanduser()
    if target is not None:
        if target.exists() and any(target.iterdir()):
            raise FileExistsError(f"{target}: the folder is not empty; name another one")
        target.mkdir(parents=True, exist_ok=True)
    headless: Any = getattr(model, "model", model)
    options = {"folder": target, "dtype": dtype, "device": torch.device(device), "all_experts": all_experts}
    with opened(Capture(headless, list(points), where, options)) as captured:
        yield captured
    if target is not None:
        for number in range(len(captured.points)):
            captured.flush(number)


def load(folder: str | os.PathLike[str], point: str) -> Reading:
    """All parts of one point that :func:`capture` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    from safetensors.torch import load_file

    paths = sorted(Path(folder).expanduser().glob(f"{point}-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no part of {point!r}; nothing was captured, or the block has not ended")
    return Reading.cat([Reading(**load_file(path)) for path in paths])


def _write(path: Path, reading: Reading) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {part.name: getattr(reading, part.name).contiguous() for part in fields(reading)}
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
