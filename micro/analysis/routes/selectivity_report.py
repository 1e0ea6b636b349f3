"""Do experts attend to what people rate? Routing of sentences against human ratings of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from micro.analysis.result import Result, plain
from micro.analysis.routes.counting import counted_layers
from micro.analysis.routes.passes import SampleCounts, SentenceTokens, sentence_samples, traces
from micro.analysis.statistics import (
    CHUNK_NUMBERS,
    Array,
    hierarchical_bootstrap,
    holm,
    permutation_p,
    pieces,
    ratio,
    weighted_correlation,
)
from micro.errors import require

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoForCausalLM

MEASURES = ("share", "probability")


@dataclass
class SelectivityReport(Result):
    """Correlation over sentences of each expert's routing with each mean human rating.

    ``values[measure]`` [N][E], measure "share": share of (layer, token) whose first choice is the expert,
    "probability": mean probability; ``rated`` [N][R] (None where a sentence has no such rating).
    ``correlation[measure]`` [E][R]: Pearson's r, with 95 % bootstrap intervals over sentences, two-sided permutation p,
    and the same after Holm's correction over all pairs of expert and rating.
    """

    name: ClassVar[str] = "selectivity"

    experts: list[str]
    ratings: list[str]
    sentences: list[str]
    tokens: int
    layers: list[int]
    values: dict[str, list[list[float]]]
    rated: list[list[float | None]]
    correlation: dict[str, list[list[float]]]
    interval: dict[str, list[list[list[float]]]]
    p: dict[str, list[list[float]]]
    p_holm: dict[str, list[list[float]]]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per measure, expert and rating."""
        import pandas as pd

        lines = [
            {
                "measure": measure,
                "expert": expert,
                "rating": rating,
                "r": self.correlation[measure][e][k],
                "low": self.interval[measure][e][k][0],
                "high": self.interval[measure][e][k][1],
                "p": self.p[measure][e][k],
                "p Holm": self.p_holm[measure][e][k],
                "sentences": sum(row[k] is not None for row in self.rated),
            }
            for measure in self.values
            for e, expert in enumerate(self.experts)
            for k, rating in enumerate(self.ratings)
        ]
        return pd.DataFrame(lines)

    def plot(self) -> Figure:
        from micro.analysis.routes.figures import selectivity_figure

        return selectivity_figure(self)


