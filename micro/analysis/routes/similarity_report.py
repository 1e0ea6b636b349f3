"""How alike are the experts' outputs? Cosine similarity between experts that each run the whole model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from micro import interventions as iv
from micro.analysis.batches import batches
from micro.analysis.modes import evaluating
from micro.analysis.result import Result, plain
from micro.analysis.routes.passes import Samples, SentenceTokens, sentence_samples
from micro.analysis.statistics import Array, hierarchical_bootstrap
from micro.files import write_text
from micro.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM


@dataclass
class SimilarityReport(Result):
    """Mean cosine similarity of B_e outputs for pairs of experts.

    ``pairs``: [first, second]; ``by_layer`` [pairs][L]: mean over sentences of the mean over all pairs of tokens of one
    sentence; ``mean`` [pairs]: over layers. Pairs of an expert with itself come last: what tokens of one sentence share
    anyway, the ceiling of the comparison. Intervals are 95 % bootstrap intervals over sentences.
    """

    name: ClassVar[str] = "similarity"

    experts: list[str]
    sentences: int
    tokens: int
    pairs: list[list[str]]
    mean: list[float]
    mean_interval: list[list[float]]
    by_layer: list[list[float]]
    by_layer_interval: list[list[list[float]]]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per pair: mean over layers, with interval."""
        import pandas as pd

        return pd.DataFrame(
            {
                "pair": [first if first == second else f"{first}, {second}" for first, second in self.pairs],
                "cosine": self.mean,
                "low": [low for low, _ in self.mean_interval],
                "high": [high for _, high in self.mean_interval],
            }
        )

    def layer_table(self) -> pd.DataFrame:
        """One line per layer and pair."""
        import pandas as pd

        lines = [
            {"layer": l, "first": first, "second": second, "cosine": cosine, "low": low, "high": high}
            for (first, second), row, bounds in zip(self.pairs, self.by_layer, self.by_layer_interval, strict=True)
            for l, (cosine, (low, high)) in enumerate(zip(row, bounds, strict=True))
        ]
        return pd.DataFrame(lines)

    def save(self, folder: str | Path) -> None:
        """``similarity.json`` and ``.csv``, and ``similarity_layers.csv``."""
        super().save(folder)
        write_text(Path(folder) / "similarity_layers.csv", self.layer_table().to_csv(index=False))

    def __str__(self) -> str:
        counts = f"{self.sentences} sentences, {self.tokens} tokens, mean over {len(self.by_layer[0])} layers"
        return f"{super().__str__()}\n{counts}"

    def plot(self) -> Figure:
        from micro.analysis.routes.figures import similarity_figure

        return similarity_figure(self)


def similarity(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    tokens: SentenceTokens = "sentence",
    chat: bool = True,
    controls: Mapping[str, Any] | None = None,
    max_tokens: int = 1024,
    draws: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> SimilarityReport:
    """Keep one expert at a time in all layers, read B_e (the output before weighting), compare experts.

    The mean cosine over all pairs of tokens of two experts is the dot product of their mean unit vectors, so nothing
    quadratic in tokens is formed.

    Args:
        model: a MiCRo model of either kind; with FFN experts B_e is the FFN's output.
        tokenizer: its tokenizer.
        sentences: each becomes the only user turn; its own tokens count.
        tokens: "sentence" or "published", see :func:`micro.analysis.routes.passes.sentence_samples`.
        chat: False = plain text without a template.
        controls: other steering arguments; which experts run is set here.
        max_tokens: slots per batch; the outputs of all layers of a batch are held at once.
        draws: of the bootstrap over sentences.
        seed: of the bootstrap.
        progress: show a bar on stderr.

    Returns:
        A :class:`SimilarityReport`.

    Raises:
        ValueError: no sentences, an empty one, or controls that choose experts.

    Source: MiCRo, embedding similarity of experts.
    """
    if chosen := {"ablate", "keep", "force"} & set(controls or {}):
        raise ValueError(f"analysis.similarity: {', '.join(sorted(chosen))} cannot be given; every expert runs alone")
    samples = sentence_samples(sentences, tokenizer, what="analysis.similarity", tokens=tokens, chat=chat)
    experts = list(model.config.expert_names or ())
    work = list(batches(samples.rows, tokenizer, max_tokens=max_tokens))
    means = np.zeros((len(experts), model.config.num_hidden_layers, len(sentences), model.config.hidden_size))
    with evaluating(model):
        for indices, batch in track(work, "similarity", unit="batches", enabled=progress):
            for e in range(len(experts)):
                means[e][:, indices] = _mean_directions(model, batch, indices, samples, e, dict(controls or {}))
    counted = sum(last - first for first, last in samples.spans.values())
    settings = {"tokens": tokens, "chat": chat, "interval": "95 % bootstrap over sentences", "bootstrap_draws": draws}
    return _report(means, experts, counted, settings | {"seed": seed}, draws, seed)


def _mean_directions(
    model: MiCRoForCausalLM,
    batch: Mapping[str, Tensor],
    indices: list[int],
    samples: Samples,
    expert: int,
    controls: dict[str, Any],
) -> Array:
    """Mean over the counted tokens of B_e(x) / |B_e(x)|, float64 [L,B,H], with every token routed to one expert."""
    counted = samples.counted(indices, batch)
    with model.intervene(iv.read("block_output", experts=expert, positions=counted, name="out")) as run:
        model.model(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            use_cache=False,
            **{**controls, "keep": expert},
        )
    sums = torch.zeros(
        model.config.num_hidden_layers, len(indices), model.config.hidden_size, dtype=torch.float64, device=model.device
    )
    for part in run.parts("out"):
        if len(part):
            unit = torch.nn.functional.normalize(part.values.double(), dim=-1)
            sums[int(part.layer[0])].index_add_(0, part.row, unit)
    result: Array = (sums.cpu() / counted.sum(1)[:, None]).numpy()
    return result


def _report(
    means: Array, experts: list[str], tokens: int, settings: dict[str, Any], draws: int, seed: int
) -> SimilarityReport:
    chosen = sorted(combinations_with_replacement(range(len(experts)), 2), key=lambda p: (p[0] == p[1], p))
    cosines = np.stack([np.einsum("lsh,lsh->sl", means[a], means[b]) for a, b in chosen], 1)  # [S,pairs,L]
    flat = cosines.reshape(len(cosines), -1)

    def numbers(weights: Array) -> Array:
        by_layer = weights @ flat / weights.sum(1, keepdims=True)
        return np.concatenate([by_layer.reshape(len(weights), len(chosen), -1).mean(-1), by_layer], 1)

    low, high = hierarchical_bootstrap([np.arange(len(flat))], numbers, draws=draws, seed=seed)
    interval = np.stack([low, high], -1)
    count, layers = cosines.shape[1:]
    return SimilarityReport(
        experts=experts,
        sentences=len(cosines),
        tokens=tokens,
        pairs=[[experts[a], experts[b]] for a, b in chosen],
        mean=plain(cosines.mean((0, 2))),
        mean_interval=plain(interval[:count]),
        by_layer=plain(cosines.mean(0)),
        by_layer_interval=plain(interval[count:].reshape(count, layers, 2)),
        settings=settings,
    )
