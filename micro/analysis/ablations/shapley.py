"""Shapley values and interactions of a set function: exact for a few players, sampled for many.

A set function is a table: ``values[m]`` is the worth of the coalition whose members are the bits of ``m``, so
``values[0]`` is that of nobody and ``values[2**N - 1]`` that of all N players.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from micro.analysis.statistics import Array

MOST_PLAYERS = 16  # of an exact table: 65,536 coalitions


def members(mask: int) -> list[int]:
    """Players of a coalition, ascending."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def coalition(players: Sequence[int]) -> int:
    """The bits of a coalition."""
    return sum(1 << i for i in set(players))


def shapley_values(values: ArrayLike) -> Array:
    """Exact Shapley values (Shapley 1953).

    ``phi_i = sum over S without i of |S|! (N - |S| - 1)! / N! * (v(S + i) - v(S))``

    Args:
        values: ``[2**N, ...]``, worth of every coalition.

    Returns:
        float64 ``[N, ...]``. The values sum to ``v(all) - v(nobody)``.

    Raises:
        ValueError: the first axis is no power of two, or more than 16 players.
    """
    table, players = _table(values)
    masks = np.arange(len(table))
    sizes = _sizes(len(table))
    weights = np.array([_weight(s, players) for s in range(players)])
    out = np.zeros((players, *table.shape[1:]))
    for i in range(players):
        without = masks[(masks >> i & 1) == 0]
        out[i] = np.tensordot(weights[sizes[without]], table[without | 1 << i] - table[without], 1)
    return out


def interactions(values: ArrayLike) -> Array:
    """Pairwise Shapley interaction indices (Grabisch and Roubens 1999).

    ``I_ij = sum over S without i, j of |S|! (N - |S| - 2)! / (N - 1)! * (v(S+ij) - v(S+i) - v(S+j) + v(S))``: above 0
    where two players are worth more together than apart, below 0 where they stand in for each other.

    Args:
        values: ``[2**N, ...]``, worth of every coalition.

    Returns:
        float64 ``[N, N, ...]``, symmetric, 0 on the diagonal.

    Raises:
        ValueError: as for :func:`shapley_values`.
    """
    table, players = _table(values)
    masks = np.arange(len(table))
    sizes = _sizes(len(table))
    out = np.zeros((players, players, *table.shape[1:]))
    weights = np.array([_weight(s, players - 1) for s in range(players - 1)])
    for i in range(players):
        for j in range(i + 1, players):
            rest = masks[((masks >> i & 1) == 0) & ((masks >> j & 1) == 0)]
            a, b = 1 << i, 1 << j
            together = table[rest | a | b] - table[rest | a] - table[rest | b] + table[rest]
            out[i, j] = out[j, i] = np.tensordot(weights[sizes[rest]], together, 1)
    return out


def _weight(size: int, players: int) -> float:
    return factorial(size) * factorial(players - size - 1) / factorial(players)


def _sizes(count: int) -> NDArray[np.int64]:
    return np.array([mask.bit_count() for mask in range(count)])


def _table(values: ArrayLike) -> tuple[Array, int]:
    table = np.asarray(values, dtype=np.float64)
    players = len(table).bit_length() - 1 if table.ndim else 0
    if players < 1 or len(table) != 1 << players or players > MOST_PLAYERS:
        raise ValueError(
            f"values: the first axis must hold all 2**N coalitions of 1..{MOST_PLAYERS} players, got shape "
            f"{list(table.shape)}"
        )
    return table, players


@dataclass(frozen=True)
class SampledShapley:
    """Estimates ``values [N, ...]`` with standard errors ``se``; ``evaluations``: coalitions whose worth was asked for.

    ``permutations``: how many were walked; an antithetic pair counts as two.
    """

    values: Array
    se: Array
    permutations: int
    evaluations: int


def sampled_shapley(
    worth: Callable[[frozenset[int]], ArrayLike],
    players: int,
    *,
    permutations: int = 200,
    antithetic: bool = True,
    truncate: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SampledShapley:
    """Shapley values of many players from random orders (Castro et al. 2009; antithetic pairs: Mitchell et al. 2022).

    Players enter in a random order and are credited with what their entry adds.

    Args:
        worth: of a coalition: a number or an array of a fixed shape. Asked once per coalition.
        players: N.
        permutations: how many orders; rounded up to an even number with ``antithetic``.
        antithetic: every order is followed by its reverse, which lowers the variance.
        truncate: an order ends when the worth is within this distance of that of all players; the rest gets 0 (Ghorbani
            and Zou 2019). 0 = never: exact in expectation. Above it the sum of the values is off by at most this much,
            and so is each value where nobody does harm.
        seed: of the orders.
        progress: called with the number of orders done.

    Returns:
        A :class:`SampledShapley`. Without truncation the values sum to ``v(all) - v(nobody)`` exactly.

    Raises:
        ValueError: no player, or fewer than two orders.
    """
    if players < 1 or permutations < 2:
        raise ValueError(f"sampled_shapley: needs a player and two orders, got {players} and {permutations}")
    known: dict[frozenset[int], Array] = {}

    def value(group: frozenset[int]) -> Array:
        if group not in known:
            known[group] = np.asarray(worth(group), dtype=np.float64)
        return known[group]

    empty, full = value(frozenset()), value(frozenset(range(players)))
    generator = np.random.default_rng(seed)
    blocks: list[Array] = []
    walked = 0
    while walked < permutations:
        order = generator.permutation(players)
        pair = [order, order[::-1]] if antithetic else [order]
        blocks.append(np.mean([_credits(value, one, empty, full, truncate) for one in pair], axis=0))
        walked += len(pair)
        if progress is not None:
            progress(walked)
    drawn = np.stack(blocks)
    se = drawn.std(0, ddof=1) / np.sqrt(len(drawn)) if len(drawn) > 1 else np.full_like(drawn[0], np.nan)
    return SampledShapley(drawn.mean(0), se, walked, len(known))


def _credits(
    value: Callable[[frozenset[int]], Array], order: NDArray[np.int64], empty: Array, full: Array, truncate: float
) -> Array:
    """What each player's entry adds along one order, [N, ...]."""
    out = np.zeros((len(order), *full.shape))
    group: frozenset[int] = frozenset()
    before = empty
    for player in order.tolist():
        if truncate > 0 and group and bool((np.abs(full - before) <= truncate).all()):
            break
        group |= {player}
        after = value(group)
        out[player] = after - before
        before = after
    return out
