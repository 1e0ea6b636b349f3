"""Features of stimuli: arrays, or activations of a model pooled over the tokens of each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from micro import interventions as iv
from micro.analysis.alignment.ridge import matrix
from micro.analysis.batches import Row, batches, text_row
from micro.analysis.modes import evaluating
from micro.analysis.statistics import Array
from micro.interventions.points import axis, depth, width
from micro.progress import track

if TYPE_CHECKING:
    from micro.interventions import Point
    from micro.modeling import MiCRoForCausalLM

Pooling = Literal["mean", "last"]
Tokens = Literal["all", "zero"]


@dataclass(frozen=True)
class FeatureSet:
    """Features ``[n,d]`` of n stimuli under one name; ``layer``, ``expert`` and ``model`` say where they come from."""

    name: str
    values: Array
    layer: int | None = None
    expert: str | None = None
    model: str = "model"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", matrix(self.values, f"features {self.name!r}"))

    @property
    def group(self) -> str:
        """Model and expert: sets that differ in their layer only belong together."""
        return self.model if self.expert is None else f"{self.model}: {self.expert}"


def feature_sets(features: Sequence[FeatureSet] | Mapping[str, ArrayLike]) -> list[FeatureSet]:
    """Feature sets from a mapping of names to arrays, or as they are.

    Raises:
        ValueError: none, two of one name, or different numbers of stimuli.
        TypeError: something else was given.
    """
    if isinstance(features, Mapping):
        sets = [FeatureSet(name, np.asarray(values), model="features") for name, values in features.items()]
    else:
        sets = list(features)
    for entry in sets:
        if not isinstance(entry, FeatureSet):
            raise TypeError(f"features: expected a mapping or FeatureSet objects, got {type(entry).__name__}")
    names, lengths = [entry.name for entry in sets], {len(entry.values) for entry in sets}
    if not sets or len(set(names)) < len(names) or len(lengths) > 1:
        raise ValueError(
            f"features: give at least one set, with different names and the same stimuli; got {names or 'none'} with "
            f"{sorted(lengths)} stimuli"
        )
    return sets


@dataclass(frozen=True)
class Pooled:
    """Activations of all stimuli: ``values`` float64 ``[L',E',n,W]``, of the listed layers; E' is 1 at token points."""

    values: Array
    layers: list[int]
    experts: list[str | None]
    model: str

    def sets(self) -> list[FeatureSet]:
        """One feature set per layer and expert."""
        out = []
        for i, layer in enumerate(self.layers):
            for e, expert in enumerate(self.experts):
                parts = [self.model, *([] if expert is None else [expert]), f"layer {layer}"]
                out.append(FeatureSet(", ".join(parts), self.values[i, e], layer, expert, self.model))
        return out

    def masked(self, mask: ArrayLike, name: str) -> FeatureSet:
        """The units of a mask, bool ``[L',E',W]``, of all layers and experts side by side."""
        chosen = np.asarray(mask, dtype=bool)
        wanted = (*self.values.shape[:2], self.values.shape[3])
        if chosen.shape != wanted or not chosen.any():
            raise ValueError(f"mask: expected bool {list(wanted)} with at least one unit, got {list(chosen.shape)}")
        return FeatureSet(name, np.moveaxis(self.values, 2, -1)[chosen].T, model=name)


def matched_masks(mask: ArrayLike, count: int, *, seed: int = 0) -> list[NDArray[np.bool_]]:
    """Random masks with as many units in every cell (layer, expert) as ``mask`` ``[L,E,W]``, drawn outside it.

    Raises:
        ValueError: a cell has more units inside the mask than outside.
    """
    chosen = np.asarray(mask, dtype=bool)
    counts = chosen.sum(-1)
    if (counts > chosen.shape[-1] - counts).any():
        raise ValueError("mask: a layer holds more units inside than outside: there is nothing to match them with")
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        keys = np.where(chosen, np.inf, generator.random(chosen.shape))
        order = keys.argsort(-1).argsort(-1)
        out.append(order < counts[..., None])
    return out


