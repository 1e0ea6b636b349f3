"""What a task is to the analyses: something that scores a model record by record, under any steering."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from micro.analysis.batches import IGNORED, batches, encoded, shifted, token_losses
from micro.analysis.groups import Groups, record_groups
from micro.analysis.statistics import Array
from micro.experts import LABELS, NAMES
from micro.modeling.controls import ControlReader

if TYPE_CHECKING:
    from torch import Tensor

    from micro.data import Record
    from micro.modeling import MiCRoConfig, MiCRoForCausalLM

NATS = "nats per token"
SHARE = "share correct"  # differences of shares are reported in points, 100 times the share


class Suite(Protocol):
    """A task. The score of row k is ``sums[:, k].sum() / counts[:, k].sum()``; records are the unit of resampling.

    What else a suite may say, as attributes (:func:`traits` holds the defaults):

    - ``task``: name of the task, for tables; default "loss" where lower is better, else "score"
    - ``higher_is_better``: default False
    - ``unit``: default "nats per token", or "share correct" where higher is better
    - ``chance``: the score without any expert, a number or one per row; default ln V for a loss
    - ``fingerprint``: a string that changes with the items; without it scores are not kept on disk
    - ``groups``: names [records][rows] of the groups (templates) that a record's items belong to, several or none each;
      intervals then resample groups, and records in them (:mod:`micro.analysis.groups`)
    - ``score_many(model, [controls, ...])``: the same as ``score`` for several conditions at once, where it saves time
    """

    names: list[str]  # of the rows, for example domains
    records: int

    def score(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> tuple[Array, Array]:
        """Sum of the score and number of items, both float64 [records, rows]; the counts are the same under any
        controls. ``controls`` are steering arguments of the model's forward.
        """
        ...


@runtime_checkable
class ManySuite(Protocol):
    """A suite that scores several conditions at once."""

    def score_many(self, model: MiCRoForCausalLM, conditions: Sequence[Mapping[str, Any]]) -> list[tuple[Array, Array]]:
        """As ``score`` for each of the conditions."""
        ...


@dataclass(frozen=True)
class Traits:
    """What a suite says about its scores. ``chance``: the score of no model at all, per row (NaN = not known)."""

    task: str
    higher_is_better: bool
    unit: str
    chance: tuple[float, ...]

    @property
    def sign(self) -> float:
        """Times a score: its worth, of which more is better."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def factor(self) -> float:
        """Times a difference of scores: how it is reported (points for shares)."""
        return 100.0 if self.unit == SHARE else 1.0


def traits(suite: Suite, model: Any = None) -> Traits:
    """What a suite says about itself, with the defaults of :class:`Suite`. ``model`` gives V for the default chance."""
    higher = bool(getattr(suite, "higher_is_better", False))
    unit = str(getattr(suite, "unit", SHARE if higher else NATS))
    chance = getattr(suite, "chance", None)
    if chance is None:
        size = getattr(getattr(model, "config", None), "vocab_size", None)
        chance = math.log(size) if unit == NATS and size else math.nan
    values = np.broadcast_to(np.asarray(chance, dtype=np.float64), (len(suite.names),))
    task = str(getattr(suite, "task", "score" if higher else "loss"))
    return Traits(task, higher, unit, tuple(values.tolist()))


def label_names(config: MiCRoConfig) -> list[str] | None:
    """Names of a model's experts as rows of :class:`LossSuite`; None (its own names) for more or fewer experts than
    labels.
    """
    names = config.expert_names or []
    return list(names) if len(names) == len(LABELS) else None