def selectivity(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    table: pd.DataFrame | Mapping[str, Sequence[Any]] | str | Path,
    *,
    layers: Literal["all", "counted"] = "all",
    tokens: SentenceTokens = "sentence",
    chat: bool = True,
    controls: Mapping[str, Any] | None = None,
    max_tokens: int = 2048,
    permutations: int = 10_000,
    draws: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> SelectivityReport:
    """Route rated sentences and correlate each expert's share with each rating.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer.
        table: a column ``sentence`` and one numeric column per rating: a frame, a mapping of columns, or a CSV file.
            Lines with the same sentence (one per rater) are averaged.
        layers: "counted" leaves out the first two and the last two, as the usage of a routing report does.
        tokens: "sentence" or "published", see :func:`micro.analysis.routes.passes.sentence_samples`.
        chat: each sentence is the only user turn; False = plain text without a template.
        controls: steering arguments of the forward passes.
        max_tokens: slots per batch.
        permutations: of the ratings over sentences, for p.
        draws: of the bootstrap over sentences.
        seed: of both.
        progress: show a bar on stderr.

    Returns:
        A :class:`SelectivityReport`.

    Raises:
        ValueError: no column ``sentence``, no rating, a rating that is no number, or fewer than three sentences.

    Source: MiCRo, selectivity of the social expert for mental-state content (r = 0.7). Whether shares or mean
    probabilities were used is not published: both are reported.
    """
    sentences, names, rated = read_ratings(table)
    if layers not in ("all", "counted"):
        raise ValueError(f'analysis.selectivity: layers must be "all" or "counted", got {layers!r}')
    samples = sentence_samples(sentences, tokenizer, what="analysis.selectivity", tokens=tokens, chat=chat)
    config = model.config
    counts = SampleCounts.zeros(len(sentences), config.num_hidden_layers, config.num_experts)
    passes = traces(
        model,
        samples,
        tokenizer,
        controls=controls,
        max_tokens=max_tokens,
        progress=progress,
        description="selectivity",
    )
    for indices, _, trace, counted in passes:
        counts.add(indices, trace, counted, None)
    kept = counted_layers(config.num_hidden_layers) if layers == "counted" else list(range(config.num_hidden_layers))
    values = {
        measure: part[:, kept].mean(1) / counts.tokens[:, None]
        for measure, part in zip(MEASURES, (counts.usage, counts.mass), strict=True)
    }
    report = SelectivityReport(
        experts=list(config.expert_names or ()),
        ratings=names,
        sentences=sentences,
        tokens=int(counts.tokens.sum()),
        layers=kept,
        values={name: plain(v) for name, v in values.items()},
        rated=plain(rated),
        correlation={},
        interval={},
        p={},
        p_holm={},
        settings={
            "tokens": tokens,
            "chat": chat,
            "layers": layers,
            "p": "two-sided permutation of ratings over sentences",
            "permutations": permutations,
            "interval": "95 % bootstrap over sentences",
            "bootstrap_draws": draws,
            "seed": seed,
        },
    )
    for measure, v in values.items():
        found = correlations(v, rated, permutations=permutations, draws=draws, seed=seed)
        for part, numbers in found.items():
            getattr(report, part)[measure] = plain(numbers)
    return report


def read_ratings(table: Any) -> tuple[list[str], list[str], Array]:
    """(sentences, names of ratings, ratings [N,R]) of a frame, a mapping of columns or a CSV file."""
    pd = require("pandas", "eval", "a table of ratings")
    where = str(table) if isinstance(table, str | Path) else "ratings"
    frame = pd.read_csv(table) if isinstance(table, str | Path) else pd.DataFrame(table)
    if "sentence" not in frame.columns:
        raise ValueError(f"{where}: no column 'sentence'; the columns are {', '.join(map(str, frame.columns))}")
    names = [str(c) for c in frame.columns if c != "sentence"]
    if not names:
        raise ValueError(f"{where}: no rating; give one numeric column for each beside 'sentence'")
    for name in names:
        try:
            frame[name] = pd.to_numeric(frame[name])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: column {name!r} holds something that is no number ({error})") from None
    if frame["sentence"].isna().any():
        raise ValueError(f"{where}: line {int(frame['sentence'].isna().argmax()) + 2} has no sentence")
    frame["sentence"] = frame["sentence"].astype(str).str.strip()
    means = frame.groupby("sentence", sort=False)[names].mean()
    if len(means) < 3:
        raise ValueError(f"{where}: {len(means)} sentences; a correlation needs at least three")
    rated = means.to_numpy(dtype=np.float64)
    if np.isinf(rated).any():
        raise ValueError(f"{where}: a rating is infinite")
    return list(means.index), names, rated


def correlations(
    values: Array, rated: Array, *, permutations: int = 10_000, draws: int = 2000, seed: int = 0
) -> dict[str, Array]:
    """Pearson's r of all columns of values [N,E] with those of rated [N,R], its interval, permutation p and Holm's p.

    A sentence without a rating is left out for that rating; r is NaN where a column does not vary.
    """
    experts, ratings = values.shape[1], rated.shape[1]
    r, p = np.full((2, experts, ratings), np.nan)
    interval = np.full((experts, ratings, 2), np.nan)
    for k in range(ratings):
        known = ~np.isnan(rated[:, k])
        x, y = values[known], rated[known, k]
        if len(y) < 3:
            continue
        r[:, k] = _pearson(x, y[None])[0]
        generator = np.random.default_rng(seed)
        sizes = pieces(permutations, CHUNK_NUMBERS // len(y))
        shuffled = (generator.permuted(np.tile(y, (size, 1)), axis=1) for size in sizes)
        null = np.concatenate([_pearson(x, part) for part in shuffled])
        p[:, k] = permutation_p(r[:, k], null, alternative="two-sided")
        statistic = partial(weighted_correlation, x=x, y=y[:, None])
        low, high = hierarchical_bootstrap([np.arange(len(y))], statistic, draws=draws, seed=seed)
        interval[:, k] = np.stack([low, high], -1)
    return {"correlation": r, "interval": interval, "p": p, "p_holm": holm(p)}


def _pearson(x: Array, y: Array) -> Array:
    """Pearson's r of x [N,E] with each row of y [D,N], [D,E]."""
    a, b = x - x.mean(0), y - y.mean(1, keepdims=True)
    sizes = np.sqrt((a**2).sum(0) * (b**2).sum(1, keepdims=True))
    return ratio(b @ a, np.where(sizes > 1e-12, sizes, 0.0))
