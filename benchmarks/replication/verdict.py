"""The verdict rules, as data and code, and the table of claims.

The rules were committed before any run (git log of this file); VERDICT_RULES.md is printed from them. A claim has
parts; a part is one number with a 95 % interval and two thresholds:

- supported: the interval lies above `floor` and the estimate reaches `smallest`, the least effect that would matter;
- not supported: the interval lies below `smallest`;
- inconclusive: anything else.

A claim is supported if all of its parts are, not supported if one of them is not, inconclusive otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from benchmarks.replication import estimates as st
from benchmarks.replication.estimates import Estimate, Table
from benchmarks.replication.measure import STEERING
from micro.analysis.result import Result
from micro.experts import NAMES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN = "supported", "not supported", "inconclusive", "not run"
MARGIN = 0.02  # nat per token
TARGETS = tuple(STEERING)
LABELLED = {"language": "language", "multiple_demand": "logic"}  # theory_of_mind has 10 + 10 items: printed, not judged


@dataclass(frozen=True)
class Rule:
    """What one claim needs. arms: those whose runs must be there; parts: name -> (floor, smallest, words)."""

    claim: str
    words: str
    arms: tuple[str, ...]
    parts: dict[str, tuple[float, float, str]]


RULES = (
    Rule(
        "specialisation",
        "Experts specialise on held-out templates beyond the random-label control.",
        ("micro", "random"),
        {
            "accuracy above control": (
                0.0,
                0.05,
                "share of held-out answer tokens routed (first choice) to the expert of their label, balanced over "
                "domains, mean over layers: MiCRo minus random labels, whose experts are matched to labels on training "
                "answers, seed by seed, by the best of the 24 relabellings; MiCRo's are not matched",
            )
        },
    ),
    Rule(
        "ablation",
        "Ablating an expert hurts its own domain more than others.",
        ("micro", "random"),
        {
            "index": (
                0.0,
                0.02,
                "mean over domains d of [relative loss rise on d when d is ablated - mean over the other experts]; by "
                "columns (own domain - mean over the other domains) the mean is algebraically the same number",
            ),
            "index above control": (
                0.0,
                0.02,
                "the index minus that of random labels, whose experts are matched on training answers",
            ),
            "relabellings": (
                0.95,
                0.95,
                "1 - p, p = share of all 24 relabellings of the experts whose index reaches the observed one "
                "(exact, least p 1/24)",
            ),
            "no contrary row or column": (
                -0.005,
                -0.005,
                "the least upper bound of the eight row and column contrasts: no domain and no expert may speak "
                "against the claim",
            ),
        },
    ),
    Rule(
        "steering",
        "Steering moves each domain's held-out log-likelihood as asked.",
        ("micro",),
        {
            f"towards {name}": (
                0.0,
                MARGIN,
                f"log-likelihood gain of {name} in nats per token when language and {name} are kept, minus its mean "
                "gain when steered to the two other domains",
            )
            for name in TARGETS
        },
    ),
    Rule(
        "localizers",
        "Localizers point to the labelled expert more than to others.",
        ("micro", "random"),
        {
            **{
                f"{network} -> {expert}": (
                    0.0,
                    0.05,
                    f"share of the units that the {network} localizer selects (top 10 %) in {expert}, minus the mean "
                    "share of the other experts; bootstrap over seeds",
                )
                for network, expert in LABELLED.items()
            },
            **{
                f"{network} above control": (
                    0.0,
                    0.05,
                    f"the same minus that of random labels, whose experts are matched on training answers ({expert})",
                )
                for network, expert in LABELLED.items()
            },
        },
    ),
    Rule(
        "non-inferiority",
        "MiCRo is no worse than dense and MoB on held-out loss.",
        ("micro", "dense", "mob"),
        {
            f"against {name}": (
                -MARGIN,
                -MARGIN,
                f"held-out loss of {name} minus that of MiCRo in nats per token, mean of the four domains; the upper "
                f"95 % bound of MiCRo's excess must lie under {MARGIN}",
            )
            for name in ("dense", "mob")
        },
    ),
    Rule(
        "stability",
        "Routing is stable through stage 3.",
        ("micro", "straight_through"),
        {
            "kappa": (
                0.6,
                0.6,
                "Cohen's kappa of first choices on held-out tokens, end of stage 2 against end of stage 3, mean over "
                "layers; under top-1 these routers get no language gradient, so this part alone says little",
            ),
            "kappa above fresh router": (
                0.0,
                0.2,
                "the same minus kappa with routers drawn anew at the end of stage 2",
            ),
            "kappa, straight-through": (
                0.6,
                0.6,
                "the same for the arm whose routers do get a language gradient in stage 3",
            ),
        },
    ),
)


@dataclass
class Part:
    """One number of a claim."""

    name: str
    value: float
    low: float
    high: float
    floor: float
    smallest: float
    verdict: str = ""

    def __post_init__(self) -> None:
        self.verdict = decide(self.value, self.low, self.high, floor=self.floor, smallest=self.smallest)


@dataclass
class Claim:
    """A claim with its verdict; notes: what was found beside it."""

    claim: str
    words: str
    verdict: str
    parts: list[Part]
    notes: dict[str, Any] = field(default_factory=dict)


def decide(value: float, low: float, high: float, *, floor: float, smallest: float) -> str:
    """The three-way rule of one part; a number that is not defined is inconclusive."""
    if not np.isfinite([value, low, high]).all():
        return INCONCLUSIVE
    if low > floor and value >= smallest:
        return SUPPORTED
    return NOT_SUPPORTED if high < smallest else INCONCLUSIVE


def combine(verdicts: Sequence[str]) -> str:
    """All supported: supported; one not supported: not supported; otherwise inconclusive."""
    if not verdicts:
        return NOT_RUN
    if all(v == SUPPORTED for v in verdicts):
        return SUPPORTED
    return NOT_SUPPORTED if NOT_SUPPORTED in verdicts else INCONCLUSIVE


# ---- the numbers of each claim ---------------------------------------------------------------------------------------

Found = tuple[dict[str, tuple[float, float, float]], dict[str, Any]]


def _numbers(estimate: Estimate) -> tuple[float, float, float]:
    return float(estimate.value), float(estimate.low), float(estimate.high)


def _common(arms: dict[str, Table], names: Sequence[str]) -> list[Table]:
    """The arms with the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(arms[name].seeds) for name in names)))
    return [arms[name].of(seeds) for name in names]


