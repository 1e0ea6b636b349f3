"""Verdicts of the replication on runs whose truth is planted; the exact relabelling test; kappa; matching."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.replication import estimates as st
from benchmarks.replication import verdict
from benchmarks.replication.verdict import INCONCLUSIVE, NOT_RUN, NOT_SUPPORTED, SUPPORTED, decide
from micro.experts import NAMES

TEMPLATES, ITEMS, TOKENS, LAYERS = 10, 4, 12, 2
DOMAIN = np.repeat(np.arange(4), TEMPLATES * ITEMS)
TEMPLATE = np.repeat(np.arange(4 * TEMPLATES), ITEMS)


def planted(arm: str, seed: int, *, effect: float, spread: float = 0.0, shift: float = 0.0) -> dict[str, Any]:
    """One run's file. effect: 0 = the labels mean nothing, 1 = they do; spread: by how much templates differ in it (the
    same for all seeds); shift: nats per token on top of the loss.
    """
    rng = np.random.default_rng([len(arm), seed])
    by_template = np.random.default_rng(99).normal(size=(4 * TEMPLATES, 12))[
        TEMPLATE
    ]  # of each template, per condition
    base = 2.0 + shift + 0.3 * by_template[:, 11] + 0.02 * rng.normal(size=len(DOMAIN))
    loss = {"none": base}
    for e, name in enumerate(NAMES):
        rise = 0.4 * effect * (e == DOMAIN) + 0.05 + spread * by_template[:, e]
        loss[f"without {name}"] = base + rise + 0.002 * rng.normal(size=len(DOMAIN))
    for t, name in enumerate(NAMES[:3]):
        own = np.where(t == DOMAIN, 0.0, 0.3 * effect * (DOMAIN < 3))
        loss[f"towards {name}"] = base + own + spread * by_template[:, 4 + t] + 0.002 * rng.normal(size=len(DOMAIN))
    right = 0.25 + 0.5 * effect + spread * by_template[:, 7]
    routed = _routed(DOMAIN, np.clip(right, 0.0, 1.0), rng)
    matching = np.zeros((4, LAYERS, 4))
    np.add.at(matching, DOMAIN, routed)
    return {
        "plan": "p",
        "setup": "own",
        "arm": arm,
        "seed": seed,
        "items": {"domain": DOMAIN.tolist(), "template": [f"t{t}" for t in TEMPLATE], "tokens": [TOKENS] * len(DOMAIN)},
        "loss": {name: (TOKENS * values).tolist() for name, values in loss.items()},
        "routed": routed.tolist(),
        "matching": matching.tolist(),
        "localizers": {
            "language": {"counts": _counts(3, effect, rng, spread)},
            "multiple_demand": {"counts": _counts(0, effect, rng, spread)},
        },
        "routes": _routes(rng, np.clip(0.95 * effect + spread * by_template[:, 8], 0, 1)),
    }


def _routed(domain: Any, share: Any, rng: Any) -> Any:
    out = np.zeros((len(domain), LAYERS, 4), int)
    for i, d in enumerate(domain):
        p = np.full(4, (1 - share[i]) / 3)
        p[d] = share[i]
        out[i] = rng.multinomial(TOKENS, p / p.sum(), size=LAYERS)
    return out


def _counts(expert: int, effect: float, rng: Any, spread: float) -> list[list[int]]:
    counts = np.full(4, 100.0) + 30 * spread * rng.normal(size=4) * 10
    counts[expert] += 200 * effect
    return np.tile(np.maximum(counts, 1).astype(int), (LAYERS, 1)).tolist()


def _routes(rng: Any, same: Any) -> dict[str, Any]:
    items = list(range(0, len(DOMAIN), ITEMS))
    start = rng.integers(0, 4, size=(LAYERS, len(items) * TOKENS))
    keep = rng.random(start.shape) < np.repeat(same[items], TOKENS)
    later = np.where(keep, start, rng.integers(0, 4, size=start.shape))
    fresh = rng.integers(0, 4, size=start.shape)
    text = {"stage 2": start, "100 %": later, "fresh router": fresh}
    return {
        "items": items,
        "tokens": [TOKENS] * len(items),
        "snapshots": {name: ["".join(map(str, row)) for row in rows] for name, rows in text.items()},
    }


def runs(*, effect: float, spread: float = 0.0, worse: float = 0.0) -> list[dict[str, Any]]:
    found = [planted("micro", s, effect=effect, spread=spread, shift=worse) for s in range(5)]
    found += [planted("random", s, effect=0.0, spread=spread) for s in range(5)]
    found += [planted("straight_through", s, effect=effect, spread=spread) for s in range(3)]
    found += [planted(arm, s, effect=0.0, spread=spread) for arm in ("dense", "mob") for s in range(3)]
    return found


def judged(found: list[dict[str, Any]], draws: int = 400) -> dict[str, str]:
    result = verdict.verdicts(st.tables(found), setup="own", plan="p", draws=draws)
    return {claim.claim: claim.verdict for claim in result.claims}


def test_a_planted_effect_is_supported() -> None:
    assert set(judged(runs(effect=1.0)).values()) == {SUPPORTED}


def test_no_effect_is_not_supported() -> None:
    assert set(judged(runs(effect=0.0, worse=0.1)).values()) == {NOT_SUPPORTED}


def test_noise_is_inconclusive() -> None:
    found = judged(runs(effect=0.06, spread=0.35))
    for claim in ("specialisation", "ablation", "steering"):
        assert found[claim] == INCONCLUSIVE, found
    # Losses that differ by template and seed far more than the margin.
    noisy = runs(effect=1.0)
    for run in noisy:
        jump = np.random.default_rng([7, len(run["arm"]), run["seed"]]).normal(size=(4 * TEMPLATES))[TEMPLATE]
        run["loss"]["none"] = (np.array(run["loss"]["none"]) + 6 * TOKENS * jump).tolist()
    assert judged(noisy)["non-inferiority"] == INCONCLUSIVE


def test_what_is_missing_is_not_run_and_preliminary_is_said() -> None:
    some = [run for run in runs(effect=1.0) if run["arm"] in ("micro", "random")]
    result = verdict.verdicts(st.tables(some), setup="own", plan="p", draws=100, preliminary=["own-dense-s0"])
    found = {claim.claim: claim.verdict for claim in result.claims}
    assert found["non-inferiority"] == found["stability"] == NOT_RUN
    assert found["specialisation"] == SUPPORTED
    assert "PRELIMINARY: 1 planned runs are missing: own-dense-s0" in str(result)


def test_the_rules_of_one_part() -> None:
    given = {"floor": 0.0, "smallest": 0.05}
    assert decide(0.1, 0.01, 0.2, **given) == SUPPORTED
    assert decide(0.1, -0.01, 0.2, **given) == INCONCLUSIVE  # the interval holds 0
    assert decide(0.04, 0.03, 0.06, **given) == INCONCLUSIVE  # above 0, but perhaps too small
    assert decide(0.03, 0.02, 0.04, **given) == NOT_SUPPORTED  # above 0, and too small
    assert decide(-0.1, -0.2, 0.01, **given) == NOT_SUPPORTED
    assert decide(float("nan"), 0.0, 1.0, **given) == INCONCLUSIVE
    # Non-inferiority: the loss of the other minus ours, margin 0.02.
    margin = {"floor": -0.02, "smallest": -0.02}
    assert decide(-0.01, -0.019, 0.0, **margin) == SUPPORTED
    assert decide(-0.01, -0.021, 0.0, **margin) == INCONCLUSIVE
    assert decide(-0.05, -0.08, -0.03, **margin) == NOT_SUPPORTED
    assert verdict.combine([SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE]) == NOT_SUPPORTED
    assert verdict.combine([SUPPORTED, INCONCLUSIVE]) == INCONCLUSIVE
    assert verdict.combine([]) == NOT_RUN


def test_relabellings_are_exact() -> None:
    assert sorted(st.RELABELLINGS) == sorted(permutations(range(4)))
    rise = np.random.default_rng(3).normal(size=(4, 4))

    def by_hand(order: Any) -> float:
        rows = [rise[d, order[d]] - np.mean([rise[d, e] for e in range(4) if e != order[d]]) for d in range(4)]
        return float(np.mean(rows))

    for order in permutations(range(4)):
        assert st.index(rise, order) == pytest.approx(by_hand(order))
    beaten = sum(by_hand(order) >= by_hand((0, 1, 2, 3)) - 1e-12 for order in permutations(range(4)))
    assert st.relabelling_p(rise) == pytest.approx(beaten / 24)
    assert st.relabelling_p(np.eye(4)) == pytest.approx(1 / 24)
    assert st.relabelling_p(np.ones((4, 4))) == 1.0
    assert st.relabelling_p(-np.eye(4)) == 1.0


def test_rows_and_columns() -> None:
    rise = np.random.default_rng(4).normal(size=(4, 4))
    found = st.contrasts(rise)
    for d in range(4):
        assert found[d] == pytest.approx(rise[d, d] - np.mean(np.delete(rise[d], d)))
        assert found[4 + d] == pytest.approx(rise[d, d] - np.mean(np.delete(rise[:, d], d)))
    assert found[:4].mean() == pytest.approx(found[4:].mean()) == pytest.approx(st.index(rise))
    # An expert that every domain needs is contradicted by its column, although its own row is fine.
    needed = np.eye(4) * 0.1
    needed[:, 3] = [0.5, 0.5, 0.5, 0.2]
    assert st.contrasts(needed)[3] > 0 > st.contrasts(needed)[7]


def test_the_control_is_matched_on_training_answers() -> None:
    run = planted("random", 0, effect=1.0)
    order = (2, 0, 3, 1)  # expert of each domain, had the labels been these
    routed = np.array(run["routed"])
    run["routed"] = routed[..., np.argsort(order)].tolist()
    run["matching"] = np.array(run["matching"])[..., np.argsort(order)].tolist()
    table = st.tables([run])["random"]
    assert st.best_relabelling(table.matching[0]) == order
    ones = np.ones((1, 1, len(DOMAIN)))
    plain = st.tables([planted("random", 0, effect=1.0)])["random"]
    assert st.accuracy(table, matched=True)(ones)[0] == pytest.approx(st.accuracy(plain, matched=False)(ones)[0])
    assert st.accuracy(table, matched=False)(ones)[0] < 0.2
    # The same for the ablation index: what expert order[d] does counts as domain d's.
    shuffled = {f"without {NAMES[order[d]]}": run["loss"][f"without {NAMES[d]}"] for d in range(4)}
    run["loss"] = {**run["loss"], **shuffled}
    moved = st.tables([run])["random"]
    own = st.index(st.rises(ones, plain))
    assert st.matched_index(moved)(ones)[0] == pytest.approx(own[0])
    assert own[0] > 0.1 > st.index(st.rises(ones, moved))[0]


def test_kappa() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    b[:300] = a[:300]
    counts = np.zeros((4, 4))
    np.add.at(counts, (a, b), 1)
    chance = sum((a == e).mean() * (b == e).mean() for e in range(4))
    assert st.kappa(counts) == pytest.approx(((a == b).mean() - chance) / (1 - chance))
    assert st.kappa(np.diag([5.0, 3, 2, 1])) == pytest.approx(1.0)
    assert np.isnan(st.kappa(np.diag([9.0, 0, 0, 0])))
    # A layer that sends everything to one expert has no kappa and counts for nothing.
    both = np.stack([np.diag([5.0, 3, 2, 1]), np.diag([9.0, 0, 0, 0])])[None, None]
    assert st.mean_kappa(both)(np.ones((1, 1, 1)))[0] == pytest.approx(1.0)


def test_seeds_share_their_templates() -> None:
    """Whatever differs by template only is not made certain by more seeds."""
    value = np.random.default_rng(1).normal(size=4 * TEMPLATES)[TEMPLATE]

    def width(seeds: int) -> float:
        found = st.estimate(
            lambda w: np.einsum("dsi,i->d", w, value) / w.sum((1, 2)),
            seeds,
            list(map(str, TEMPLATE)),
            DOMAIN,
            draws=2000,
        )
        return float(found.high - found.low)

    assert width(5) == pytest.approx(width(1), rel=0.15)


def test_results_are_saved_drawn_and_read(tmp_path: Path) -> None:
    arms = st.tables(runs(effect=1.0))
    result = verdict.verdicts(arms, setup="own", plan="p", draws=200)
    result.save(tmp_path)
    again = verdict.Verdicts.load(tmp_path)
    assert again.to_dict() == result.to_dict()
    assert (tmp_path / "verdicts.csv").read_text().count("\n") == 1 + sum(len(rule.parts) for rule in verdict.RULES)
    pytest.importorskip("matplotlib")
    from benchmarks.replication import figures

    paths = figures.draw(arms, again, tmp_path / "figures")
    assert [path.name for path in paths] == ["claims.png", "routing.png", "ablation.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_mixed_runs_are_refused() -> None:
    found = runs(effect=0.0)
    with pytest.raises(ValueError, match="different plans"):
        st.tables([*found, {**found[0], "plan": "q"}])
    with pytest.raises(ValueError, match="different items"):
        st.tables([*found, {**found[0], "items": {**found[0]["items"], "tokens": [1]}}])


def test_the_committed_rules_are_the_code() -> None:
    page = Path(verdict.__file__).with_name("VERDICT_RULES.md")
    assert page.read_text(encoding="utf-8") == verdict.rules_text(), "run: python -m benchmarks.replication rules"
