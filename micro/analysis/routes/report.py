"""Who is routed where: usage, entropies, flow through the layers, and agreement with labels where there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from micro.analysis.result import Result
from micro.analysis.routes.counting import counted_layers
from micro.analysis.routes.passes import (
    MAX_SAMPLES,
    SAMPLE_SEED,
    Positions,
    SampleCounts,
    drawn_samples,
    experts_per_token,
    labels_of,
    traces,
)
from micro.analysis.routes.summary import accuracy_numbers, groups_of, usage_numbers
from micro.experts import LABELS
from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM

DRAWS = 2000


@dataclass
class RoutingReport(Result):
    """Routing of one model on one set of samples. L layers, E experts; shares lie in 0..1, entropies are in nats.

    ``usage`` [E]: mean over samples of the share of counted slots whose first choice is the expert, over the counted
    layers (all but the first two and the last two, where there are more than four); with K != 1 the mean probability.
    ``usage_by_layer`` [L][E]: the same for every layer. ``decision_entropy`` [L]: mean of -sum p log p over slots;
    ``usage_entropy`` [L]: entropy of the mean p; their difference is the mutual information of token and expert.
    ``load_share`` [L][E]: share of all choices (K per slot), slots pooled; ``load_variation`` [L]: its coefficient of
    variation over experts. ``transitions`` [L-1][E][E]: share of slots with first choice e in a layer and f in
    the next; ``together`` [L][L]: share of slots with the same first choice in both layers, ``together_chance``: what
    the usage of both layers gives by chance. ``by_group``, ``by_label``: usage for groups of samples, and for answer
    tokens of each label.
    ``accuracy``: share of answer tokens routed to the expert of their label, balanced over labels, mean over all
    layers; ``relabelling_p``: its rank among all assignments of experts to labels. Intervals [low, high] are 95 %
    bootstrap intervals over samples.
    """

    name: ClassVar[str] = "routing"
    apart: ClassVar[tuple[str, ...]] = ("counts",)

    experts: list[str]
    samples: int
    tokens: int
    layers_counted: list[int]
    usage: list[float]
    usage_interval: list[list[float]]
    usage_by_layer: list[list[float]]
    usage_by_layer_interval: list[list[list[float]]]
    decision_entropy: list[float]
    decision_entropy_interval: list[list[float]]
    usage_entropy: list[float]
    usage_entropy_interval: list[list[float]]
    mutual_information_interval: list[list[float]]
    load_share: list[list[float]]
    load_variation: list[float]
    load_variation_interval: list[list[float]]
    transitions: list[list[list[float]]]
    together: list[list[float]]
    together_chance: list[list[float]]
    by_group: list[dict[str, Any]] = field(default_factory=list)
    by_label: list[dict[str, Any]] = field(default_factory=list)
    labelled_tokens: list[int] | None = None
    confusion: list[list[list[float]]] | None = None
    accuracy: float | None = None
    accuracy_interval: list[float] | None = None
    accuracy_by_layer: list[float] | None = None
    accuracy_by_layer_interval: list[list[float]] | None = None
    relabelling_p: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    counts: SampleCounts | None = field(default=None, compare=False, repr=False)

    @property
    def best_layer(self) -> int | None:
        """The layer with the highest accuracy."""
        return None if self.accuracy_by_layer is None else int(np.argmax(self.accuracy_by_layer))

    @property
    def mutual_information(self) -> list[float]:
        """Usage entropy minus decision entropy per layer, in nats; 0 for a router that ignores its input."""
        return [u - d for u, d in zip(self.usage_entropy, self.decision_entropy, strict=True)]

    @property
    def utilisation(self) -> list[list[float]]:
        """Load over fair share, [L][E]: 1 is fair, 0 is dead."""
        ratios: list[list[float]] = (np.asarray(self.load_share) * len(self.experts)).tolist()
        return ratios

    @property
    def dead_cells(self) -> list[tuple[int, str]]:
        """(layer, expert) that no slot chose."""
        return [(int(l), self.experts[e]) for l, e in np.argwhere(np.asarray(self.load_share) == 0)]

    def save(self, folder: str | Path) -> None:
        """``routing.json`` and ``.csv``, ``routing_layers.csv``, ``routing_groups.csv`` where there are groups or
        labels, and the counts per sample as ``routing.npz``.
        """
        super().save(folder)
        write_text(Path(folder) / "routing_layers.csv", self.layer_table().to_csv(index=False))
        if self.by_group or self.by_label:
            write_text(Path(folder) / "routing_groups.csv", self.group_table().to_csv(index=False))
        if self.counts is not None:
            self.counts.save(Path(folder) / "routing.npz")

    def table(self) -> pd.DataFrame:
        """One line per expert: usage, its interval, utilisation over the counted layers, routes of each label."""
        import pandas as pd

        rows: dict[str, list[Any]] = {
            "expert": self.experts,
            "usage": self.usage,
            "low": [low for low, _ in self.usage_interval],
            "high": [high for _, high in self.usage_interval],
            "utilisation": np.asarray(self.utilisation)[self.layers_counted].mean(0).tolist(),
        }
        if self.confusion is not None:
            mean = np.mean(self.confusion, axis=0)
            for e, expert in enumerate(self.experts):
                rows[f"routed to {expert}"] = [float(mean[label, e]) for label in range(len(self.experts))]
        return pd.DataFrame(rows)

    def layer_table(self) -> pd.DataFrame:
        """One line per layer: usage and utilisation of each expert, entropies, load variation, dead experts."""
        import pandas as pd

        layers = len(self.usage_by_layer)
        columns: dict[str, Any] = {
            "layer": list(range(layers)),
            "counted": [l in self.layers_counted for l in range(layers)],
        }
        for e, expert in enumerate(self.experts):
            columns[f"usage {expert}"] = [row[e] for row in self.usage_by_layer]
            columns[f"usage {expert} low"] = [row[e][0] for row in self.usage_by_layer_interval]
            columns[f"usage {expert} high"] = [row[e][1] for row in self.usage_by_layer_interval]
            columns[f"utilisation {expert}"] = [row[e] for row in self.utilisation]
        columns["decision_entropy"] = self.decision_entropy
        columns["usage_entropy"] = self.usage_entropy
        columns["mutual_information"] = self.mutual_information
        columns["decision_entropy_of_log_E"] = (
            np.asarray(self.decision_entropy) / np.log(max(len(self.experts), 2))
        ).tolist()
        columns["load_variation"] = self.load_variation
        dead = self.dead_cells
        columns["dead_experts"] = [sum(l == layer for l, _ in dead) for layer in range(layers)]
        if self.accuracy_by_layer is not None:
            columns["accuracy"] = self.accuracy_by_layer
        return pd.DataFrame(columns)

    def group_table(self) -> pd.DataFrame:
        """One line per group (or label) and expert: usage with interval, beside chance."""
        import pandas as pd

        lines = [
            {
                "by": by,
                "group": group["name"],
                "samples": group["samples"],
                "tokens": group["tokens"],
                "expert": expert,
                "usage": group["usage"][e],
                "low": group["interval"][e][0],
                "high": group["interval"][e][1],
                "chance": 1 / len(self.experts),
            }
            for by, groups in (("group", self.by_group), ("label", self.by_label))
            for group in groups
            for e, expert in enumerate(self.experts)
        ]
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        from micro.analysis.figures import routing_figure

        return routing_figure(self)

    def __str__(self) -> str:
        shown = f"layers {_ranges(self.layers_counted)} of {len(self.usage_by_layer)}"
        lines = [super().__str__(), f"{self.samples} samples, {self.tokens} tokens, usage over {shown}"]
        if self.dead_cells:
            lines.append(f"dead cells (layer, expert): {len(self.dead_cells)} of {np.size(self.load_share)}")
        if self.accuracy is not None and self.accuracy_interval is not None and self.accuracy_by_layer is not None:
            low, high = self.accuracy_interval
            lines.append(
                f"routing accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}], "
                f"best layer {self.best_layer} with {max(self.accuracy_by_layer):.3f}"
            )
            if self.relabelling_p is not None:
                lines.append(f"p = {self.relabelling_p:.3f} among all assignments of experts to labels")
        return "\n".join(lines)


def _ranges(layers: Sequence[int]) -> str:
    return f"{layers[0]}..{layers[-1]}" if len(layers) > 1 else ", ".join(map(str, layers))


def routing(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    data: Sequence[str] | Sequence[tuple[str, str]] | Sequence[Record],
    *,
    groups: Sequence[str] | None = None,
    positions: Positions = "published",
    controls: Mapping[str, Any] | None = None,
    encode_options: Mapping[str, Any] | None = None,
    max_samples: int | None = MAX_SAMPLES,
    sample_seed: int = SAMPLE_SEED,
    max_tokens: int = 2048,
    draws: int = DRAWS,
    seed: int = 0,
    progress: bool = False,
) -> RoutingReport:
    """Teacher-forced routing of texts, (prompt, answer) pairs of plain text, or labelled records.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer.
        data: one kind only. Texts count from their first slot, pairs from the last token of their prompt, records
            (rendered by the chat template) as ``positions`` says. Labels are compared where the model has four experts.
        groups: a name per item of ``data``, for usage by group; the records' data sets if not given.
        positions: of records. "published": from the last token of the prompt, the template of all turns but the last
            without generation prompt, to the last token but one, so that the answer's header counts as answer.
            "answer": the slots that predict a trained answer token.
        controls: steering arguments of the forward passes.
        encode_options: passed to :func:`micro.data.encode`.
        max_samples: more than these are thinned out at random; None keeps all.
        sample_seed: of that draw.
        max_tokens: slots per batch.
        draws: of the bootstrap over samples.
        seed: of the bootstrap.
        progress: show a bar on stderr.

    Returns:
        A :class:`RoutingReport`; its ``counts`` hold the numbers of every sample.

    Raises:
        ValueError: no data, mixed kinds, as many groups as items are not given, or nothing left after encoding.

    Source: MiCRo, routing analyses (1,000 samples, layer exclusion); intervals by bootstrap over samples. Usage is not
    importance: only ablations say what an expert does.
    """
    names = _group_names(data, groups)
    samples = drawn_samples(
        data,
        tokenizer,
        what="analysis.routing",
        positions=positions,
        max_samples=max_samples,
        sample_seed=sample_seed,
        options=encode_options,
    )
    config = model.config
    labelled = samples.labelled and config.num_experts == len(LABELS)
    counts = SampleCounts.zeros(len(samples.data), config.num_hidden_layers, config.num_experts, labelled=labelled)
    counts.index[:] = samples.drawn
    passes = traces(model, samples, tokenizer, controls=controls, max_tokens=max_tokens, progress=progress)
    for indices, batch, trace, counted in passes:
        counts.add(indices, trace, counted, labels_of(batch))
    k = experts_per_token(model, controls)
    settings = {
        "positions": samples.rule,
        "experts_per_token": k,
        "usage": "first choices" if k == 1 else "mean probabilities",
        "layers_excluded": [
            l for l in range(config.num_hidden_layers) if l not in counted_layers(config.num_hidden_layers)
        ],
        "labels_compared": labelled,
        "samples_given": len(data),
        "max_samples": max_samples,
        "sample_seed": sample_seed,
        "interval": "95 % bootstrap over samples",
        "bootstrap_draws": draws,
        "seed": seed,
    }
    report = RoutingReport(
        list(config.expert_names or ()), settings=settings, counts=counts, **usage_numbers(counts, k, draws, seed)
    )
    if names:
        report.by_group = groups_of(counts, [names[i] for i in samples.drawn], k, draws, seed)
    if labelled:
        for name, value in accuracy_numbers(counts, report.experts, draws, seed).items():
            setattr(report, name, value)
    return report


def _group_names(data: Sequence[Any], groups: Sequence[str] | None) -> list[str] | None:
    if groups is None:
        found = [getattr(item, "dataset", None) for item in data]
        return [name or "unnamed" for name in found] if any(found) else None
    if len(groups) != len(data):
        raise ValueError(f"analysis.routing: groups holds {len(groups)} names for {len(data)} items; give one for each")
    return [str(name) for name in groups]
