"""Causal head gating, per expert and head: which heads a task needs, which stand in its way.

Gates G in [0, 1] multiply every head's output before the output matrix; weights are frozen. Minimised is
``-mean log p(answer; G) - lambda * mean clip(logit G)``: first with lambda = 0, then from there with lambda > 0, which
opens every gate that does no harm (G+), and with lambda < 0, which closes every gate that is not needed (G-).

facilitating = G-, interfering = 1 - G+, irrelevant = G+ (1 - G-)        (causal head gating, Nam et al. 2025)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from micro import interventions as iv
from micro.analysis.batches import IGNORED, batches, encoded, shifted
from micro.analysis.modes import evaluating
from micro.analysis.result import Result
from micro.interventions.points import axis
from micro.modeling.losses import language_loss
from micro.progress import Progress

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM

CLASSES = ("facilitating", "interfering", "irrelevant")
_CLIP = 4.0  # sigmoid(4) = 0.982: beyond it a gate counts as open or closed, and lambda stops pushing


@dataclass
class GatingResult(Result):
    """Gates of every fit, [seeds][L][E'][A], and the losses that they reach.

    ``open_gates`` is G+, ``closed_gates`` G-, ``task_gates`` the fit without lambda. ``check``: loss (nats per token)
    with the ``removed`` most facilitating heads zeroed, and with as many irrelevant ones, per seed.
    """

    name: ClassVar[str] = "gating"

    experts: list[str]
    task_gates: list[list[list[list[float]]]]
    open_gates: list[list[list[list[float]]]]
    closed_gates: list[list[list[list[float]]]]
    loss: dict[str, list[float]]  # "intact", "task", "open", "closed"
    check: dict[str, list[float]]  # "facilitating", "irrelevant"
    removed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def scores(self) -> dict[str, np.ndarray[Any, Any]]:
        """Mean over seeds of the three scores, [L,E',A] each."""
        plus, minus = np.asarray(self.open_gates), np.asarray(self.closed_gates)
        return {
            "facilitating": minus.mean(0),
            "interfering": (1 - plus).mean(0),
            "irrelevant": (plus * (1 - minus)).mean(0),
        }

    def labels(self) -> np.ndarray[Any, Any]:
        """The class with the highest score, index into :data:`CLASSES`, [L,E',A]."""
        result: np.ndarray[Any, Any] = np.stack([self.scores()[name] for name in CLASSES]).argmax(0)
        return result

    def table(self) -> pd.DataFrame:
        """One row per head: scores, their spread over seeds, the label."""
        import pandas as pd

        scores, labels = self.scores(), self.labels()
        spread = np.asarray(self.closed_gates).std(0)
        rows = []
        for layer, expert, head in np.ndindex(labels.shape):
            at = (layer, expert, head)
            owner = self.experts[expert] if labels.shape[1] > 1 else "shared"
            row = {"layer": layer, "expert": owner, "head": head, **{name: scores[name][at] for name in CLASSES}}
            rows.append({**row, "spread": spread[at], "label": CLASSES[labels[at]]})
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        from micro.analysis.circuits.figures import gating_figure

        return gating_figure(self)

    def __str__(self) -> str:
        frame = self.table()
        counts = frame.groupby(["expert", "label"], sort=False).size().unstack(fill_value=0)
        losses = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in self.loss.items())
        harm = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in self.check.items())
        return f"{counts.to_string()}\nloss: {losses}\nloss with {self.removed} heads removed: {harm}"


