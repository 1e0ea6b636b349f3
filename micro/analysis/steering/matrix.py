"""What steering does: each task under each steering set, and the answers side by side.

Steering sets keep Language and one domain (model.md 4.6); the set "language" keeps Language alone (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from micro.analysis.ablations.scores import GROUP, ScoreStore
from micro.analysis.modes import evaluating
from micro.analysis.result import Result
from micro.analysis.statistics import Array, bootstrap, holm, permutation_p, pieces, ratio
from micro.analysis.suites import SHARE, ManySuite, Suite, Traits, traits
from micro.experts import NAMES
from micro.progress import Progress, track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from micro.modeling import MiCRoConfig, MiCRoForCausalLM

UNSTEERED = "unsteered"
CHUNK = 512  # sign flips at once


def steering_sets(config: MiCRoConfig) -> dict[str, list[str]]:
    """Name of a set -> experts to ablate. With the four named experts: a domain and Language stay (model.md 4.6), and
    "language" keeps Language alone; otherwise each set keeps one expert.
    """
    names = list(config.expert_names or [])
    kept = {name: {name} for name in names}
    if tuple(names) == NAMES:
        kept = {name: {name, NAMES[-1]} for name in names}
    return {name: [other for other in names if other not in stay] for name, stay in kept.items()}


@dataclass
class SteeringReport(Result):
    """The change of each row (a task, or a domain's answers) under each steering set; positive = better.

    change [R][C] in ``unit`` (for losses the change in log-likelihood, nats per token; for shares points, while score
    [R] remains a share); interval [R][C][2]: 95 %, paired bootstrap over records; p [R][C]: sign flips of the records'
    differences; p_holm [R][C]: Holm over the whole table. random, random_low, random_high [R][C]: mean and range of the
    change where as many experts were ablated in every layer, but others in each; random_p [R][C]: share of these at
    least as high. index: mean over rows that have a set of the same name of (own set - mean of the other sets);
    index_p: against all assignments of sets to rows.
    curves: graded bias, one entry per expert (see :func:`micro.analysis.bias_curves`). outputs: answers per prompt and
    set.
    """

    name: ClassVar[str] = "steering"

    rows: list[str]
    sets: list[str]
    ablated: dict[str, list[str]]
    score: list[float]  # unsteered, [R]
    change: list[list[float]]
    interval: list[list[list[float]]]
    p: list[list[float]]
    p_holm: list[list[float]]
    random: list[list[float | None]]
    random_low: list[list[float | None]]
    random_high: list[list[float | None]]
    random_p: list[list[float | None]]
    index: float | None
    index_p: float | None
    records: int
    items: list[int]
    unit: str
    curves: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One line per row and set."""
        import pandas as pd

        lines = [
            {
                "row": row, "set": name, "score_unsteered": self.score[r], "change": self.change[r][c],
                "low": self.interval[r][c][0], "high": self.interval[r][c][1], "p": self.p[r][c],
                "p_holm": self.p_holm[r][c], "random": self.random[r][c], "random_low": self.random_low[r][c],
                "random_high": self.random_high[r][c], "random_p": self.random_p[r][c], "items": self.items[r],
            }
            for r, row in enumerate(self.rows)
            for c, name in enumerate(self.sets)
        ]  # fmt: skip
        return pd.DataFrame(lines)

    def __str__(self) -> str:
        import pandas as pd

        cells = [
            [f"{self.change[r][c]:+.3f}{'*' if self.p_holm[r][c] < 0.05 else ' '}" for c in range(len(self.sets))]
            for r in range(len(self.rows))
        ]
        frame = pd.DataFrame(cells, columns=self.sets)
        frame.insert(0, "row", self.rows)
        lines = [str(frame.to_string(index=False)), f"change, {self.unit}; * = p < 0.05 after Holm"]
        if self.index is not None:
            lines.append(f"own set against the others: {self.index:+.3f}, p = {self.index_p:.3f}")
        return "\n".join(lines)

    def plot(self) -> Figure:
        from micro.analysis.steering.figures import steering_figure

        return steering_figure(self)


# ---------------------------------------------------------------- the matrix
def steering_matrix(
    model: MiCRoForCausalLM,
    suites: Suite | Sequence[Suite],
    sets: Mapping[str, Sequence[str]] | None = None,
    *,
    random_sets: int = 20,
    controls: Mapping[str, Any] | None = None,
    draws: int = 10_000,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> SteeringReport:
    """Score suites without steering and under each steering set.

    Args:
        model: a MiCRo model of either kind.
        suites: one or several :class:`micro.analysis.Suite`; :class:`micro.analysis.LossSuite` on held-out records
            gives the change in log-likelihood of each domain's answers. All must report in one unit.
        sets: name -> experts to ablate in all layers; :func:`steering_sets` if not given.
        random_sets: controls per number of ablated experts: in every layer as many experts as the set ablates, drawn
            at random.
        controls: other steering arguments, the same everywhere.
        draws: of the bootstrap and of the sign flips.
        seed: of controls, bootstrap and sign flips.
        store: where scores are kept, so that a run that was stopped goes on; in memory if not given.
        progress: show a bar on stderr.

    Raises:
        ValueError: an unknown expert, a set that leaves none, or suites of different units.
    """
    several = list(suites) if isinstance(suites, Sequence) else [suites]
    known = [traits(suite, model) for suite in several]
    if len({one.unit for one in known}) != 1:
        raise ValueError(f"suites report in different units: {[one.unit for one in known]}; make one report for each")
    ablated = {name: list(experts) for name, experts in (sets or steering_sets(model.config)).items()}
    if not ablated or UNSTEERED in ablated:
        raise ValueError(f"sets must name at least one set, and none {UNSTEERED!r}; got {list(ablated)}")
    if clash := [name for name in ("ablate", "keep") if (controls or {}).get(name) is not None]:
        raise ValueError(f"controls: {clash[0]} is what the sets are for; give it in sets")
    random = _random_sets(model.config, ablated, random_sets, seed)
    conditions = [None, *ablated.values(), *(drawn for size in random.values() for drawn in size)]
    given = [{**(controls or {}), **({"ablate": c} if c else {})} for c in conditions]
    table = _Table(list(ablated), draws, seed)
    for suite, one in zip(several, known, strict=True):
        table.add(suite, one, scored(model, suite, given, store, progress=progress), _places(ablated, random))
    return table.report(
        ablated,
        sum(suite.records for suite in several),
        {
            "interval": "95 % paired bootstrap over records", "p": "two-sided sign flips of record differences",
            "family": "Holm over all rows and sets", "random_sets": random_sets, "draws": draws, "seed": seed,
            "controls": {name: str(value) for name, value in (controls or {}).items()},
            "tasks": [one.task for one in known],
        },
    )  # fmt: skip


def scored(
    model: MiCRoForCausalLM,
    suite: Suite,
    conditions: Sequence[Mapping[str, Any]],
    store: ScoreStore | None = None,
    *,
    what: str = "steering",
    progress: bool = False,
) -> list[tuple[Array, Array]]:
    """(sums, counts) of a suite under each condition, a dictionary of steering arguments; those that the store has are
    taken from it. Conditions that differ in ``ablate`` alone are scored eight at a time where the suite can.
    """
    store = ScoreStore() if store is None else store
    about = store.about(model, [suite])[0]
    keys = [store.key(about, condition, "free") for condition in conditions]
    wanted = [i for i, key in enumerate(keys) if store.get(key) is None]
    # Without controls a layer takes its fastest path, so that condition goes alone.
    bare = [i for i in wanted if not conditions[i]]
    rest = [i for i in wanted if conditions[i]]
    size = GROUP if isinstance(suite, ManySuite) else 1
    groups = [*([i] for i in bare), *(rest[i : i + size] for i in range(0, len(rest), size))]
    with evaluating(model), Progress(what, len(wanted), unit="conditions", enabled=progress) as bar:
        for group in groups:
            given = [conditions[i] for i in group]
            if isinstance(suite, ManySuite):
                made = suite.score_many(model, given)
            else:
                made = [suite.score(model, one) for one in given]
            for i, scores in zip(group, made, strict=True):
                store.put(keys[i], scores)
            bar.advance(len(group))
    found = [store.get(key) for key in keys]
    return [scores for scores in found if scores is not None]


def _random_sets(
    config: MiCRoConfig, ablated: Mapping[str, Sequence[str]], count: int, seed: int
) -> dict[int, list[dict[int, list[int]]]]:
    """Size of a set -> random choices {layer: experts} of that size."""
    from micro.modeling.controls import ExpertNames

    names, generator = ExpertNames(config), np.random.default_rng(seed)
    sizes = sorted({len(set(names.many(experts, "sets"))) for experts in ablated.values()})
    if sizes and sizes[-1] >= config.num_experts:
        raise ValueError(f"sets: a set ablates all {config.num_experts} experts; at least one must stay")
    layers = range(config.num_hidden_layers)
    return {
        size: [
            {layer: generator.choice(config.num_experts, size, replace=False).tolist() for layer in layers}
            for _ in range(count)
        ]
        for size in sizes
        if size
    }


def _places(ablated: Mapping[str, Sequence[str]], random: Mapping[int, Sequence[Any]]) -> dict[str, list[int]]:
    """Set -> numbers of its controls among the conditions."""
    place, out, first = {}, {}, 1 + len(ablated)
    for size, drawn in random.items():
        place[size] = list(range(first, first + len(drawn)))
        first += len(drawn)
    for name, experts in ablated.items():
        out[name] = place.get(len(set(experts)), [])
    return out


class _Table:
    """Rows of the report, suite by suite."""

    def __init__(self, sets: list[str], draws: int, seed: int) -> None:
        self.sets, self.draws, self.seed = sets, draws, seed
        self.lines: list[dict[str, Any]] = []
        self.unit = ""

    def add(
        self, suite: Suite, one: Traits, scores: list[tuple[Array, Array]], controls: Mapping[str, list[int]]
    ) -> None:
        self.unit = unit_of_changes(one)
        sums = np.stack([s for s, _ in scores]) * one.sign * one.factor  # [conditions, records, rows]
        counts = scores[0][1]
        differences = sums - sums[:1]
        count = len(self.sets)
        change = mean_change(differences[1 : count + 1], counts)
        everyone = np.ones(suite.records)
        low, high = bootstrap(suite.records, change, draws=self.draws, seed=self.seed)
        own, p = change(everyone), sign_flips(differences[1 : count + 1], counts, self.draws, self.seed)
        all_changes = ratio(differences.sum(1), counts.sum(0))
        score = ratio(np.asarray(scores[0][0].sum(0)), counts.sum(0))
        for k, name in enumerate(suite.names):
            if counts[:, k].sum() == 0:
                continue
            line: dict[str, Any] = {"row": name, "score": float(score[k]), "items": int(counts[:, k].sum())}
            line["cells"] = [
                {
                    "change": float(own[c, k]), "interval": [float(low[c, k]), float(high[c, k])],
                    "p": float(p[c, k]), **_control(own[c, k], all_changes[controls[self.sets[c]], k]),
                }
                for c in range(count)
            ]  # fmt: skip
            self.lines.append(line)

    def report(self, ablated: dict[str, list[str]], records: int, settings: dict[str, Any]) -> SteeringReport:
        def column(name: str) -> list[list[Any]]:
            return [[cell[name] for cell in line["cells"]] for line in self.lines]

        rows, change, p = [line["row"] for line in self.lines], column("change"), column("p")
        index, index_p = specificity(rows, self.sets, np.asarray(change))
        return SteeringReport(
            rows=rows,
            sets=self.sets,
            ablated=ablated,
            score=[line["score"] for line in self.lines],
            change=change,
            interval=column("interval"),
            p=p,
            p_holm=holm(p).tolist(),
            random=column("random"),
            random_low=column("random_low"),
            random_high=column("random_high"),
            random_p=column("random_p"),
            index=index,
            index_p=index_p,
            records=records,
            items=[line["items"] for line in self.lines],
            unit=self.unit,
            settings=settings,
        )


def _control(observed: float, drawn: Array) -> dict[str, float | None]:
    if not len(drawn):
        return {"random": None, "random_low": None, "random_high": None, "random_p": None}
    p = float(permutation_p(observed, drawn))
    low, high = float(drawn.min()), float(drawn.max())
    return {"random": float(drawn.mean()), "random_low": low, "random_high": high, "random_p": p}


def sign_flips(differences: Array, counts: Array, draws: int, seed: int) -> Array:
    """Two-sided p of sum over records of differences [C,records,K] being 0, by flipping the sign of whole records
    (Fisher's randomisation test for pairs).
    """
    generator = np.random.default_rng(seed)
    items = np.where(counts.sum(0) > 0, counts.sum(0), np.nan)
    parts = []
    for some in pieces(draws, CHUNK):
        signs = generator.choice([-1.0, 1.0], size=(some, differences.shape[1]))
        parts.append(np.einsum("dr,crk->dck", signs, differences, optimize=True) / items)
    return permutation_p(differences.sum(1) / items, np.concatenate(parts), alternative="two-sided")


def specificity(rows: Sequence[str], sets: Sequence[str], change: Array) -> tuple[float | None, float | None]:
    """Mean over rows named like a set of (change under the own set - mean change under the other sets), and its p
    against all assignments of these sets to these rows. None with fewer than two such rows.
    """
    own = [name for name in rows if name in sets]
    if len(own) < 2 or len(set(own)) != len(own):
        return None, None
    table = change[np.ix_([list(rows).index(n) for n in own], [list(sets).index(n) for n in own])]
    count = len(own)

    def index(order: Sequence[int]) -> float:
        diagonal = table[np.arange(count), list(order)]
        return float((diagonal - (table.sum(1) - diagonal) / (count - 1)).mean())

    observed = index(range(count))
    every = np.array([index(order) for order in permutations(range(count))])
    return observed, float((every >= observed - 1e-12).mean())


def unit_of_changes(one: Traits) -> str:
    """Of differences of a suite's scores, times their factor."""
    return "points" if one.unit == SHARE else one.unit


def mean_change(differences: Array, counts: Array) -> Callable[[Array], Array]:
    """Weights of records -> mean of differences [N,records,K] over items [records,K]."""
    return lambda weights: ratio(np.einsum("brk,r->bk", differences, weights), weights @ counts)


# ---------------------------------------------------------------- answers side by side
def steered_outputs(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str],
    sets: Mapping[str, Sequence[str]] | None = None,
    *,
    max_new_tokens: int = 64,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, str]]:
    """Answers to each prompt, unsteered and under each set, greedy unless ``options`` of ``generate`` say otherwise.

    Prompts are user turns where the tokenizer has a chat template, else plain text. All sets of a prompt are rows of
    one batch. Returns one dict per prompt: "prompt", "unsteered" and the names of the sets.
    """
    chosen = {UNSTEERED: [], **{n: list(s) for n, s in (sets or steering_sets(model.config)).items()}}
    out = []
    with evaluating(model):
        for prompt in track(prompts, "answers", unit="prompts", enabled=progress):
            ids = _prompt_ids(tokenizer, prompt).repeat(len(chosen), 1).to(model.device)
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                ablate=list(chosen.values()),
                max_new_tokens=max_new_tokens,
                **{"do_sample": False, **options},
            )
            texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
            out.append({"prompt": prompt, **dict(zip(chosen, map(str.strip, texts), strict=True))})
    return out


def _prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return torch.tensor([ids])
