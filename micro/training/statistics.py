"""What the experts did during one optimizer step: load, entropies, label accuracy (model.md 7.4, 7.5).

Sums stay on the device while micro batches come in; they are read once, at the end of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from micro.modeling import RoutingTrace


@dataclass(frozen=True)
class RoutingSummary:
    """One step's routing over all real tokens.

    load: share of the routed pairs per layer and expert [L][E], rows sum to 1. decision_entropy: mean over tokens and
    layers of the router's entropy; usage_entropy: entropy of a layer's mean distribution, mean over layers; both in
    nats. label_accuracy: share of answer tokens whose first choice is their label, mean over layers; None when labels
    route or none are there. label_accuracy_by_layer: the same per layer.
    """

    load: list[list[float]]
    decision_entropy: float
    usage_entropy: float
    label_accuracy: float | None
    label_accuracy_by_layer: list[float] | None

    @property
    def mean_load(self) -> list[float]:
        """Share per expert, mean over layers."""
        return [sum(column) / len(self.load) for column in zip(*self.load, strict=True)]


class RoutingStatistics:
    """Sums over the micro batches of one optimizer step."""

    def __init__(self, layers: int, experts: int, language: int) -> None:
        """language: the expert that a routing label of -1 stands for."""
        self.layers, self.experts, self.language = layers, experts, language
        self.reset()

    def reset(self) -> None:
        """Forget everything added so far."""
        self._pairs: Tensor | None = None  # [L,E] routed pairs
        self._mean: Tensor | None = None  # [L,E] sum of probabilities
        self._entropy: Tensor | None = None  # [L] sum of entropies
        self._right: Tensor | None = None  # [L] answer tokens whose first choice is their label
        self._tokens: Tensor | None = None  # real tokens
        self._answers: Tensor | None = None  # answer tokens that could be right

    @torch.no_grad()
    def add_labels(self, routing_labels: Tensor, mask: Tensor) -> None:
        """Add one micro batch that labels routed, int64 [B,S] with mask [B,S]: the same load in all layers."""
        chosen = F.one_hot(self._resolved(routing_labels), self.experts).float()
        counts = (chosen * mask.reshape(-1, 1)).sum(0).expand(self.layers, -1)
        self._pairs = _sum(self._pairs, counts)
        self._mean = _sum(self._mean, counts)
        self._entropy = _sum(self._entropy, torch.zeros(self.layers, device=mask.device))
        self._tokens = _sum(self._tokens, mask.sum())

    @torch.no_grad()
    def add(self, trace: RoutingTrace, labels: Tensor | None, routing_labels: Tensor | None) -> None:
        """Add one micro batch that the router (or given rows) routed; labels [B,S] with -100 outside the answer;
        routing_labels int64 [B,S].
        """
        probs = trace.probs
        layers, experts = probs.shape[0], probs.shape[-1]
        mask = trace.mask.reshape(-1).to(probs.dtype)
        probs = probs.reshape(layers, -1, experts)
        ids = trace.ids.reshape(layers, -1, trace.ids.shape[-1]).long()
        used = (trace.weights.reshape(ids.shape) > 0).to(probs.dtype) * mask[None, :, None]
        # Not bincount: it reads the largest id on the host.
        self._pairs = _sum(self._pairs, torch.einsum("ltke,ltk->le", F.one_hot(ids, experts).to(used.dtype), used))
        self._mean = _sum(self._mean, torch.einsum("lte,t->le", probs, mask))
        self._entropy = _sum(self._entropy, (torch.special.entr(probs).sum(-1) * mask).sum(-1))
        self._tokens = _sum(self._tokens, mask.sum())
        if labels is None or routing_labels is None:
            return
        answer = (labels.reshape(-1) != -100).to(probs.dtype) * mask
        self._right = _sum(self._right, ((ids[..., 0] == self._resolved(routing_labels)) * answer).sum(-1))
        self._answers = _sum(self._answers, answer.sum())

    def _resolved(self, routing_labels: Tensor) -> Tensor:
        """Labels [B,S] as expert ids [B*S]; -1 is language."""
        flat = routing_labels.reshape(-1).long()
        return torch.where(flat < 0, self.language, flat)

    def summary(self) -> RoutingSummary | None:
        """The step's numbers; None when nothing was added."""
        if self._pairs is None or self._mean is None or self._entropy is None or self._tokens is None:
            return None
        tokens = self._tokens.clamp(min=1)
        load = self._pairs / self._pairs.sum(-1, keepdim=True).clamp(min=1)
        by_layer = None
        if self._right is not None and self._answers is not None and float(self._answers) > 0:
            by_layer = (self._right / self._answers).tolist()
        return RoutingSummary(
            load=load.tolist(),
            decision_entropy=float((self._entropy / tokens).mean()),
            usage_entropy=float(torch.special.entr(self._mean / tokens).sum(-1).mean()),
            label_accuracy=None if by_layer is None else sum(by_layer) / len(by_layer),
            label_accuracy_by_layer=by_layer,
        )


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part
