"""A record of routing decisions: what was chosen, with which scores, at every layer and slot."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from micro.experts import default_names

if TYPE_CHECKING:
    import pandas

# tensor field -> axes of rows and of slots
_AXES = {"ids": (1, 2), "weights": (1, 2), "probs": (1, 2), "logits": (1, 2), "raw_logits": (1, 2), "mask": (0, 1)}


@dataclass(repr=False)
class RoutingTrace:
    """Routing of B rows and S slots in L layers (interface.md 2).

    ids int [L,B,S,K], descending by probability; weights [L,B,S,K]; probs, logits (effective: after steering; the given
    rows under label routing) and raw_logits (before steering) float [L,B,S,E]; mask bool [B,S], False at padding;
    start: absolute number of the first slot; prompt_length: absolute number of prompt slots, so the trace's slots
    ``prompt_length - start`` and later belong to the answer.
    """

    ids: Tensor
    weights: Tensor
    probs: Tensor
    logits: Tensor
    raw_logits: Tensor
    mask: Tensor
    start: int = 0
    prompt_length: int = 0
    expert_names: list[str] | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 4 or self.probs.dim() != 4:
            raise ValueError(
                f"RoutingTrace: ids {list(self.ids.shape)} and probs {list(self.probs.shape)} must be [L,B,S,K] and "
                "[L,B,S,E]"
            )
        layers, rows, slots, k = self.ids.shape
        experts = self.probs.shape[-1]
        want = {"weights": (layers, rows, slots, k), "mask": (rows, slots)}
        want |= dict.fromkeys(("probs", "logits", "raw_logits"), (layers, rows, slots, experts))
        for name, shape in want.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"RoutingTrace: {name} is {list(getattr(self, name).shape)}, expected {list(shape)}")
        if self.expert_names is None:
            self.expert_names = default_names(experts)

    def __repr__(self) -> str:
        """The shape of the record; the tensors of a long prompt would fill pages."""
        layers, rows, slots, k = self.ids.shape
        return (
            f"RoutingTrace(layers={layers}, rows={rows}, slots={slots}, k={k}, start={self.start}, "
            f"prompt_length={self.prompt_length}, experts={self.expert_names})"
        )

    # ------------------------------------------------------------------ parts
    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs.shape[-1]

    def rows(self, index: Tensor) -> RoutingTrace:
        """The rows of ``index`` [B'], in that order."""
        return self._map(lambda tensor, axes: tensor.index_select(axes[0], index.to(tensor.device)))

    def slots(self, first: int, last: int) -> RoutingTrace:
        """Slots ``first`` (inclusive) to ``last`` (exclusive), counted from the trace's own first slot."""
        part = self._map(lambda tensor, axes: tensor.narrow(axes[1], first, last - first))
        part.start = self.start + first
        return part

    @property
    def prompt(self) -> RoutingTrace:
        """The part that belongs to the prompt."""
        return self.slots(0, self._split())

    @property
    def answer(self) -> RoutingTrace:
        """The part that belongs to generated tokens."""
        return self.slots(self._split(), self.ids.shape[2])

    def _split(self) -> int:
        return min(max(self.prompt_length - self.start, 0), self.ids.shape[2])

    def _map(self, function) -> RoutingTrace:  # type: ignore[no-untyped-def]
        tensors = {name: function(getattr(self, name), axes) for name, axes in _AXES.items()}
        return RoutingTrace(
            **tensors, start=self.start, prompt_length=self.prompt_length, expert_names=self.expert_names
        )

    @classmethod
    def cat(cls, parts: Sequence[RoutingTrace], prompt_length: int) -> RoutingTrace:
        """Traces of consecutive slots of the same rows as one."""
        for before, after in pairwise(parts):
            if before.start + before.ids.shape[2] != after.start:
                raise ValueError(
                    f"RoutingTrace.cat: a part ends before slot {before.start + before.ids.shape[2]}, "
                    f"the next begins at {after.start}"
                )
        tensors = {name: torch.cat([getattr(p, name) for p in parts], axes[1]) for name, axes in _AXES.items()}
        return cls(**tensors, start=parts[0].start, prompt_length=prompt_length, expert_names=parts[0].expert_names)

    # ------------------------------------------------------------------ numbers
    def usage(self, by: Literal["layer", "token"] | None = None) -> Tensor:
        """Share of each expert over real tokens: [E] over everything, [L,E] by layer, [B,S,E] by token (mean over
        layers, 0 at padding). K = 1 counts choices; K > 1 averages probabilities (model.md 9.1).
        """
        share = self.probs
        if self.ids.shape[-1] == 1:
            share = torch.nn.functional.one_hot(self.ids[..., 0].long(), self.num_experts).to(share.dtype)
        real = self.mask.to(share.dtype)[None, :, :, None]
        share = torch.where(real > 0, share, 0)
        if by == "token":
            return share.mean(0)
        if by not in (None, "layer"):
            raise ValueError(f'usage: by is {by!r}, expected None, "layer" or "token"')
        per_layer = share.sum((1, 2)) / real.sum().clamp(min=1)
        return per_layer if by == "layer" else per_layer.mean(0)

    def entropy(self) -> Tensor:
        """Decision entropy per layer, [L]: mean over real tokens of -sum p log p, in nats (model.md 7.5)."""
        h = -torch.special.xlogy(self.probs, self.probs).sum(-1)
        real = self.mask.to(h.dtype)[None]
        return torch.where(real > 0, h, 0).sum((1, 2)) / real.sum().clamp(min=1)

    def to_frame(self) -> pandas.DataFrame:
        """One line per choice: layer, row, slot (absolute), part, rank, expert, name, weight, prob. No padding."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("RoutingTrace.to_frame needs pandas: pip install micro-reasoners[eval]") from error
        real = self.mask.cpu()[None, :, :, None].expand(self.ids.shape)
        layer, row, slot, rank = (axis.numpy() for axis in real.nonzero(as_tuple=True))
        ids = self.ids.cpu().long()
        chosen = self.probs.cpu().double().gather(-1, ids)
        expert = ids[real].numpy()
        absolute = slot + self.start
        names = self.expert_names or default_names(self.num_experts)
        return pd.DataFrame(
            {
                "layer": layer,
                "row": row,
                "slot": absolute,
                "part": ["prompt" if s < self.prompt_length else "answer" for s in absolute],
                "rank": rank,
                "expert": expert,
                "name": [names[e] for e in expert],
                "weight": self.weights.cpu().double()[real].numpy(),
                "prob": chosen[real].numpy(),
            }
        )

    # ------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file (no pickle), beside and then renamed. bfloat16 is stored as float32 and restored."""
        import numpy as np

        path = _npz(path)
        dtypes = {name: str(getattr(self, name).dtype).removeprefix("torch.") for name in _AXES}
        arrays = {}
        for name in _AXES:
            tensor = getattr(self, name).detach().cpu()
            arrays[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        about: dict[str, Any] = {"format": 1, "start": self.start, "prompt_length": self.prompt_length}
        about |= {"dtypes": dtypes, "expert_names": self.expert_names}
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as stream:
                np.savez(stream, about=np.array(json.dumps(about)), **arrays)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Read what :meth:`save` wrote. A file of another kind is a ``ValueError`` that names it."""
        import zipfile

        import numpy as np

        path = _npz(path)
        try:
            with np.load(path, allow_pickle=False) as data:
                about = json.loads(str(data["about"]))
                tensors = {
                    name: torch.from_numpy(data[name]).to(getattr(torch, about["dtypes"][name])) for name in _AXES
                }
            start, prompt_length, names = about["start"], about["prompt_length"], about["expert_names"]
        except (KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path}: no routing trace written by RoutingTrace.save ({error})") from error
        return cls(**tensors, start=start, prompt_length=prompt_length, expert_names=names)


def _npz(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


assert set(_AXES) <= {f.name for f in fields(RoutingTrace)}
