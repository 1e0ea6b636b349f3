"""The places of a layer that an action can name, and the rows it meets there.

| point | rows | width | what |
|---|---|---|---|
| ``residual`` | tokens | H | input of layer l; l = L: what the last layer gives, before the final norm |
| ``router`` | tokens | E | router logits before steering |
| ``heads`` | routed | A D | outputs of the attention heads, before the output matrix |
| ``attention`` | routed | H | what attention adds to the residual |
| ``up`` | routed | F | outputs of the up-projection |
| ``units`` | routed | F | gated units, before the down-projection |
| ``ffn`` | routed | H | what the feed-forward part adds to the residual |
| ``block_output`` | routed | H | the expert's output before weighting |

A *routed* row is one pair of a token and an expert that computes it. Under FFN experts attention is shared, so that
``heads`` and ``attention`` have token rows there, and ``block_output`` is what the expert's FFN gives. ``router`` has
rows where the router runs: not where labels or force decide for every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from micro.modeling import MiCRoConfig

Point = Literal["residual", "router", "heads", "attention", "up", "units", "ffn", "block_output"]
POINTS: tuple[Point, ...] = get_args(Point)


def check_point(point: str) -> None:
    if point not in POINTS:
        raise ValueError(f"point is {point!r}, expected one of {', '.join(POINTS)}")


def width(config: MiCRoConfig, point: Point) -> int:
    """W, columns of a row at a point."""
    if point == "heads":
        return config.num_attention_heads * int(config.head_dim or 0)
    if point in ("up", "units"):
        return int(config.intermediate_size)
    return int(config.num_experts if point == "router" else config.hidden_size)


def token_rows(config: MiCRoConfig, point: Point) -> bool:
    """Whether the rows at a point belong to tokens, not to experts."""
    return point in ("residual", "router") or (not config.is_block and point in ("heads", "attention"))


def axis(config: MiCRoConfig, point: Point) -> int:
    """E', the length of a point's expert axis: E at routed rows, 1 at token rows."""
    return 1 if token_rows(config, point) else int(config.num_experts)


def depth(config: MiCRoConfig, point: Point) -> int:
    """How many layers have the point: the residual stream also has an end."""
    return int(config.num_hidden_layers) + (point == "residual")
