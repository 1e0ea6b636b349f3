"""The compiled span helpers against a few lines of Python, on random texts and offsets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micro._native import core
from micro.data.spans import code_points, token_pieces, touches

TEXTS = st.text(st.sampled_from("ab \n\t\x1c\x85\u00a0\u2003\u3000é😀."), max_size=40)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]], list[int]]:
    text = draw(TEXTS)
    place = st.integers(0, len(text))
    ends = sorted(draw(st.lists(place, max_size=30)))
    # Tokens follow each other, as a tokenizer's do; some keep an empty range, some drop the white space before them.
    tokens = [(min(a + draw(st.integers(0, 2)), b), b) for a, b in zip([0, *ends], ends, strict=False)]
    return text, tokens, sorted(draw(st.lists(place, max_size=6)))


def begins(tokens: list[tuple[int, int]], t: int) -> int:
    start, end = tokens[t]
    return start if start < end or t == 0 else min(tokens[t - 1][1], start)


def as_pairs(tokens: list[tuple[int, int]]) -> np.ndarray:
    return np.array(tokens, dtype=np.int64).reshape(-1, 2)


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_token_pieces(layout: tuple[str, list[tuple[int, int]], list[int]]) -> None:
    text, tokens, cuts = layout
    expected = []
    for t, (_, end) in enumerate(tokens):
        start = begins(tokens, t)
        owner = next((i for i in range(start, end) if not text[i].isspace()), start)
        expected.append(sum(cut <= owner for cut in cuts))
    assert token_pieces(text, as_pairs(tokens), np.array(cuts, dtype=np.int64)).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_tokens_in_regions(layout: tuple[str, list[tuple[int, int]], list[int]]) -> None:
    _, tokens, cuts = layout
    regions = list(zip(cuts[::2], cuts[1::2], strict=False))
    expected = [
        any(set(range(begins(tokens, t), end)) & set(range(a, b)) for a, b in regions)
        for t, (_, end) in enumerate(tokens)
    ]
    assert touches(as_pairs(tokens), as_pairs(regions)).tolist() == expected


def test_every_space_of_python_is_a_space() -> None:
    points = [c for c in range(0x11000) if not 0xD800 <= c <= 0xDFFF]
    text = "".join(f"{chr(c)}x" for c in points)
    tokens = as_pairs([(2 * i, 2 * i + 2) for i in range(len(points))])
    cuts = np.arange(1, 2 * len(points), 2)  # every first character is a piece of its own
    skipped = token_pieces(text, tokens, cuts) - np.arange(len(points))
    assert [points[i] for i in np.flatnonzero(skipped)] == [c for c in points if chr(c).isspace()]


@pytest.mark.parametrize(
    ("offsets", "cuts", "message"),
    [
        ([[0, 4]], [1], "token 0"),
        ([[2, 1]], [1], "token 0"),
        ([[0, 1]], [2, 1], "cut 1"),
        ([[0, 1]], [9], "cut 0"),
    ],
)
def test_values_out_of_range_are_refused(offsets: list[list[int]], cuts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_pieces("abc", np.array(offsets), np.array(cuts))


def test_overlapping_regions_are_refused() -> None:
    with pytest.raises(ValueError, match="region 1"):
        touches(as_pairs([(0, 1)]), as_pairs([(0, 3), (2, 4)]))


def test_arrays_are_neither_converted_nor_copied() -> None:
    offsets, cuts = as_pairs([(0, 1), (1, 3)]), np.array([1])
    with pytest.raises(TypeError, match=r"tokens.*int64.*int32"):
        core.token_pieces(code_points("abc"), offsets.astype(np.int32), cuts)
    with pytest.raises(TypeError, match="contiguous"):
        core.token_pieces(code_points("abc"), offsets[:, ::-1], cuts)
    with pytest.raises(TypeError, match="rank 1"):
        core.token_pieces(code_points("abc"), offsets, cuts.reshape(1, 1))
    with pytest.raises(TypeError, match=r"\[n, 2\]"):
        core.tokens_in_regions(np.zeros((2, 3), dtype=np.int64), offsets)
