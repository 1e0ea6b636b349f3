"""Parts of a model that can be patched or removed: layers, cells, heads, slots of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from micro.interventions.points import Point, axis, check_point

if TYPE_CHECKING:
    from micro.modeling import MiCRoConfig

Level = Literal["layer", "cell", "head", "slot"]


@dataclass(frozen=True)
class Component:
    """What lies at a point of a layer: everything, or one expert's, one head's, one slot's part of it."""

    point: Point
    layer: int
    expert: int | None = None
    head: int | None = None
    slot: int | None = None

    def where(self) -> dict[str, Any]:
        """The arguments of an action on this component."""
        return {
            "layers": self.layer,
            "experts": None if self.expert is None else [self.expert],
            "heads": None if self.head is None else [self.head],
            "positions": None if self.slot is None else [self.slot],
        }

    def label(self, experts: list[str]) -> str:
        """For tables: ``layer 3 social head 2``."""
        parts = [f"layer {self.layer}"]
        parts += [experts[self.expert]] if self.expert is not None else []
        parts += [f"head {self.head}"] if self.head is not None else []
        parts += [f"slot {self.slot}"] if self.slot is not None else []
        return " ".join(parts)


def components(config: MiCRoConfig, point: Point, level: Level, slots: int = 0) -> list[Component]:
    """All components of a level at a point, layer by layer.

    Raises:
        ValueError: the level is unknown, or heads are asked for at another point.
    """
    if level not in ("layer", "cell", "head", "slot"):
        raise ValueError(f'level is {level!r}, expected "layer", "cell", "head" or "slot"')
    check_point(point)
    if level == "head" and point != "heads":
        raise ValueError(f'level "head" belongs to the point "heads", not to {point!r}: give "cell" or "layer"')
    layers = range(config.num_hidden_layers)
    cells = range(axis(config, point)) if axis(config, point) > 1 else [None]
    if level == "layer":
        return [Component(point, layer) for layer in layers]
    if level == "slot":
        return [Component(point, layer, slot=slot) for layer in layers for slot in range(slots)]
    heads = range(config.num_attention_heads) if level == "head" else [None]
    return [Component(point, layer, e, h) for layer in layers for e in cells for h in heads]
