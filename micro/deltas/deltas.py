"""What each expert learned: the difference of its weights from those it was cloned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.deltas.sources import Mixture, open_base, open_mixture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from micro.modeling import MiCRoForCausalLM

MEAN = "mean of the experts"


@dataclass(frozen=True)
class Group:
    """The E clones of one tensor. keys: official names, one per expert; name: ``q_proj``, ``input_norm``, ...; dense:
    the name in a dense Hugging Face model; shape: of one expert's tensor.
    """

    layer: int
    name: str
    keys: tuple[str, ...]
    dense: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """A linear map and no gain."""
        return len(self.shape) == 2


class ExpertDeltas:
    """Task vectors tau_e = theta_e - theta_base of the experts of a mixture, tensor by tensor.

    They are exact, because experts are clones of a base (model.md 5.7). Arithmetic is done in float32 for files of 16
    bits and in float64 for others, so that base + tau is theta again; what is written has the dtype of the mixture.

    Args:
        mixture: a model, or the folder of one (ours or official); tensors of a folder stay on disk until needed.
        base: what the experts were cloned from: a dense model, folder or hub id, or a mixture whose experts are still
            equal. None: the mean of the experts in each layer, rounded to the mixture's dtype (what
            ``micro.collapse(model, "mean")`` gives); the deltas of a layer then sum to zero up to rounding.

    Raises:
        ValueError: the base has other shapes or lacks tensors.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", 2023 (task vectors).
    """

    def __init__(self, mixture: MiCRoForCausalLM | str | Path, base: Any = None) -> None:
        from micro.convert.backbone import dense_key
        from micro.modeling.keys import official_map

        self.mixture: Mixture = open_mixture(mixture, "ExpertDeltas")
        self.config = self.mixture.config
        self.experts = list(self.config.expert_names or [])
        stacks: dict[str, list[str]] = {}
        self.shared: list[str] = []
        shapes = {}
        for key, target in official_map(self.config).items():
            if target.expert is None:
                self.shared.append(key)
            else:
                stacks.setdefault(target.name, []).append(key)
                shapes[target.name] = target.shape
        self.groups = [
            Group(int(name.split(".")[2]), name.split(".")[4], tuple(keys), str(dense_key(keys[0])), shapes[name])
            for name, keys in stacks.items()
        ]
        # Of the mixture's tensors, and of everything that is written.
        self.dtype: torch.dtype = self.mixture.get(self.groups[0].keys[0]).dtype
        self._base = None
        self.base_name = MEAN
        if base is not None:
            self._base, self.base_name = open_base(base, self.mixture)

    # ------------------------------------------------------------------ tensors
    @property
    def has_base(self) -> bool:
        """Whether a base was given; otherwise it is the mean of the experts."""
        return self._base is not None

    def stack(self, group: Group) -> Tensor:
        """The experts' tensors [E, ...] in the mixture's dtype."""
        import torch

        return torch.stack([self.mixture.get(key).detach() for key in group.keys])

    def base(self, group: Group) -> Tensor:
        """The tensor that the experts were cloned from, in the mixture's dtype.

        Raises:
            ValueError: the base is a mixture whose experts differ here.
        """
        import torch

        if self._base is None:
            return _mean(self.stack(group))
        first = self._base(group.keys[0])
        if self.base_name.startswith("mixture") and any(
            not torch.equal(first, self._base(key)) for key in group.keys[1:]
        ):
            raise ValueError(
                f"base: the experts of {self.base_name} differ in {group.keys[0]}, so they share no base; give the "
                "dense backbone, or the mixture right after upcycling"
            )
        return first.to(self.dtype)

    def tau(self, group: Group) -> Tensor:
        """theta_e - theta_base of all experts, [E, ...], in float32 (16-bit files) or float64."""
        wide = wide_dtype(self.dtype)
        return self.stack(group).to(wide) - self.base(group).to(wide)

    def shared_base(self, name: str) -> Tensor | None:
        """The base's tensor for one that no expert owns; None for routers over a dense base, and without a base."""
        if self._base is None:
            return None
        try:
            return self._base(name).to(self.dtype)
        except KeyError:
            return None

    # ------------------------------------------------------------------ choices
    def indices(self, experts: str | int | Iterable[str | int] | None, what: str) -> list[int]:
        """Indices of experts given by names or numbers; all for None.

        Raises:
            ValueError: an unknown, repeated or empty choice.
        """
        from micro.modeling.controls import ExpertNames

        if experts is None:
            return list(range(len(self.experts)))
        found = ExpertNames(self.config).many(experts, what)
        if not found or len(set(found)) != len(found):
            raise ValueError(f"{what}: expected one or more different experts of {self.experts}, got {experts!r}")
        return found

    def select(self, layers: Sequence[int] | None = None, names: Sequence[str] | None = None) -> Iterator[Group]:
        """Groups of given layers and names (``q_proj``, ...); all for None."""
        known = {group.name for group in self.groups}
        if names is not None and (unknown := sorted(set(names) - known)):
            raise ValueError(f"matrices: unknown {unknown}; known are {sorted(known)}")
        depth = self.config.num_hidden_layers
        if layers is not None and (outside := [layer for layer in layers if not 0 <= layer < depth]):
            raise ValueError(f"layers: {outside} are outside 0..{depth - 1}")
        return (
            group
            for group in self.groups
            if (layers is None or group.layer in layers) and (names is None or group.name in names)
        )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of ``dtype`` are subtracted and added without visible loss."""
    import torch

    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def _mean(stack: Tensor) -> Tensor:
    """Mean over experts in float64; where all agree, their bits."""
    import torch

    agree = (stack[1:] == stack[:1]).all(0)
    return torch.where(agree, stack[0], stack.double().mean(0).to(stack.dtype))
