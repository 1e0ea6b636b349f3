"""Which piece of a text each token belongs to, and which tokens touch a region: the hot inner step of `encode`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def code_points(text: str) -> NDArray[np.uint32]:
    """A text as code points, uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _begins(offsets: Ints) -> Ints:
    """Where each token begins. Some tokenizers trim white space off their offsets and leave an empty range for a token
    that is nothing else: such a token begins where the one before it ended.
    """
    starts = offsets[:, 0].copy()
    empty = offsets[:, 0] >= offsets[:, 1]
    before = np.concatenate([[0], offsets[:-1, 1]]) if len(offsets) else starts
    starts[empty] = np.minimum(before, offsets[:, 0])[empty]
    return starts


def token_pieces(text: str, offsets: Ints, cuts: Ints) -> Ints:
    """Offsets mode of model.md 8.4: the piece that owns each token's first character that is no white space.

    offsets int64 [T,2], code points [start, end) of each token; cuts int64 [n], ascending ends of the first n pieces.
    Returns int64 [T], 0..n: a token of white space only counts by its first character.
    """
    points = code_points(text)
    solid = ~np.isin(points, _SPACES)
    # next_solid[i]: first place at or after i that is no white space
    places = np.where(solid, np.arange(len(points)), len(points))
    next_solid = np.append(np.minimum.accumulate(places[::-1])[::-1], len(points)) if len(points) else np.zeros(1, int)
    begins = _begins(offsets)
    first = next_solid[np.minimum(begins, len(points))]
    owner = np.where(first < offsets[:, 1], first, begins)
    return np.searchsorted(cuts, owner, side="right").astype(np.int64)


def touches(offsets: Ints, regions: Ints) -> NDArray[np.bool_]:
    """Whether each token (offsets int64 [T,2]) shares a character with one of the regions int64 [n,2]. Returns bool [T]."""
    begins, ends = _begins(offsets), offsets[:, 1]
    hit = np.zeros(len(offsets), dtype=bool)
    for low, high in regions:
        hit |= (begins < high) & (ends > low) & (begins < ends)
    return hit


_SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], dtype=np.uint32)
