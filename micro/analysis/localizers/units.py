"""What a model's units do on a list of texts: one number per text, layer, expert and component."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro import interventions as iv
from micro.analysis.batches import by_length
from micro.analysis.localizers.stimuli import POOLINGS
from micro.analysis.modes import evaluating
from micro.errors import choices
from micro.interventions.points import axis, width
from micro.progress import track

if TYPE_CHECKING:
    from micro.interventions import Reading
    from micro.modeling import MiCRoForCausalLM

UNITS = ("block_output", "up", "units", "ffn", "attention", "heads", "residual")
MODES = ("all", "routed", "zero")
MOST_BYTES = 256 << 20  # of activations read at once


@dataclass(frozen=True)
class UnitReader:
    """How activations are read off a model.

    unit: the point that is read; "residual" is the stream behind each layer, without experts. mode: what an expert's
    units are on tokens that were not routed to it; "all": every expert runs on every token; "routed": those tokens do
    not count, and a text without any drops out (NaN); "zero": they count as 0. pooling: "last" token, or "mean" over
    tokens; padding never counts.
    """

    unit: str
    mode: str
    pooling: str
    max_bytes: int = MOST_BYTES
    controls: dict[str, Any] = field(default_factory=dict)
    progress: bool = False

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("unit", self.unit, UNITS),
            ("mode", self.mode, MODES),
            ("pooling", self.pooling, POOLINGS),
        ):
            if value not in valid:
                raise ValueError(f"localize: {name} {value!r}: {choices(str(value), valid)}")

    def shape(self, model: MiCRoForCausalLM) -> tuple[int, int, int]:
        """(L, E, W) of the units; E is 1 where a row belongs to a token and not to an expert."""
        config = model.config
        point: Any = self.unit
        return int(config.num_hidden_layers), axis(config, point), width(config, point)

    @torch.no_grad()
    def pooled(
        self, model: MiCRoForCausalLM, rows: Sequence[Sequence[int]], what: str = "localizer"
    ) -> Iterator[tuple[list[int], Tensor]]:
        """(indices of texts, activations [texts,L,E,W] on the host) batch by batch, similar lengths together.

        float32, or float64 for a float64 model. At most ``max_bytes`` are read at once, or one text.
        """
        shape = self.shape(model)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        read_per_token = shape[0] * shape[1] * shape[2] * dtype.itemsize
        work = list(by_length([len(row) for row in rows], max(1, self.max_bytes // read_per_token)))
        with evaluating(model):
            for indices in track(work, what, unit="batches", enabled=self.progress):
                yield indices, self._batch(model, [rows[i] for i in indices], shape, dtype)

    def _batch(
        self, model: MiCRoForCausalLM, rows: Sequence[Sequence[int]], shape: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor:
        lengths = torch.tensor([len(row) for row in rows])
        slots = torch.arange(int(lengths.max()))
        ids = torch.zeros(len(rows), len(slots), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        present = slots < lengths[:, None]
        last = slots == lengths[:, None] - 1
        layers: Any = list(range(1, shape[0] + 1)) if self.unit == "residual" else None
        action = iv.read(
            self.unit,  # type: ignore[arg-type]
            layers=layers,
            positions=last.to(model.device) if self.pooling == "last" else None,
            name="units",
        )
        with model.intervene(action, all_experts=self.mode == "all" and shape[1] > 1) as run:
            model.model(
                input_ids=ids.to(model.device),
                attention_mask=present.long().to(model.device),
                use_cache=False,
                **self.controls,
            )
        length = torch.ones_like(lengths) if self.pooling == "last" else lengths
        return self._pool(run.reading("units"), length.to(model.device), shape, dtype).cpu()

    def _pool(self, reading: Reading, lengths: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """Mean of the rows of each (text, layer, expert); lengths: tokens that count of each text."""
        texts, (layers, experts, width) = len(lengths), shape
        if not bool(reading.values.isfinite().all()):
            raise ValueError(f"localize: activations of {self.unit!r} are not finite; load the model in a wider dtype")
        layer = reading.layer - int(self.unit == "residual")
        cell = (reading.row * layers + layer) * experts + reading.expert.clamp(min=0)
        sums = torch.zeros(texts * layers * experts, width, dtype=dtype, device=lengths.device)
        sums.index_add_(0, cell, reading.values.to(dtype))
        if self.mode == "routed":
            count = torch.zeros(len(sums), dtype=dtype, device=lengths.device)
            count.index_add_(0, cell, torch.ones_like(cell, dtype=dtype))
            sums /= count[:, None]  # 0 / 0 is the NaN that is wanted
            return sums.view(texts, layers, experts, width)
        return sums.view(texts, layers, experts, width) / lengths.to(dtype).view(-1, 1, 1, 1)


def tokenized(tokenizer: Any, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
    """Token ids of plain texts, with the tokenizer's special tokens and without a chat template.

    ``max_tokens``: cut to so many, the special ones counted.

    Raises:
        ValueError: a text without tokens.
    """
    cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
    rows = [list(tokenizer(text, **cut)["input_ids"]) for text in texts]
    if not all(rows):
        raise ValueError(f"localize: the text {texts[[bool(r) for r in rows].index(False)]!r} has no tokens")
    return rows
