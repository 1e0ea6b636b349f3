"""Ablation reports on planted tasks: what was put in comes out, with the uncertainty that it has."""

import numpy as np
import pytest
import torch
from planted_suites import Planted, model

import micro
from micro import analysis
from micro.analysis.ablations.scores import (
    INTACT,
    Condition,
    Scores,
    ScoreStore,
    all_sets,
    model_fingerprint,
    ratio_error,
    score,
)
from micro.analysis.ablations.statistics import items_are_right_or_wrong, paired_errors
from micro.analysis.suites import NATS, SHARE, traits
from micro.experts import NAMES

COST = dict(zip(NAMES, (3.0, 1.0, 0.0, -0.5), strict=True))


def loss(gone, record):
    """2 nats, more for each expert removed everywhere; records differ among each other."""
    return 2 + record / 10 + sum(COST[name] for e, name in enumerate(NAMES) if gone[:, e].all())


def test_every_set_is_scored_once_and_rises_by_what_was_planted():
    suite = Planted(loss, names=["a", "b"])
    report = analysis.ablation(model(), suite, "all", draws=200)
    assert len(report.conditions) == 15 and report.conditions[0] == "none"
    assert len(suite.calls) == 15
    for r in range(2):
        for names, rise in zip(report.members, report.rise[r], strict=True):
            assert rise == pytest.approx(sum(COST[name] for name in names))
    assert np.allclose(report.rise_interval[0], np.asarray(report.rise[0])[:, None])  # the same for every record


def test_sets_are_all_proper_subsets():
    sets = all_sets(NAMES)
    assert len(sets) == len(set(sets)) == 14 and all(1 <= len(s) <= 3 for s in sets)
    with pytest.raises(ValueError, match="510 sets"):
        all_sets([str(i) for i in range(9)])


def answers(right):
    """A task of single answers; ``right(gone, record) -> bool``."""
    return Planted(lambda gone, record: float(right(gone, record)), records=200, higher_is_better=True, chance=0.25)


def test_choices_are_compared_by_mcnemar_and_reported_in_points():
    def right(gone, record):
        if gone[:, 0].all():
            return record < 100  # loses 40 answers, wins none
        return record < 140

    lines = {line["ablated"]: line for line in analysis.ablation(model(), answers(right), draws=500).claims}
    line = lines["logic"]
    assert line["test"] == "exact McNemar" and line["unit"] == "points"
    assert line["change"] == pytest.approx(-20) and line["intact"] == pytest.approx(70)
    assert line["p"] == pytest.approx(2 * 0.5**40)
    assert line["p_holm"] == pytest.approx(4 * line["p"])  # a family of four
    assert line["low"] < -20 < line["high"] < 0
    # Standard errors by hand: sd / sqrt(n), of scores and of paired differences.
    assert line["intact_se"] == pytest.approx(100 * np.std([1] * 140 + [0] * 60, ddof=1) / 200**0.5)
    assert line["se"] == pytest.approx(100 * np.std([1] * 40 + [0] * 160, ddof=1) / 200**0.5)
    assert line["published_se"] == pytest.approx(np.hypot(line["intact_se"], line["score_se"]))
    assert line["se"] < line["published_se"] and line["p"] < line["published_p"] < 1e-4
    assert line["published_stars"] == "****"
    for name in ("social", "world", "language"):
        assert lines[name]["p"] == lines[name]["p_holm"] == 1 and lines[name]["published_stars"] == ""


def test_holm_has_one_family_per_table():
    report = analysis.ablation(model(), [answers(lambda gone, record: not gone[0, 0] or record > 9)] * 2, draws=100)
    shown = [line for line in report.claims if line["ablated"] == "logic"]
    assert [line["task"] for line in shown] == ["1 score: row", "2 score: row", "Average"]
    assert len(report.claims) == 12
    smallest = min(line["p"] for line in report.claims)
    assert min(line["p_holm"] for line in report.claims) == pytest.approx(12 * smallest)


