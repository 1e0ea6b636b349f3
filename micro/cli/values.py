"""How numbers for experts are written on the command line."""

from __future__ import annotations


def numbers_by_name(text: str | None, option: str) -> dict[str, float] | None:
    """``logic=1.5,social=-2`` as a dictionary; None and the empty string give None."""
    if text is None or not text.strip():
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"{option}: {part.strip()!r} must be NAME=NUMBER, as in logic=1.5,social=-2")
        if name.strip() in found:
            raise ValueError(f"{option}: {name.strip()!r} is given twice")
        found[name.strip()] = value
    return found