def _estimate(statistic: st.Statistic, table: Table, draws: int) -> Estimate:
    return st.estimate(statistic, len(table.seeds), table.template, table.domain, draws=draws)


def _specialisation(arms: dict[str, Table], draws: int) -> Found:
    micro, random = _common(arms, ("micro", "random"))
    ours, control = st.accuracy(micro, matched=False), st.accuracy(random, matched=True)
    difference = _estimate(st.difference(ours, control), micro, draws)
    notes = {
        name: dict(zip(("value", "low", "high"), _numbers(_estimate(s, t, draws)), strict=True))
        for name, s, t in (("MiCRo", ours, micro), ("random labels, matched", control, random))
    }
    return {"accuracy above control": _numbers(difference)}, {"accuracy": notes}


def _ablation(arms: dict[str, Table], draws: int) -> Found:
    micro, random = _common(arms, ("micro", "random"))
    control = st.matched_index(random)
    found = _estimate(lambda w: st.index(st.rises(w, micro)), micro, draws)
    above = _estimate(lambda w: st.index(st.rises(w, micro)) - control(w), micro, draws)
    parts = _estimate(lambda w: st.contrasts(st.rises(w, micro)), micro, draws)
    table = st.rises(np.ones((1, len(micro.seeds), len(micro.tokens))), micro)[0]
    p = st.relabelling_p(table)
    worst = int(np.argmin(parts.high))
    # The part is judged by the contrast with the least upper bound: above the threshold is enough.
    bound = float(parts.high[worst])
    names = [f"row {n}" for n in NAMES] + [f"column {n}" for n in NAMES]
    notes = {
        "p of 24 relabellings": p,
        "relative rise [domain][ablated expert]": np.round(table, 4).tolist(),
        "contrasts": {
            n: [round(float(x[i]), 4) for x in (parts.value, parts.low, parts.high)] for i, n in enumerate(names)
        },
        "index by seed": [round(float(st.index(_one_seed(micro, s))), 4) for s in range(len(micro.seeds))],
    }
    return {
        "index": _numbers(found),
        "index above control": _numbers(above),
        "relabellings": (1 - p, 1 - p, 1.0),  # a large p is no evidence of absence: never "not supported"
        "no contrary row or column": (bound, bound, bound),
    }, notes


