"""Who is routed where: usage, entropies, and agreement with labels where the data carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from micro.analysis.batches import IGNORED, batches, encoded, shifted
from micro.analysis.counting import counted_layers, entropy
from micro.analysis.result import Result
from micro.analysis.statistics import Array, bootstrap, ratio
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM


@dataclass
class RoutingReport(Result):
    """Routing of one model on one set of texts.

    ``usage`` is the mean over samples of the share of tokens whose first choice is the expert, over the counted layers;
    ``accuracy`` is the share of answer tokens routed to the expert of their label, balanced over labels and averaged
    over all layers; intervals are 95 % bootstrap intervals over records.
    """

    name: ClassVar[str] = "routing"

    experts: list[str]
    samples: int
    tokens: int
    layers_counted: list[int]
    usage: list[float]
    usage_interval: list[list[float]]
    usage_by_layer: list[list[float]]
    decision_entropy: list[float]
    usage_entropy: list[float]
    labelled_tokens: list[int] | None = None
    confusion: list[list[list[float]]] | None = None
    accuracy: float | None = None
    accuracy_interval: list[float] | None = None
    accuracy_by_layer: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def best_layer(self) -> int | None:
        """The layer with the highest accuracy."""
        return None if self.accuracy_by_layer is None else int(np.argmax(self.accuracy_by_layer))

    @property
    def mutual_information(self) -> list[float]:
        """Usage entropy minus decision entropy per layer, in nats; 0 for a router that ignores its input."""
        return [u - d for u, d in zip(self.usage_entropy, self.decision_entropy, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RoutingReport:
        return cls(**content)

    def table(self) -> pd.DataFrame:
        import pandas as pd

        rows: dict[str, list[Any]] = {
            "expert": self.experts,
            "usage": self.usage,
            "low": [low for low, _ in self.usage_interval],
            "high": [high for _, high in self.usage_interval],
        }
        if self.confusion is not None:
            mean = np.mean(self.confusion, axis=0)
            for e, expert in enumerate(self.experts):
                rows[f"routed to {expert}"] = [float(mean[label, e]) for label in range(len(self.experts))]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        from micro.analysis.figures import routing_figure

        return routing_figure(self)

    def __str__(self) -> str:
        lines = [super().__str__(), f"{self.samples} samples, {self.tokens} tokens"]
        if self.accuracy is not None and self.accuracy_interval is not None and self.accuracy_by_layer is not None:
            low, high = self.accuracy_interval
            best = self.best_layer
            lines.append(
                f"routing accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}], "
                f"best layer {best} with {max(self.accuracy_by_layer):.3f}"
            )
        return "\n".join(lines)


@dataclass
class _Counts:
    """Per record: usage [R,L,E], sum of entropies [R,L], sum of probabilities [R,L,E], confusion [R,L,label,E]."""

    usage: Array
    entropies: Array
    mass: Array
    confusion: Array

    @classmethod
    def zeros(cls, records: int, layers: int, experts: int) -> _Counts:
        return cls(
            np.zeros((records, layers, experts)),
            np.zeros((records, layers)),
            np.zeros((records, layers, experts)),
            np.zeros((records, layers, experts, experts)),
        )

    def add(self, records: Sequence[int], trace: Any, predicting: Tensor, answer: Tensor, labels: Tensor) -> None:
        """predicting, answer: bool [B,S]; labels: int64 [B,S]."""
        experts = self.usage.shape[-1]
        probs = trace.probs.double().cpu()
        chosen = torch.nn.functional.one_hot(probs.argmax(-1), experts).double()  # [L,B,S,E]
        expected = torch.nn.functional.one_hot(labels.clamp(min=0), experts).double()
        m = predicting.double()
        usage = torch.einsum("lbse,bs->ble", chosen, m)
        h = -torch.special.xlogy(probs, probs).sum(-1)
        self.usage[records] += usage.numpy()
        self.entropies[records] += torch.einsum("lbs,bs->bl", h, m).numpy()
        self.mass[records] += torch.einsum("lbse,bs->ble", probs, m).numpy()
        self.confusion[records] += torch.einsum("lbse,bsk,bs->blke", chosen, expected, answer.double()).numpy()


@torch.no_grad()
def routing(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    data: Sequence[str] | Sequence[Record],
    *,
    controls: dict[str, Any] | None = None,
    encode_options: dict[str, Any] | None = None,
    max_tokens: int = 2048,
    seed: int = 0,
    progress: bool = False,
) -> RoutingReport:
    """Teacher-forced routing of texts or labelled records.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer.
        data: plain texts (no chat template) or records; with records, answer tokens count and labels are compared.
        controls: steering arguments of the forward passes.
        encode_options: passed to :func:`micro.data.encode`.
        max_tokens: slots per batch.
        seed: of the bootstrap.
        progress: show a bar on stderr.

    Returns:
        A :class:`RoutingReport`.

    Raises:
        ValueError: no data, or nothing left after encoding.

    Source: MiCRo, routing analyses; intervals by bootstrap over records.
    """
    if not data:
        raise ValueError("analysis.routing: data is empty; give texts or records")
    rows, labelled = _rows(data, tokenizer, encode_options or {})
    experts = model.config.num_experts
    counts = _Counts.zeros(len(data), model.config.num_hidden_layers, experts)
    work = list(batches(rows, tokenizer, max_tokens=max_tokens))
    was_training = model.training
    model.train(False)
    try:
        for records, batch in track(work, "routing", unit="batches", enabled=progress):
            trace = model.model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                use_cache=False,
                output_routing=True,
                **(controls or {}),
            ).routing
            predicting = shifted(batch["labels"]) != IGNORED
            answer = (batch["labels"] != IGNORED) & labelled
            labels = batch["routing_labels"] if "routing_labels" in batch else torch.zeros_like(batch["input_ids"])
            counts.add(records, trace, predicting, answer, labels)
    finally:
        model.train(was_training)
    return _summary(counts, list(model.config.expert_names or ()), labelled=labelled, seed=seed)


def _rows(data: Sequence[Any], tokenizer: Any, options: dict[str, Any]) -> tuple[list[Any], bool]:
    if not isinstance(data[0], str):
        rows = encoded(data, tokenizer, **options)
        if not rows:
            raise ValueError(f"analysis.routing: none of the {len(data)} records could be encoded")
        return rows, True
    out = []
    for i, text in enumerate(data):
        ids = tokenizer(text)["input_ids"]
        if len(ids) > 1:
            out.append((i, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}))
    if not out:
        raise ValueError("analysis.routing: every text has fewer than two tokens")
    return out, False


def _balanced(confusion: Array) -> Array:
    """[..., label, E] counts -> share on the diagonal, averaged over labels that occur."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore"):
        result: Array = np.nanmean(ratio(hits, confusion.sum(-1)), axis=-1)
    return result