def test_the_average_has_independent_errors_and_the_published_one_mean_errors():
    suites = [answers(lambda gone, record, k=k: record < 100 + k - 20 * gone[0, 2]) for k in (0, 40)]
    report = analysis.ablation(model(), suites, draws=100)
    first, second, mean = (line for line in report.claims if line["ablated"] == "world")
    assert mean["task"] == "Average" and mean["change"] == pytest.approx(-10)
    assert mean["se"] == pytest.approx(np.hypot(first["se"], second["se"]) / 2)
    old = [(line["intact_se"], line["score_se"]) for line in (first, second)]
    assert mean["published_se"] == pytest.approx(np.hypot(*np.mean(old, 0)))
    assert mean["records"] == 400


def test_a_task_of_several_rows_is_one_task_of_the_average_and_its_joint_row_does_not_count():
    def right(gone, record):
        one, two = record < 100 - 40 * gone[0, 0], record < 60
        return np.array([one, two, one and two], float)

    several = Planted(right, names=["one", "two", "both"], records=200, higher_is_better=True, joint=2)
    report = analysis.ablation(model(), [several, answers(lambda gone, record: record < 100)], ["logic"], draws=50)
    assert [line["task"] for line in report.claims] == ["one", "two", "both", "row", "Average"]
    mean = report.claims[-1]
    assert mean["intact"] == pytest.approx((40 + 50) / 2) and mean["change"] == pytest.approx(-10 / 2)
    pooled = np.r_[np.full(40, -1.0), np.zeros(160)] / 2  # one of two items of a record
    assert mean["se"] == pytest.approx(100 * pooled.std(ddof=1) / 200**0.5 / 2)


def test_losses_are_compared_by_a_bootstrap_over_records_not_items():
    generator = np.random.default_rng(0)
    effect = generator.normal(0.3, 0.4, size=40)
    lines = []
    for items in (1, 50):  # more tokens of the same records are no more records
        suite = Planted(lambda gone, record: effect[record] * gone[0, 1], records=40, items=items)
        lines.append(next(x for x in analysis.ablation(model(), suite, seed=1).claims if x["ablated"] == "social"))
    assert lines[0]["test"] == "sign flips" and lines[0]["items"] == 40 and lines[1]["items"] == 2000
    for name in ("change", "se", "low", "high", "p", "p_bootstrap"):
        assert lines[0][name] == pytest.approx(lines[1][name])
    assert lines[0]["se"] == pytest.approx(effect.std(ddof=1) / 40**0.5)
    assert lines[0]["low"] == pytest.approx(effect.mean() - 1.96 * lines[0]["se"], abs=0.02)
    assert lines[0]["p_bootstrap"] == pytest.approx(1 / 10_001)
    assert lines[0]["p"] < 5e-4


@pytest.mark.parametrize("records", [6, 40])
def test_the_paired_tests_reject_as_often_as_they_say_where_nothing_is_planted(records):
    generator = np.random.default_rng(3)
    rejected = {"sign flips": 0, "exact McNemar": 0, "bootstrap": 0}
    for _ in range(150):
        noise = generator.normal(size=(5, records))
        for x in (noise, (noise > 0) * 1.0):
            suite = Planted(lambda gone, record, x=x: x[int(gone[0] @ [1, 2, 3, 4]), record], records=records)
            line = analysis.ablation(model(), suite, ["logic"], draws=400).claims[0]
            rejected[line["test"]] += line["p"] <= 0.05
            rejected["bootstrap"] += line["test"] == "sign flips" and line["p_bootstrap"] <= 0.05
    assert 1 <= rejected["sign flips"] <= 17  # 7.5 expected; three standard errors
    assert rejected["exact McNemar"] <= 15  # at most 7.5 expected
    assert (rejected["bootstrap"] > 17) == (records == 6)  # why it is not the test


def test_the_error_of_a_ratio_is_that_of_resampling():
    generator = np.random.default_rng(5)
    counts = generator.integers(0, 9, size=(80, 1)).astype(float)
    sums = counts * generator.normal(2, 1, size=(80, 1)) + generator.normal(size=(80, 1)) * (counts > 0)
    weights = generator.multinomial(80, [1 / 80] * 80, size=4000)
    drawn = (weights @ sums)[:, 0] / (weights @ counts)[:, 0]
    assert ratio_error(sums, counts)[0] == pytest.approx(drawn.std(), rel=0.08)