def head_gating(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    records: Sequence[Record],
    *,
    strength: float = 0.1,
    steps: int = 100,
    learning_rate: float = 0.2,
    seeds: Sequence[int] = (0, 1, 2),
    removed: int | None = None,
    held_out: Sequence[Record] | None = None,
    controls: dict[str, Any] | None = None,
    encode_options: dict[str, Any] | None = None,
    max_tokens: int = 2048,
    progress: bool = False,
) -> GatingResult:
    """Fit the gates of all heads of all experts to the answers of a task.

    Args:
        model: a MiCRo model of either kind; its weights are not touched.
        tokenizer: of the model.
        records: the task; answer tokens count.
        strength: absolute value of lambda.
        steps: optimizer steps (Adam) of each of the three fits.
        learning_rate: of the gates' logits.
        seeds: each draws the gates' start and the order of batches.
        removed: size of the check: so many heads zeroed; an eighth of all if not given.
        held_out: records of the check; those of the fit if not given, which flatters it.
        controls: steering arguments of the forward passes.
        encode_options: passed to :func:`micro.data.encode`.
        max_tokens: slots per batch.
        progress: show a bar on stderr.

    Returns:
        A :class:`GatingResult`.

    Raises:
        ValueError: no record could be encoded, or ``strength`` is not positive.

    Source: causal head gating, Nam et al. (2025), extended from heads to expert x head.
    """
    if strength <= 0:
        raise ValueError(f"strength is {strength}, expected a positive number; its sign is set by the fit")

    def task_of(given: Sequence[Record]) -> _Task:
        rows = encoded(given, tokenizer, **(encode_options or {}))
        if not rows:
            raise ValueError(f"head_gating: none of the {len(given)} records could be encoded")
        return _Task(model, [batch for _, batch in batches(rows, tokenizer, max_tokens=max_tokens)], controls or {})

    task = task_of(records)
    check = task if held_out is None else task_of(held_out)
    heads = task.shape[0] * task.shape[1] * task.shape[2]
    size = removed or max(1, heads // 8)
    if 2 * size > heads:
        raise ValueError(f"removed is {size}, expected at most half of the {heads} heads")
    fits: dict[str, list[Tensor]] = {"task": [], "open": [], "closed": []}
    with (
        evaluating(model),
        torch.enable_grad(),
        Progress("head gating", total=3 * steps * len(seeds), unit="steps", enabled=progress) as bar,
    ):
        for seed in seeds:
            start = task.fit(None, 0.0, steps, learning_rate, seed, bar)
            fits["task"].append(start)
            fits["open"].append(task.fit(start, strength, steps, learning_rate, seed, bar))
            fits["closed"].append(task.fit(start, -strength, steps, learning_rate, seed, bar))
    gates = {name: [logits.sigmoid() for logits in several] for name, several in fits.items()}
    result = GatingResult(
        experts=list(model.config.expert_names or ()),
        task_gates=[g.tolist() for g in gates["task"]],
        open_gates=[g.tolist() for g in gates["open"]],
        closed_gates=[g.tolist() for g in gates["closed"]],
        loss={
            "intact": [task.loss(torch.ones(task.shape))],
            **{name: [task.loss(g) for g in several] for name, several in gates.items()},
        },
        check={},
        removed=size,
        settings={"strength": strength, "steps": steps, "learning_rate": learning_rate, "seeds": list(seeds)},
    )
    result.settings["check"] = "the fitted records" if held_out is None else f"{len(held_out)} held-out records"
    result.check = _check(check, result, size)
    return result


def _check(task: _Task, result: GatingResult, size: int) -> dict[str, list[float]]:
    """Loss with the heads of the highest score zeroed, seed by seed."""
    losses: dict[str, list[float]] = {"facilitating": [], "irrelevant": []}
    for plus, minus in zip(result.open_gates, result.closed_gates, strict=True):
        high, low = torch.tensor(plus), torch.tensor(minus)
        for name, score in (("facilitating", low), ("irrelevant", high * (1 - low))):
            keep = torch.ones(score.numel())
            keep[score.flatten().topk(size).indices] = 0
            losses[name].append(task.loss(keep.view(score.shape)))
    return losses


class _Task:
    """Loss of a task's answers under gates [L,E',A]."""

    def __init__(self, model: MiCRoForCausalLM, work: list[dict[str, Tensor]], controls: dict[str, Any]) -> None:
        config = model.config
        self.model, self.work, self.controls = model, work, controls
        self.shape = (config.num_hidden_layers, axis(config, "heads"), config.num_attention_heads)

    def fit(self, start: Tensor | None, strength: float, steps: int, rate: float, seed: int, bar: Progress) -> Tensor:
        """Logits of the gates, float32 [L,E',A]."""
        generator = torch.Generator().manual_seed(seed)
        # Open at the start, so that the model is near what it was; the draw parts the seeds.
        logits = 1 + 0.3 * torch.randn(self.shape, generator=generator) if start is None else start.clone()
        logits.requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=rate)
        order = torch.randperm(len(self.work), generator=generator).tolist()
        for step in range(steps):
            optimizer.zero_grad()
            loss = self._batch_loss(self.work[order[step % len(order)]], logits.sigmoid())
            loss = loss - strength * logits.clamp(-_CLIP, _CLIP).mean()
            (logits.grad,) = torch.autograd.grad(loss, [logits])
            optimizer.step()
            bar.advance(note=f"loss {loss.item():.3f}")
        return logits.detach()

    def loss(self, gates: Tensor) -> float:
        """Mean loss per answer token over all batches, in nats."""
        counts = [int((shifted(batch["labels"]) != IGNORED).sum()) for batch in self.work]
        with evaluating(self.model):
            losses = [float(self._batch_loss(batch, gates)) for batch in self.work]
        return sum(c * v for c, v in zip(counts, losses, strict=True)) / sum(counts)

    def _batch_loss(self, batch: dict[str, Tensor], gates: Tensor) -> Tensor:
        """The language loss alone: auxiliary losses of the config are none of the heads' business."""
        given = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with self.model.intervene(iv.scale("heads", gates.to(self.model.device)[..., None])):
            hidden = self.model.model(**given, use_cache=False, **self.controls).last_hidden_state
        return language_loss(hidden, self.model.lm_head, batch["labels"].to(self.model.device))