def pooled_activations(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    point: Point = "residual",
    layers: Sequence[int] | None = None,
    experts: Sequence[str] | None = None,
    pooling: Pooling = "mean",
    tokens: Tokens = "all",
    controls: Mapping[str, Any] | None = None,
    name: str = "model",
    max_tokens: int = 2048,
    progress: bool = False,
) -> Pooled:
    """Activations of a model on texts, one vector per text, layer and expert.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer; texts are taken as they are, without a chat template.
        texts: the stimuli, in the order of the responses.
        point: where to read (:mod:`micro.interventions`): "residual" gives one set per layer, 0..L; "block_output" and
            the other points of routed rows one per layer and expert.
        layers: which; all of the point if not given.
        experts: which, by name, at points with experts; all if not given.
        pooling: "mean" over the tokens of a text, or its "last" token.
        tokens: at points with experts, "all" runs every expert on every token (the layer's result stays that of the
            usual routing); "zero" counts tokens that went to another expert as 0.
        controls: steering arguments of the forward passes.
        name: of the model in the names of the sets.
        max_tokens: slots per batch.
        progress: show a bar on stderr.

    Raises:
        ValueError: no texts, an empty text, an unknown pooling, mode, layer or expert.
    """
    if pooling not in ("mean", "last") or tokens not in ("all", "zero"):
        raise ValueError(f'pooling must be "mean" or "last" and tokens "all" or "zero", got {pooling!r}, {tokens!r}')
    iv.read(point)  # checks the point
    rows = _rows(tokenizer, texts)
    config = model.config
    names: list[str | None] = list(config.expert_names or ()) if axis(config, point) > 1 else [None]
    if experts is not None and names != [None]:
        unknown = sorted(set(experts) - set(names))
        if unknown:
            raise ValueError(f"experts: the model has no {', '.join(unknown)}; it has {', '.join(map(str, names))}")
        names = list(experts)
    end = depth(config, point)
    indices = list(range(end)) if layers is None else [int(layer) for layer in layers]
    if not indices or (outside := [layer for layer in indices if not 0 <= layer < end]):
        raise ValueError(f"layers: expected some of 0..{end - 1}, got {outside if indices else 'none'}")
    ids = [-1] if names == [None] else [list(config.expert_names or ()).index(str(e)) for e in names]
    sums = torch.zeros(len(indices), len(ids), len(texts), width(config, point), dtype=torch.float64)
    chosen = None if names == [None] else [str(e) for e in names]
    every = tokens == "all" and chosen is not None
    work = list(batches(rows, tokenizer, max_tokens=max_tokens))
    with evaluating(model):
        for numbers, batch in track(work, "features", unit="batches", enabled=progress):
            with model.intervene(iv.read(point, layers=indices, experts=chosen, name="out"), all_experts=every) as run:
                model.model(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                    use_cache=False,
                    **(controls or {}),
                )
            _pool(sums, run.reading("out"), numbers, batch["attention_mask"], indices, ids, pooling)
    return Pooled(sums.numpy(), indices, names, name)


def _rows(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, Row]]:
    if isinstance(texts, str) or not len(texts):
        raise ValueError("texts must be a list of at least one text")
    rows = []
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        if not ids:
            raise ValueError(f"texts: number {i} has no tokens")
        rows.append((i, text_row(ids)))
    return rows


def _pool(
    sums: Tensor,
    reading: Any,
    numbers: Sequence[int],
    mask: Tensor,
    layers: Sequence[int],
    experts: Sequence[int],
    pooling: Pooling,
) -> None:
    """Add the rows of one batch to ``sums`` ``[L',E',n,W]``, each with its weight in its text."""
    lengths = mask.sum(1)
    row, slot = reading.row.cpu(), reading.slot.cpu()
    weight = 1.0 / lengths[row].double() if pooling == "mean" else (slot == lengths[row] - 1).double()
    place_layer, place_expert = _places(layers), _places([e + 1 for e in experts])
    layer, expert = place_layer[reading.layer.cpu()], place_expert[reading.expert.cpu() + 1]
    text = torch.tensor(numbers)[row]
    flat = (layer * len(experts) + expert) * sums.shape[2] + text
    sums.view(-1, sums.shape[-1]).index_add_(0, flat, reading.values.cpu().double() * weight[:, None])


def _places(values: Sequence[int]) -> Tensor:
    """Lookup from a number to its place in ``values``."""
    table = torch.full((max(values) + 1,), -1, dtype=torch.int64)
    table[torch.tensor(list(values))] = torch.arange(len(values))
    return table
