"""Every point of a model, with what an action meets there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from micro.interventions.points import POINTS, Point, axis, depth, token_rows, width

if TYPE_CHECKING:
    from micro.modeling import MiCRoConfig, MiCRoPreTrainedModel

_MEANING: dict[Point, str] = {
    "residual": "input of a layer; the last one: what the last layer gives, before the final norm",
    "router": "router logits before steering",
    "heads": "outputs of the attention heads, before the output matrix",
    "attention": "what attention adds to the residual",
    "up": "outputs of the up-projection",
    "units": "gated units, before the down-projection",
    "ffn": "what the feed-forward part adds to the residual",
    "block_output": "the expert's output before weighting",
}


@dataclass(frozen=True)
class PointInfo:
    """A point of one model.

    layers: L', how many layers have it; rows: "tokens", or "routed" (pairs of a token and an expert); experts: E', the
    length of its expert axis; width: W.
    """

    point: Point
    layers: int
    rows: str
    experts: int
    width: int
    what: str


class PointTable(tuple[PointInfo, ...]):
    """All points of a model; prints as a table."""

    def __repr__(self) -> str:
        lines = [f"{'point':<13} {'layers':>6} {'rows':<7} {'experts':>7} {'width':>6}  what"]
        lines += [f"{p.point:<13} {p.layers:>6} {p.rows:<7} {p.experts:>7} {p.width:>6}  {p.what}" for p in self]
        return "\n".join(lines)


def points(model: MiCRoPreTrainedModel | MiCRoConfig) -> PointTable:
    """Every place of a model, or of a config, that an action can name."""
    held: Any = model
    config: MiCRoConfig = getattr(held, "config", held)
    return PointTable(
        PointInfo(
            point,
            depth(config, point),
            "tokens" if token_rows(config, point) else "routed",
            axis(config, point),
            width(config, point),
            _MEANING[point],
        )
        for point in POINTS
    )