class LossSuite:
    """Cross-entropy of answer tokens in nats, grouped by the label of the predicted token.

    Args:
        records: labelled records.
        tokenizer: of the model.
        names: of the label rows, one per label (:func:`label_names` gives those of a model's experts); the four experts
            if not given.
        max_tokens: slots per batch.
        encode_options: passed to :func:`micro.data.encode`.

    Raises:
        ValueError: no record could be encoded, or there are not as many names as labels.
    """

    task = "loss"
    higher_is_better = False
    unit = NATS
    groups: Groups | None = None

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        *,
        names: Sequence[str] | None = None,
        max_tokens: int = 2048,
        encode_options: dict[str, Any] | None = None,
    ) -> None:
        if not records:
            raise ValueError("LossSuite: records is empty; give labelled records")
        if names is not None and len(names) != len(LABELS):
            raise ValueError(
                f"LossSuite: names holds {len(names)}, expected {len(LABELS)}, one per label of the records; leave it "
                "out for a model with another number of experts"
            )
        self.names = list(NAMES if names is None else names)
        self.records = len(records)
        self.groups = record_groups(records)
        self.max_tokens = max_tokens
        rows = encoded(records, tokenizer, **(encode_options or {}))
        if not rows:
            raise ValueError(f"LossSuite: none of the {len(records)} records could be encoded")
        self._batches = list(batches(rows, tokenizer, max_tokens=max_tokens))

    @property
    def fingerprint(self) -> str:
        """Of the token ids, targets and labels of all batches."""
        digest = hashlib.sha256(repr(self.names).encode())
        for records, batch in self._batches:
            digest.update(repr(records).encode())
            for name in ("input_ids", "attention_mask", "labels", "routing_labels"):
                digest.update(batch[name].numpy().tobytes())
        return digest.hexdigest()

    def score(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> tuple[Array, Array]:
        """See :class:`Suite`."""
        sums = np.zeros((self.records, len(self.names)))
        counts = np.zeros_like(sums)
        for records, batch in self._batches:
            losses = token_losses(model, batch, **controls)
            self._add(sums, counts, records, batch, losses)
        return sums, counts

    def score_many(self, model: MiCRoForCausalLM, conditions: Sequence[Mapping[str, Any]]) -> list[tuple[Array, Array]]:
        """As :meth:`score` for each condition. Conditions that differ in ``ablate`` alone travel as rows of one batch,
        as many as ``max_tokens`` allows.
        """
        if not _rows_can_differ(conditions):
            return [self.score(model, controls) for controls in conditions]
        shape = (len(conditions), self.records, len(self.names))
        sums, counts = np.zeros(shape), np.zeros(shape)
        reader = ControlReader(model.config)
        ablated = [_one_row(reader, controls.get("ablate")) for controls in conditions]
        rest = {name: value for name, value in conditions[0].items() if name != "ablate"}
        for records, batch in self._batches:
            rows = batch["input_ids"].shape[0]
            at_once = max(1, self.max_tokens // batch["input_ids"].numel())
            for first in range(0, len(conditions), at_once):
                some = range(first, min(first + at_once, len(conditions)))
                tiled = {name: value.repeat(len(some), 1) for name, value in batch.items()}
                ablate = torch.cat([ablated[i] for i in some]).repeat_interleave(rows, 0)
                losses = token_losses(model, tiled, ablate=ablate, **rest).view(len(some), rows, -1)
                for i, part in zip(some, losses, strict=True):
                    self._add(sums[i], counts[i], records, batch, part)
        return list(zip(sums, counts, strict=True))

    @staticmethod
    def _add(sums: Array, counts: Array, records: Sequence[int], batch: dict[str, Tensor], losses: Tensor) -> None:
        """Add the losses [B,S] of one batch to the sums and counts of its records, by label of the predicted token."""
        targets = shifted(batch["labels"]).numpy() != IGNORED
        labels = np.roll(batch["routing_labels"].numpy(), -1, axis=1)
        values = losses.double().numpy()
        for row, record in enumerate(records):
            wanted = targets[row]
            np.add.at(sums[record], labels[row][wanted], values[row][wanted])
            np.add.at(counts[record], labels[row][wanted], 1)


def _rows_can_differ(conditions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nothing but ``ablate`` differs, and no other control counts rows by itself."""
    rest = [{name: value for name, value in c.items() if name != "ablate"} for c in conditions]
    if len(rest) < 2 or any(isinstance(value, torch.Tensor) for value in rest[0].values()):
        return False
    return all(other == rest[0] for other in rest[1:]) and not {"keep", "replay"} & set(rest[0])


def _one_row(reader: ControlReader, ablate: Any) -> Tensor:
    """A set for everything, or one per layer, as bool [1,L,1,E]."""
    experts, layers = reader.config.num_experts, reader.config.num_hidden_layers
    tensor = torch.zeros(1, 1, 1, experts, dtype=torch.bool) if ablate is None else reader.tensor("ablate", ablate)
    if tensor.shape[0] != 1 or tensor.shape[2] != 1:
        raise ValueError(f"ablate: a condition removes one set of experts, or one per layer, got {list(tensor.shape)}")
    return tensor.expand(1, layers, 1, experts)