def _one_seed(table: Table, s: int) -> st.Array:
    return st.rises(np.ones((1, 1, len(table.tokens))), table.of([table.seeds[s]]))[0]


def _steering(arms: dict[str, Table], draws: int) -> Found:
    micro = arms["micro"]
    found = _estimate(lambda w: st.steering_contrasts(st.gains(w, micro, TARGETS), TARGETS), micro, draws)
    gain = st.gains(np.ones((1, len(micro.seeds), len(micro.tokens))), micro, TARGETS)[0]
    numbers = {
        f"towards {name}": (float(found.value[i]), float(found.low[i]), float(found.high[i]))
        for i, name in enumerate(TARGETS)
    }
    return numbers, {"gain in nats per token [domain][target]": np.round(gain, 4).tolist()}


def _localizers(arms: dict[str, Table], draws: int) -> Found:
    micro, random = _common(arms, ("micro", "random"))
    numbers: dict[str, tuple[float, float, float]] = {}
    assert random.matching is not None
    orders = [st.best_relabelling(counts) for counts in random.matching]
    for network, expert in LABELLED.items():
        place = NAMES.index(expert)
        own = st.share_contrast(micro.localizers[network], place)
        matched = np.stack([shares[list(o)] for shares, o in zip(random.localizers[network], orders, strict=True)])
        numbers[f"{network} -> {expert}"] = _numbers(st.seeds_estimate(own, draws=draws))
        above = own - st.share_contrast(matched, place)
        numbers[f"{network} above control"] = _numbers(st.seeds_estimate(above, draws=draws))
    notes = {
        "shares of experts": {n: np.round(s.mean(0), 4).tolist() for n, s in micro.localizers.items()},
        "theory_of_mind": "10 + 10 items: low power, printed and not judged",
    }
    return numbers, notes


def _non_inferiority(arms: dict[str, Table], draws: int) -> Found:
    numbers = {}
    for name in ("dense", "mob"):
        micro, other = _common(arms, ("micro", name))
        ours, theirs = st.mean_loss(micro), st.mean_loss(other)
        numbers[f"against {name}"] = _numbers(_estimate(st.difference(theirs, ours), micro, draws))
    losses = {name: _numbers(_estimate(st.mean_loss(table), table, draws)) for name, table in arms.items()}
    return numbers, {"held-out loss in nats per token": {n: [round(x, 4) for x in v] for n, v in losses.items()}}


def _stability(arms: dict[str, Table], draws: int) -> Found:
    numbers: dict[str, tuple[float, float, float]] = {}
    course: dict[str, dict[str, float]] = {}
    for arm, name in (("micro", "kappa"), ("straight_through", "kappa, straight-through")):
        table = arms[arm]
        template, domain = st.kept(table)
        counts = {
            snapshot: st.agreement_counts(table, "stage 2", snapshot)
            for snapshot in table.routes[0]["snapshots"]
            if snapshot != "stage 2"
        }
        ones = np.ones((1, len(table.seeds), len(template)))
        course[arm] = {snapshot: round(float(st.mean_kappa(c)(ones)[0]), 4) for snapshot, c in counts.items()}
        last, fresh = st.mean_kappa(counts["100 %"]), st.mean_kappa(counts["fresh router"])
        numbers[name] = _numbers(st.estimate(last, len(table.seeds), template, domain, draws=draws))
        if arm == "micro":
            above = st.difference(last, fresh)
            numbers["kappa above fresh router"] = _numbers(
                st.estimate(above, len(table.seeds), template, domain, draws=draws)
            )
    return numbers, {"kappa against the end of stage 2": course}


MEASURES: dict[str, Callable[[dict[str, Table], int], Found]] = {
    "specialisation": _specialisation,
    "ablation": _ablation,
    "steering": _steering,
    "localizers": _localizers,
    "non-inferiority": _non_inferiority,
    "stability": _stability,
}


def judge(rule: Rule, arms: dict[str, Table], draws: int) -> Claim:
    """One claim. "not run" where an arm is missing, or what it needs was not measured."""
    lacking = [name for name in rule.arms if name not in arms]
    if rule.claim == "localizers" and not lacking and not all(arms[name].localizers for name in rule.arms):
        lacking = ["localizers"]
    if rule.claim == "stability" and not lacking and not all(arms[name].routes[0] for name in rule.arms):
        lacking = ["routes"]
    if lacking:
        return Claim(rule.claim, rule.words, NOT_RUN, [], {"missing": lacking})
    numbers, notes = MEASURES[rule.claim](arms, draws)
    parts = [
        Part(name, *numbers[name], floor=floor, smallest=smallest) for name, (floor, smallest, _) in rule.parts.items()
    ]
    return Claim(rule.claim, rule.words, combine([part.verdict for part in parts]), parts, notes)