def test_rows_that_some_records_lack_are_left_out_of_their_row_only():
    suite = Planted(loss, names=["a", "b", "nothing"])
    original = suite.score

    def some(model, controls):
        sums, counts = original(model, controls)
        sums[:4, 0] = counts[:4, 0] = sums[:, 2] = counts[:, 2] = 0
        return sums, counts

    suite.score = some
    report = analysis.ablation(model(), suite, draws=100)
    assert report.rows == ["a", "b"] and report.items == [6, 10]
    assert [line["records"] for line in report.claims] == [6] * 4 + [10] * 4
    assert report.score[0][0] == pytest.approx(2 + np.mean(range(4, 10)) / 10)


# ---------------------------------------------------------------- best ablation
def test_the_best_ablation_of_noise_is_optimistic_on_the_test_and_honest_on_validation():
    generator = np.random.default_rng(1)
    rises = {"validation": [], "the test itself": []}
    for seed in range(60):
        noise = generator.normal(size=(5, 40))
        suite = Planted(lambda gone, record, x=noise: x[int(gone[0] @ [1, 2, 3, 4]), record], records=40)
        for line in analysis.ablation(model(), suite, validation=0.5, draws=2, seed=seed).best:
            assert line["optimistic"] == (line["chosen_on"] == "the test itself")
            rises[line["chosen_on"]].append(line["change"])
    error = np.std(rises["validation"]) / 60**0.5
    assert abs(np.mean(rises["validation"])) < 3 * error  # nothing was planted
    assert np.mean(rises["the test itself"]) < -0.15  # a loss that seems to fall


