"""Which records belong together: answers that were made from one template say less than as many independent ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from micro.experts import LABELS

if TYPE_CHECKING:
    from micro.data import Record

Groups = Sequence[Sequence[Sequence[str]]]  # [records][rows] -> names; none = a group of its own


def record_groups(records: Sequence[Record]) -> list[list[tuple[str, ...]]] | None:
    """Groups of each record's items, a row for each of the four labels, or None where no record names any.

    ``meta["templates"]`` with one name per span belongs to the spans: a row is in the groups of its own spans. A list
    of another length, and ``meta["group"]`` (one name), hold for all rows of the record.
    """
    found = [_of_record(record) for record in records]
    return found if any(names for record in found for names in record) else None


def _of_record(record: Record) -> list[tuple[str, ...]]:
    templates = record.meta.get("templates")
    if not isinstance(templates, list | tuple) or not templates:
        group = record.meta.get("group")
        return [() if group is None else (str(group),)] * len(LABELS)
    names = [str(name) for name in templates]
    if len(names) != len(record.spans):
        return [tuple(dict.fromkeys(names))] * len(LABELS)
    pairs = list(zip(record.spans, names, strict=True))
    return [tuple(dict.fromkeys(name for span, name in pairs if span.label == label)) for label in LABELS]
