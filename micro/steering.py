"""Steering by context managers (model.md 4.1). They fill the arguments of the calls made inside them and nothing else.

    with micro.steering.ablate("social"):
        model.generate(**inputs)                    # as model.generate(..., ablate="social")

They nest by union (``ablate``, ``keep``), by sum (``bias``) and innermost wins (``force``), end on every way out of the
block, and belong to the thread that opened them: a new thread starts without them. ``forward`` and ``generate`` read
them when they are called.
"""

from __future__ import annotations

from contextvars import Token
from types import TracebackType
from typing import Any

from micro.modeling.controls import ACTIVE, Phases
from micro.modeling.steer import Steering

__all__ = ["Phases", "Steering", "ablate", "bias", "force", "keep"]


class _Context:
    """One open control. The forms of its value are those of the argument of the same name."""

    name = ""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._tokens: list[Token[tuple[tuple[str, Any], ...]]] = []

    def __enter__(self) -> None:
        self._tokens.append(ACTIVE.set((*ACTIVE.get(), (self.name, self._value))))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ACTIVE.reset(self._tokens.pop())


class ablate(_Context):  # noqa: N801  (reads like the argument it fills)
    """Experts whose logit becomes -inf: ``with ablate(["logic", "social"])``. Nested sets are united."""

    name = "ablate"


class keep(_Context):  # noqa: N801
    """The only experts that stay: ablates the others."""

    name = "keep"


class bias(_Context):  # noqa: N801
    """Numbers added to logits: ``with bias({"logic": 1.5})``. Nested numbers are added up."""

    name = "bias"


class force(_Context):  # noqa: N801
    """The expert of every token: ``with force("language")``. The innermost wins."""

    name = "force"