def test_the_best_ablation_is_found_on_validation_suites():
    def right(gone, record, shift=0):
        return record < 100 + 30 * gone[0, 1] - 30 * gone[0, 0] - shift

    suite, validation = answers(right), answers(lambda gone, record: right(gone, record, 15))
    report = analysis.ablation(
        model(), suite, ["logic", "social", ["social", "world"]], validation=validation, draws=50
    )
    assert [(x["best"], x["optimistic"], x["change"]) for x in report.best] == [
        ("social", False, pytest.approx(15)), ("social", True, pytest.approx(15)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="same rows"):
        analysis.ablation(model(), suite, validation=Planted(loss, names=["other"]))
    with pytest.raises(ValueError, match="share"):
        analysis.ablation(model(), suite, validation=1.0)


# ---------------------------------------------------------------- scores kept
def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    def stops(gone, record):
        if gone[0, 3] and stop:
            raise KeyboardInterrupt
        return loss(gone, record)

    stop, conditions = True, [INTACT, *(Condition(name, (name,)) for name in NAMES)]
    suite = Planted(stops, fingerprint="v1")
    one = model()
    with pytest.raises(KeyboardInterrupt):
        score(one, [suite], conditions, store=ScoreStore(tmp_path), progress=False)
    assert len(list(tmp_path.glob("*.npz"))) == 4
    stop = False
    suite.calls.clear()
    [scores] = score(one, [suite], conditions, store=ScoreStore(tmp_path))
    assert suite.calls == [{"ablate": ["language"]}]
    assert len(list(tmp_path.glob("*.npz"))) == 5 and not list(tmp_path.glob(".*"))
    suite.calls.clear()
    [again] = score(one, [suite], conditions, store=ScoreStore(tmp_path))
    assert not suite.calls and np.array_equal(again.sums, scores.sums)


def test_other_items_controls_routes_or_models_are_other_scores():
    store, suite = ScoreStore(), Planted(loss, fingerprint="v1")
    one, two = model(), model()
    keys = [
        store.key(store.about(m, [s])[0], controls, routes)
        for m, s, controls, routes in (
            (one, suite, {}, "free"), (two, suite, {}, "free"), (one, Planted(loss, fingerprint="v2"), {}, "free"),
            (one, suite, {"bias": {"logic": 1.0}}, "free"), (one, suite, {}, "replayed"),
            (one, suite, {"ablate": ["logic"]}, "free"), (one, suite, {"ablate": {0: ["logic"]}}, "free"),
        )
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert store.key(store.about(one, [suite])[0], {}, "free") == keys[0]


def test_a_suite_without_fingerprint_is_not_kept_on_disk(tmp_path):
    with pytest.raises(ValueError, match=r"no \.fingerprint"):
        analysis.ablation(model(), Planted(loss), store=ScoreStore(tmp_path))


def test_a_foreign_file_among_the_scores_is_named(tmp_path):
    suite, one = Planted(loss, fingerprint="v1"), model()
    store = ScoreStore(tmp_path)
    score(one, [suite], [INTACT], store=store)
    [file] = tmp_path.glob("*.npz")
    for wrong in (b"something else", file.read_bytes()[:40]):
        file.write_bytes(wrong)
        store._kept.clear()
        with pytest.raises(ValueError, match=file.name):
            score(one, [suite], [INTACT], store=store)


def test_controls_are_compared_by_content():
    from micro.analysis.fingerprints import comparable

    def bias(x):
        return {"bias": torch.tensor(x)}

    assert comparable(bias(1.0)) == comparable(bias(1.0)) != comparable(bias(1.0 + 1e-7))
    phases = micro.steering.Phases(prompt="logic", answer="social")
    assert comparable({"force": phases}) != comparable({"force": micro.steering.Phases(prompt="logic", answer="world")})
    with pytest.raises(TypeError, match="cannot be compared between runs"):
        comparable({"bias": lambda row, step: 0})


def test_what_is_open_around_a_model_is_part_of_the_key(tmp_path):
    from small_models import small_model

    from micro import interventions as iv

    one, suite = small_model(), Planted(loss, fingerprint="v1")
    store, disk = ScoreStore(), ScoreStore(tmp_path)
    plain = store.about(one, [suite])
    with micro.steering.ablate("logic"):
        steered = store.about(one, [suite])
    with micro.steering.ablate("social"):
        assert plain != steered != store.about(one, [suite])
    with one.intervene(iv.zero("heads", layers=0)):
        assert store.about(one, [suite]) != plain
        with pytest.raises(ValueError, match="close the block, or keep no folder"):
            disk.about(one, [suite])
    assert store.about(one, [suite]) == plain


# ---------------------------------------------------------------- what is refused, what a suite says
def test_items_that_change_with_the_condition_are_refused():
    suite = Planted(loss)
    original = suite.score

    def fewer(model, controls):
        sums, counts = original(model, controls)
        return sums, counts * (0.5 if controls else 1)

    suite.score = fewer
    with pytest.raises(ValueError, match="number of items differs"):
        analysis.ablation(model(), suite)


def test_scores_of_another_shape_are_refused_and_not_kept(tmp_path):
    suite = Planted(loss, names=["a", "b"], fingerprint="v1")
    original, suite.names = suite.score, ["a"]

    def wide(model, controls):
        suite.names = ["a", "b"]
        try:
            return original(model, controls)
        finally:
            suite.names = ["a"]

    suite.score = wide
    with pytest.raises(ValueError, match=r"under 'none', expected .* = \[10, 1\]"):
        analysis.ablation(model(), suite, store=ScoreStore(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_control_that_conditions_set_is_refused():
    with pytest.raises(ValueError, match="controls: ablate"):
        analysis.ablation(model(), Planted(loss), controls={"ablate": "logic"})
    with pytest.raises(ValueError, match='"all"'):
        analysis.ablation(model(), Planted(loss), "logic")
    with pytest.raises(ValueError, match="no two experts"):
        analysis.ablation(model(experts=["one"]), Planted(loss))


def test_sets_are_named_in_any_way_and_checked_before_anything_is_scored():
    suite = Planted(loss)
    report = analysis.ablation(model(), suite, ["ToM", ["language", "logic"], [0, "MD"]], draws=10)
    assert report.conditions == ["none", "social", "logic+language", "logic"]
    suite.calls.clear()
    for wrong, message in (([[]], "removes 0 of 4"), ([NAMES], "removes 4 of 4"), (["socail"], "unknown expert")):
        with pytest.raises(ValueError, match=message):
            analysis.ablation(model(), suite, wrong)
    assert not suite.calls


def test_a_task_belongs_to_the_expert_that_it_names():
    task = Planted(lambda gone, record: 1.0 - gone[0, 1], names=["stories"], domain="social", higher_is_better=True)
    assert analysis.ablation(model(), task, draws=10).own_domain_is_worst == {"stories": True}
    task.domain = "world"
    assert analysis.ablation(model(), task, draws=10).own_domain_is_worst == {"stories": False}


def test_any_change_of_the_weights_is_another_model():
    def two(seed=0):
        torch.manual_seed(seed)
        return torch.nn.ModuleDict({"blocks": torch.nn.Linear(3, 8), "gain": torch.nn.LayerNorm(3)})

    plain = model_fingerprint(two())
    assert plain == model_fingerprint(two()) != model_fingerprint(two(1))
    for dtype in (torch.bfloat16, torch.float64):
        assert model_fingerprint(two().to(dtype)) != plain
    swapped = two()
    with torch.no_grad():
        swapped["blocks"].weight.copy_(swapped["blocks"].weight[[0, 1, 2, 3, 4, 5, 7, 6]])  # two experts exchanged
    assert model_fingerprint(swapped) != plain
    nudged = two()
    with torch.no_grad():
        nudged["gain"].weight[1].nextafter_(torch.tensor(2.0))
    assert model_fingerprint(nudged) != plain


def test_what_suites_say_about_themselves():
    plain = traits(Planted(loss, names=["a", "b"]), model(vocab_size=50))
    assert (plain.task, plain.unit, plain.sign, plain.factor) == ("loss", NATS, -1, 1)
    assert plain.chance == pytest.approx((np.log(50),) * 2)
    choice = traits(answers(loss))
    assert (choice.task, choice.unit, choice.sign, choice.factor, choice.chance) == ("score", SHARE, 1, 100, (0.25,))
    assert np.isnan(traits(Planted(loss, higher_is_better=True)).chance[0])


def test_only_single_right_or_wrong_answers_are_mcnemar_items():
    def scores(sums, counts):
        suite = Planted(loss, records=len(counts))
        sums = np.asarray(sums, float)[..., None]
        return Scores(suite, traits(suite), [], sums, np.asarray(counts, float)[:, None])

    assert items_are_right_or_wrong(scores([[1, 0, 0], [0, 0, 0]], [1, 1, 0]), 0)
    assert not items_are_right_or_wrong(scores([[1, 0.5], [0, 1]], [1, 1]), 0)
    assert not items_are_right_or_wrong(scores([[1, 2], [0, 1]], [1, 2]), 0)
    assert paired_errors(scores([[1, 0], [0, 0]], [1, 1]))[1, 0] == pytest.approx(0.5)


def test_a_report_reads_back_and_says_whose_ablation_is_worst(tmp_path):
    def own(gone, record):
        return np.array([gone[0, 0] * 1.0, gone[0, 1] * 0.5 + gone[0, 2] * 0.7])

    report = analysis.ablation(model(), Planted(own, names=["logic", "social"]), "all", draws=50, validation=0.4)
    assert report.own_domain_is_worst == {"logic": True, "social": False}
    report.save(tmp_path)
    assert analysis.AblationReport.load(tmp_path) == report
    assert {p.name for p in tmp_path.iterdir()} == {
        "ablation.json", "ablation.csv", "ablation_tests.csv", "ablation_best.csv"
    }  # fmt: skip
    shares = Planted(lambda gone, record: 1 - own(gone, record) / 4, names=report.rows, higher_is_better=True)
    better = analysis.ablation(model(), shares, draws=50)
    assert better.own_domain_is_worst == {"logic": True, "social": False}
    assert {len(report.plot().axes), len(report.plot("bars").axes)} == {1, 2}
    with pytest.raises(ValueError, match="kind"):
        report.plot("pie")
