"""Actions as the engine takes them (``micro/interventions.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro._native import core
from micro.interventions.actions import Action, bind
from micro.interventions.readings import Moments, Reading
from micro.interventions.session import Findings

if TYPE_CHECKING:
    from micro._C import Engine as NativeEngine
    from micro._C import Interventions as NativeTable
    from micro.modeling import MiCRoConfig

_NOBODY = -1  # a row that no call has


class EngineActions:
    """A table of actions for calls of one engine; :meth:`findings` tells what they brought back.

    all_experts: every expert runs on every token, in the layers in which an action meets routed rows.

    Raises:
        ValueError: an action that the model or the engine cannot do. The engine keeps no graph, and takes slices of
            slots that begin and end at numbers of at least 0.
    """

    def __init__(
        self, native: NativeEngine, config: MiCRoConfig, actions: Sequence[Action], *, all_experts: bool = False
    ) -> None:
        self._findings = Findings(actions)
        self._actions = list(actions)
        fields_of = [_fields(action, config) for action in actions]
        self.table: NativeTable = core.Interventions(native, fields_of, all_experts=all_experts)

    def findings(self) -> Findings:
        """Readings (without rows if none was met: an error when asked for) and moments."""
        for i, action in enumerate(self._actions):
            if action.kind == "read":
                parts = self.table.reading(i)
                if len(parts[0]):
                    self._findings.keep(i, Reading(*parts))
            elif action.kind == "moments":
                self._findings.keep(i, Moments(*self.table.moments(i)))
        return self._findings


def _fields(action: Action, config: MiCRoConfig) -> dict[str, Any]:
    if action.keep_graph:
        raise ValueError("keep_graph: the engine keeps no graph; read in model.intervene")
    bound = bind(action, config, torch.device("cpu"))
    slots, between = _slots(action)
    rows = action.rows
    return {
        "kind": action.kind,
        "point": action.point,
        "layers": sorted(bound.layers),
        "columns": bound.columns,
        "rows": [] if rows is None else list(rows) or [_NOBODY],
        "range": between,
        "slots": slots,
        "value": None if bound.value is None else bound.value.detach(),
        "source": None if action.source is None else _on_cpu(action.source),
        "seed": action.seed % 2**64,
        "covariance": action.covariance,
        "only_chosen": action.only_chosen,
        "first_row": action.first_row,
    }


def _slots(action: Action) -> tuple[Tensor | None, tuple[int, int, int] | None]:
    """A mask bool [B|1,S], or (first, last, step); both None: everywhere."""
    positions = action.positions
    if positions is None:
        return None, None
    if isinstance(positions, slice):
        return None, (positions.start or 0, 2**62 if positions.stop is None else positions.stop, positions.step or 1)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        return positions.cpu(), None
    numbers = torch.as_tensor(positions).cpu().long()
    mask = torch.zeros(1, int(numbers.max()) + 1 if len(numbers) else 1, dtype=torch.bool)
    mask[0, numbers] = True
    return mask, None


def _on_cpu(source: Reading) -> Reading:
    return Reading(**{part.name: getattr(source, part.name).detach().cpu() for part in fields(source)})