@dataclass
class Verdicts(Result):
    """The table of claims of one setup. preliminary: runs of the plan that are not there yet."""

    name: ClassVar[str] = "verdicts"

    setup: str
    plan: str
    claims: list[Claim]
    seeds: dict[str, list[int]]
    preliminary: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Verdicts:
        """The inverse of :meth:`to_dict`."""
        claims = [Claim(**{**c, "parts": [Part(**p) for p in c["parts"]]}) for c in content["claims"]]
        return cls(**{**content, "claims": claims})

    def table(self) -> pd.DataFrame:
        """One row per part."""
        import pandas as pd

        rows = [
            {
                "claim": claim.claim,
                "verdict": claim.verdict,
                "part": part.name,
                "value": part.value,
                "low": part.low,
                "high": part.high,
                "above": part.floor,
                "at least": part.smallest,
                "part's verdict": part.verdict,
            }
            for claim in self.claims
            for part in claim.parts
        ]
        rows += [{"claim": c.claim, "verdict": c.verdict} for c in self.claims if not c.parts]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Every part with its interval and thresholds."""
        from benchmarks.replication.figures import claims_figure

        return claims_figure(self)

    def __str__(self) -> str:
        head = f"{self.setup}: seeds " + ", ".join(f"{arm} {len(seeds)}" for arm, seeds in self.seeds.items())
        if self.preliminary:
            head += (
                f"\nPRELIMINARY: {len(self.preliminary)} planned runs are missing: {', '.join(self.preliminary[:6])}"
            )
        lines = [f"{c.verdict.upper():14} {c.claim}: {c.words}" for c in self.claims]
        return "\n".join([head, *lines, "", super().__str__()])


def verdicts(arms: dict[str, Table], *, setup: str, plan: str, draws: int, preliminary: Sequence[str] = ()) -> Verdicts:
    """Judge all claims from the runs of one setup."""
    return Verdicts(
        setup,
        plan,
        [judge(rule, arms, draws) for rule in RULES],
        {name: table.seeds for name, table in arms.items()},
        list(preliminary),
        {"draws": draws, "interval": "95 %, percentile; seeds crossed with templates, items in templates"},
    )


def rules_text() -> str:
    """The rules as a page, VERDICT_RULES.md."""
    lines = [
        "# Verdict rules",
        "",
        "Committed before any run; printed by `python -m benchmarks.replication rules` from `verdict.py`.",
        "",
        "A part is **supported** if its 95 % interval lies above *above* and its estimate reaches *at least*; **not "
        "supported** if the interval lies below *at least*; **inconclusive** otherwise. A claim is supported if all of "
        "its parts are, not supported if one of them is not, inconclusive otherwise. A claim that does not hold is "
        "reported so. Verdicts count only when all planned runs are there; before, they are printed as preliminary.",
        "",
        "Intervals: percentile bootstrap, 10,000 draws, over seeds, templates (within their domain) and items (within "
        "their template). All seeds see the same held-out items, so seeds and templates are crossed: one draw of "
        "templates is shared by all seeds, which is wider than drawing templates anew for each seed. Where two arms "
        "are compared, only seeds that both have count, and both get the same draws. Localizer shares have no "
        "templates: there the seeds alone are drawn, five of them, so these intervals are rough.",
        "",
    ]
    for rule in RULES:
        lines += [f"## {rule.claim}", "", f"{rule.words} Arms: {', '.join(rule.arms)}.", ""]
        lines += ["| part | above | at least | what |", "|---|---|---|---|"]
        lines += [f"| {n} | {floor:g} | {least:g} | {words} |" for n, (floor, least, words) in rule.parts.items()]
        lines.append("")
    lines += [
        "## What is not judged",
        "",
        "SmolLM2-135M has one seed: its numbers are printed beside, with intervals over templates and items, as a "
        "confirmation. The theory-of-mind localizer has 10 + 10 items: its shares are printed. MoE and MiCRo-MoE are "
        "measured in all respects that apply to them and stand in tables and figures.",
        "",
    ]
    return "\n".join(lines)