def _summary(counts: _Counts, experts: list[str], *, labelled: bool, seed: int) -> RoutingReport:
    layers = counts.usage.shape[1]
    kept = counted_layers(layers)
    counted = counts.usage[:, kept].sum(1)
    present = counted.sum(-1) > 0
    per_sample = ratio(counted[present], counted[present].sum(-1, keepdims=True))
    low, high = bootstrap(len(per_sample), lambda w: (w @ per_sample) / w.sum(), seed=seed)
    totals = np.maximum(counts.usage.sum((0, 2)), 1)
    mean_probability = counts.mass.sum(0) / totals[:, None]
    report = RoutingReport(
        experts=experts,
        samples=int(present.sum()),
        tokens=int(counts.usage[:, 0].sum()),
        layers_counted=kept,
        usage=per_sample.mean(0).tolist(),
        usage_interval=np.stack([low, high], -1).tolist(),
        usage_by_layer=(counts.usage.sum(0) / totals[:, None]).tolist(),
        decision_entropy=(counts.entropies.sum(0) / totals).tolist(),
        usage_entropy=entropy(mean_probability).tolist(),
        settings={"positions": "those that predict an answer token", "bootstrap_draws": 2000, "seed": seed},
    )
    if labelled:
        _add_accuracy(report, counts.confusion, seed)
    return report


def _add_accuracy(report: RoutingReport, confusion: Array, seed: int) -> None:
    total = confusion.sum(0)  # [L,label,E]
    flat = confusion.reshape(len(confusion), -1)
    low, high = bootstrap(
        len(confusion), lambda w: np.asarray(_balanced((w @ flat).reshape(total.shape)).mean()), seed=seed
    )
    by_layer = _balanced(total)
    report.labelled_tokens = total[0].sum(-1).astype(int).tolist()
    report.confusion = np.nan_to_num(ratio(total, total.sum(-1, keepdims=True))).tolist()
    report.accuracy = float(by_layer.mean())
    report.accuracy_interval = [float(low), float(high)]
    report.accuracy_by_layer = by_layer.tolist()
