"""The curriculum: stages of what learns, who routes and how fast. One C++ class for C++ and Python trainers.

See ``csrc/include/micro/curriculum.h`` for the rules, and model.md 6 for where they come from.
"""

from __future__ import annotations

from micro import _native  # noqa: F401  (loads libmicro first, as micro._C needs it)
from micro._C import Curriculum, FreezeRule, Stage

__all__ = ["Curriculum", "FreezeRule", "Stage"]
