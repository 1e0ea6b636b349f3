"""Which piece of a text each token belongs to, and which tokens touch a region: C++ on arrays that are not copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def code_points(text: str) -> NDArray[np.uint32]:
    """A text as code points, uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _core() -> Any:
    from micro._native import core  # loaded on first use: reading and checking data needs no compiled core

    return core


def token_pieces(text: str, offsets: Ints, cuts: Ints) -> Ints:
    """Offsets mode of model.md 8.4: the piece that owns each token's first character that is no white space.

    offsets int64 [T,2], code points [start, end) of each token; cuts int64 [n], ascending ends of the first n pieces.
    Returns int64 [T], 0..n. A token of white space only counts by its first character; one with an empty range begins
    where the token before it ended. ValueError: an offset or a cut out of range; TypeError: another dtype or layout.
    """
    pieces: Ints = _core().token_pieces(code_points(text), offsets, cuts)
    return pieces


def touches(offsets: Ints, regions: Ints) -> NDArray[np.bool_]:
    """Whether each token (offsets int64 [T,2]) shares a character with a region (int64 [n,2], ascending): bool [T]."""
    inside: NDArray[np.bool_] = _core().tokens_in_regions(offsets, regions)
    return inside
