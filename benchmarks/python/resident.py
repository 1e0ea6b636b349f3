"""Resident memory of this process, from /proc."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def _field(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no field {name}")


def resident() -> int:
    """Bytes that are resident now, mapped files included."""
    return _field("VmRSS")


def peak_above(run: Callable[[], Any]) -> int:
    """The largest number of resident bytes while ``run`` runs, above those before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident()
    run()
    return _field("VmHWM") - before
