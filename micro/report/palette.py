"""Colours, marks and the order in which experts are shown: language, logic, social, world."""

from __future__ import annotations

from collections.abc import Sequence

from micro.experts import COLOURS, DISPLAY_ORDER, MARKS, NAMES

OTHER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe-Ito


def expert_colours(experts: Sequence[str]) -> list[str]:
    """The four official colours for the four official names, a colour-blind-safe palette otherwise."""
    if tuple(experts) == NAMES:
        return list(COLOURS)
    return [OTHER_COLOURS[i % len(OTHER_COLOURS)] for i in range(len(experts))]


def display_order(experts: Sequence[str]) -> list[int]:
    """Indices in the order in which figures show them."""
    return list(DISPLAY_ORDER) if tuple(experts) == NAMES else list(range(len(experts)))


def expert_marks(experts: Sequence[str]) -> list[str]:
    """One letter or number per expert."""
    return list(MARKS) if tuple(experts) == NAMES else [str(e) for e in range(len(experts))]
