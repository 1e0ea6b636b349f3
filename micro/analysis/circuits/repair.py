"""Self-repair: what later layers, and the routers, make good when a part of a layer is removed.

Direct effect of a write z on the target: its centred logit through the frozen final norm,
``(W_U[target] - mean W_U) . (gain * z) / rms``. Total effect: change of the target's centred logit through the same
frozen norm when z is removed; the difference is what later layers compensate. With routes replayed only the layers
compensate, with routes free also the routers (McGrath et al. 2023, the Hydra effect; Rushing and Nanda 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from micro import interventions as iv
from micro.analysis.circuits.patching import same_routes
from micro.analysis.circuits.prompts import Text, one_token, token_ids
from micro.analysis.modes import evaluating
from micro.analysis.result import Result, plain
from micro.analysis.statistics import mean_interval
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM

Part = Literal["attention", "ffn"]


@dataclass
class RepairResult(Result):
    """Per part and layer, mean over prompts: effects on the target's centred logit when the part is removed.

    ``direct`` is what the removal takes away itself, ``total`` what is missing in the end (routes replayed, routes
    free), ``logit`` what of the latter the logit loses through the model's own final norm; [layers] each, by part, the
    layers in the order of ``settings["layers"]``.
    """

    name: ClassVar[str] = "self_repair"

    prompts: int
    direct: dict[str, list[float]]
    total_replayed: dict[str, list[float]]
    total_free: dict[str, list[float]]
    logit_replayed: dict[str, list[float]]
    logit_free: dict[str, list[float]]
    compensation: dict[str, list[list[float]]]  # [removed layer][later layer], routes replayed
    # [layer][direct, total replayed, total free][low, high]; null of a single prompt
    interval: dict[str, list[list[list[float | None]]]]
    settings: dict[str, Any] = field(default_factory=dict)

    def repaired(self, part: str) -> tuple[list[float], list[float]]:
        """Share that is made good, 1 - total / direct, routes replayed and free.

        NaN where the direct effect is under a tenth of the part's largest: a ratio to noise says nothing.
        """
        direct = np.asarray(self.direct[part])
        least = max(1e-9, 0.1 * float(np.abs(direct).max()))
        shares = []
        for total in (self.total_replayed[part], self.total_free[part]):
            with np.errstate(divide="ignore", invalid="ignore"):
                shares.append(np.where(np.abs(direct) >= least, 1 - np.asarray(total) / direct, np.nan).tolist())
        return shares[0], shares[1]

    def table(self) -> pd.DataFrame:
        """One row per part and layer: effects, the interval of the direct one, and the shares that are made good."""
        import pandas as pd

        rows = []
        for part, direct in self.direct.items():
            replayed, free = self.repaired(part)
            for i, layer in enumerate(self.settings["layers"]):
                rows.append(
                    {
                        "part": part,
                        "layer": layer,
                        "direct": direct[i],
                        "direct_low": self.interval[part][i][0][0],
                        "direct_high": self.interval[part][i][0][1],
                        "total_replayed": self.total_replayed[part][i],
                        "total_free": self.total_free[part][i],
                        "repaired_by_layers": replayed[i],
                        "repaired_with_routing": free[i],
                    }
                )
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        from micro.analysis.circuits.figures import repair_figure

        return repair_figure(self)


def self_repair(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    prompts: Sequence[tuple[Text, Text]],
    *,
    parts: Sequence[Part] = ("attention", "ffn"),
    layers: Sequence[int] | None = None,
    progress: bool = False,
) -> RepairResult:
    """Remove what attention or the FFN of a layer writes at the predicting slot, and see what later layers do.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: of the model; None if the prompts hold token ids.
        prompts: (prompt, next token) pairs.
        parts: what is removed.
        layers: of which layers; all if not given.
        progress: show a bar on stderr.

    Returns:
        A :class:`RepairResult`.

    Raises:
        ValueError: no prompt, or an unknown part.

    Source: McGrath et al. (2023); Rushing and Nanda (2024); routes replayed or free: model.md 9.3.
    """
    if not prompts:
        raise ValueError("self_repair: prompts is empty")
    if unknown := sorted(set(parts) - {"attention", "ffn"}):
        raise ValueError(f'self_repair: parts holds {unknown}, expected "attention" and "ffn"')
    if model.config.backbone == "olmo2" and not model.config.is_block:
        raise ValueError(
            "self_repair: OLMo-2 with FFN experts norms the mixture, so that an expert's write is not a sum"
        )
    wanted = list(range(model.config.num_hidden_layers) if layers is None else layers)
    found: dict[str, np.ndarray[Any, Any]] = {}
    intervals: dict[str, Any] = {}
    with evaluating(model):
        runs = [_PromptRun(model, token_ids(p, tokenizer), one_token(t, tokenizer)) for p, t in prompts]
        for part in parts:
            work = track(runs, f"self-repair, {part}", unit="prompts", enabled=progress)
            several = np.stack([run.remove(part, wanted) for run in work])
            found[part] = several.mean(0)
            intervals[part] = plain(np.stack(mean_interval(several[:, :, :3]), -1))
    return RepairResult(
        prompts=len(prompts),
        direct={part: values[:, 0].tolist() for part, values in found.items()},
        total_replayed={part: values[:, 1].tolist() for part, values in found.items()},
        total_free={part: values[:, 2].tolist() for part, values in found.items()},
        logit_replayed={part: values[:, 3].tolist() for part, values in found.items()},
        logit_free={part: values[:, 4].tolist() for part, values in found.items()},
        compensation={part: values[:, 5:].tolist() for part, values in found.items()},
        interval=intervals,
        settings={
            "interval": "95 % bootstrap over prompts",
            "layers": wanted,
            "slot": "the last of each prompt",
            "removal": "zero",
            "parts": list(parts),
        },
    )


class _PromptRun:
    """One prompt: its intact run, and runs with a write removed."""

    def __init__(self, model: MiCRoForCausalLM, ids: list[int], target: int) -> None:
        self.model, self.last = model, len(ids) - 1
        self.ids = torch.tensor(ids, device=model.device)[None]
        unembedding = model.lm_head.weight.detach().double()
        self.direction = unembedding[target] - unembedding.mean(0)
        with model.intervene(iv.read("router")) as run:
            routing = model.model(self.ids, use_cache=False, output_routing=True).routing
        self.scores = run.reading("router")
        self.ids_of = routing.ids[:, 0, self.last]  # [L,K]
        self.weights = routing.weights[:, 0, self.last].double()
        self.residual, self.logit = self._run([], 1, replayed=True)
        final = self.residual[-1, 0]
        eps = float(model.config.rms_norm_eps or 0)
        gain = model.model.norm.weight.detach().double()
        self.read_out = self.direction * gain / (final.square().mean() + eps).sqrt()

    def remove(self, part: Part, layers: list[int]) -> np.ndarray[Any, Any]:
        """[len(layers), 5 + L]: direct, total (replayed, free), logits (replayed, free), compensation per layer."""
        actions = iv.side_by_side([[iv.zero(part, layers=layer, positions=[self.last])] for layer in layers])
        replayed, logit_replayed = self._run(actions, len(layers), replayed=True)
        free, logit_free = self._run(actions, len(layers), replayed=False)
        direct = self._direct(part, layers)
        intact = self.residual[-1, 0] @ self.read_out
        lost = [(intact - run[-1] @ self.read_out).cpu() for run in (replayed, free)]
        writes = (replayed[1:] - replayed[:-1]) @ self.read_out  # [L, rows]
        own = ((self.residual[1:] - self.residual[:-1]) @ self.read_out)[:, :1]
        change = (writes - own).cpu()
        for row, layer in enumerate(layers):
            change[: layer + 1, row] = 0  # of the layer itself: the rest of it may answer within the layer
            change[layer, row] = (writes[layer, row] - own[layer, 0]).cpu() + direct[row]
        columns = [direct, *lost, (self.logit - logit_replayed).cpu(), (self.logit - logit_free).cpu()]
        return torch.cat([torch.stack(columns, 1), change.T], 1).numpy()

    def _direct(self, part: Part, layers: list[int]) -> Tensor:
        """What the removed writes themselves give, [rows]."""
        look = iv.read(part, positions=[self.last], name="write")
        with self.model.intervene(look) as run:
            self.model.model(self.ids, use_cache=False)
        seen = run.reading("write")
        effects = []
        for layer in layers:
            mine = seen.at(layer)
            share = torch.ones(len(mine), dtype=torch.float64, device=self.weights.device)
            if mine.expert.numel() and int(mine.expert[0]) >= 0:
                order = [self.ids_of[layer].tolist().index(e) for e in mine.expert.tolist()]
                share = self.weights[layer, order]
            effects.append((share[:, None] * mine.values.double()).sum(0) @ self.read_out)
        return torch.stack(effects).cpu()

    def _run(self, actions: list[iv.Action], rows: int, *, replayed: bool) -> tuple[Tensor, Tensor]:
        """Residual stream at the last slot, float64 [L+1, rows, H]; centred logit of the target [rows]."""
        look = iv.read("residual", positions=[self.last], name="residual")
        routes = same_routes(self.scores, rows) if replayed else []
        with self.model.intervene(*routes, *actions, look) as run:
            out = self.model.model(self.ids.expand(rows, -1), use_cache=False)
        stream = run.reading("residual").values.double()
        return stream.unflatten(0, (-1, rows)), out.last_hidden_state[:, -1].double() @ self.direction
