"""Records of one template say less than as many independent ones, and the intervals know it."""

import numpy as np
import pytest
from planted_suites import Planted, model

from micro import analysis
from micro.analysis.ablations.scores import INTACT, Condition, Scores, score
from micro.analysis.ablations.statistics import drawn_means, row_groups, split_records
from micro.analysis.groups import record_groups
from micro.analysis.suites import label_names, traits
from micro.data import Record, Span, generate
from micro.experts import NAMES
from micro.modeling import MiCRoConfig
from micro.testing import tiny_tokenizer

TRUTH = 0.3  # nats that the loss of logic costs, on average over all templates there could be
TEMPLATES, EACH = 12, 8


def correlated(seed, *, grouped, between=0.4, within=0.1, **attributes):
    """Records of a template share most of what the ablation of logic costs them."""
    generator = np.random.default_rng(seed)
    template = np.repeat(np.arange(TEMPLATES), EACH)
    cost = TRUTH + between * generator.normal(size=TEMPLATES)[template] + within * generator.normal(size=len(template))
    groups = [[(f"template {t}",)] for t in template] if grouped else None
    return Planted(lambda gone, record: cost[record] * gone[0, 0], records=len(cost), groups=groups, **attributes)


def interval(suite, **options):
    [line] = analysis.ablation(model(), suite, ["logic"], **{"draws": 400, **options}).claims
    return line["low"], line["high"], line


def test_the_interval_over_templates_is_wider_and_covers_where_that_over_records_does_not():
    covered = {True: 0, False: 0}
    for seed in range(60):
        widths = {}
        for grouped in covered:
            low, high, _ = interval(correlated(seed, grouped=grouped), seed=seed)
            covered[grouped] += low <= TRUTH <= high
            widths[grouped] = high - low
        assert widths[True] > 1.8 * widths[False]
    assert covered[True] >= 51  # 57 of 60 at full coverage; twelve templates are few
    assert covered[False] <= 40


def test_one_record_a_group_is_the_bootstrap_over_records():
    suite = correlated(1, grouped=False)
    plain = interval(suite, draws=4000)
    suite.groups = [[(str(record),)] for record in range(suite.records)]
    alone = interval(suite, draws=4000)
    suite.groups = [[()] for _ in range(suite.records)]
    assert alone[:2] == pytest.approx(plain[:2], abs=0.02)
    assert interval(suite, draws=4000)[:2] == pytest.approx(alone[:2], abs=1e-12)


def test_the_result_says_what_was_resampled_and_the_paired_test_is_as_before():
    grouped = analysis.ablation(model(), correlated(0, grouped=True), ["logic"], draws=50)
    plain = analysis.ablation(model(), correlated(0, grouped=False), ["logic"], draws=50)
    assert grouped.settings["resampled"] == "groups of records (templates), and records in them"
    assert grouped.settings["groups"] == {"row": TEMPLATES}
    assert plain.settings["resampled"] == "records" and "groups" not in plain.settings
    for key in ("change", "se", "p", "p_holm", "published_p"):
        assert grouped.claims[0][key] == plain.claims[0][key]
    other = correlated(0, grouped=False, task="quiz")
    other.names = ["other"]
    both = analysis.ablation(model(), [correlated(0, grouped=True), other], ["logic"], draws=50)
    assert both.settings["resampled"].endswith("; of quiz records")
    values = analysis.expert_shapley(model(), correlated(0, grouped=True), draws=50)
    assert values.settings["groups"] == {"row": TEMPLATES}


def scores_of(groups, counts):
    suite = Planted(lambda gone, record: 1.0, records=len(counts), groups=groups)
    [found] = score(model(), [suite], [INTACT, Condition("logic", ("logic",))])
    shaped = np.asarray(counts, float)[:, None]
    return Scores(suite, traits(suite), found.conditions, found.sums * shaped, shaped, groups)


def test_a_record_of_two_templates_counts_half_in_each_and_one_without_items_not_at_all():
    scores = scores_of([[("a",)], [("a", "b")], [()], [("b",)]], [1, 1, 1, 0])
    record, group, share = row_groups(scores, 0)
    assert record.tolist() == [0, 1, 1, 2]
    assert group.tolist() == [0, 0, 1, 2]
    assert share.tolist() == [1, 0.5, 0.5, 1]
    assert drawn_means(scores, draws=30).shape == (30, 2, 1)
    assert np.allclose(drawn_means(scores, draws=30), 1)
    assert np.isnan(drawn_means(scores_of([[("a",)]], [0]), draws=3)).all()


def test_halves_of_the_records_keep_their_groups():
    scores = scores_of([[(str(record),)] for record in range(6)], range(1, 7))
    for half in split_records(scores, 0.5, seed=0):
        assert [names[0][0] for names in half.groups] == [str(int(n) - 1) for n in half.counts[:, 0]]
    report = analysis.ablation(model(), correlated(0, grouped=True), ["logic"], validation=0.5, draws=50)
    assert len(report.best) == 2


def test_generated_answers_are_grouped_by_the_templates_of_each_label():
    records = generate(40, split="test", seed=3)
    suite = analysis.LossSuite(records, tiny_tokenizer())
    for record, groups in zip(records, suite.groups, strict=True):
        assert [name for names in groups for name in names] == sorted(
            record.meta["templates"],
            key=lambda name: (NAMES.index(name.split(".")[0]), record.meta["templates"].index(name)),
        )
        for row, names in enumerate(groups):
            assert all(name.startswith(f"{NAMES[row]}.") for name in names)


def test_groups_of_other_records():
    spans = [Span(0, 3, "MD"), Span(3, 6, "ToM")]

    def record(**meta):
        return Record("Why?", "so that", spans, meta=meta)

    assert record_groups([record(), record(templates=[])]) is None
    assert record_groups([record(templates=["x", "y"])]) == [[("x",), ("y",), (), ()]]
    assert record_groups([record(templates=["x"]), record()]) == [[("x",)] * 4, [()] * 4]
    assert record_groups([record(group=7)]) == [[("7",)] * 4]
    assert record_groups([record(templates="x")]) is None


def test_groups_of_the_wrong_shape_are_refused():
    suite = Planted(lambda gone, record: 1.0, records=3, groups=[[("a",)]] * 2)
    with pytest.raises(ValueError, match="groups must hold names for each of 3 records and 1 rows"):
        analysis.ablation(model(), suite, draws=10)


@pytest.mark.parametrize("names", [["logic", "social", "wrold"], ["expert_0"] * 5, []])
def test_names_of_other_rows_than_the_labels_are_refused(names):
    with pytest.raises(ValueError, match=f"names holds {len(names)}, expected 4"):
        analysis.LossSuite(generate(2, seed=3), tiny_tokenizer(), names=names)


def test_rows_are_named_after_experts_where_there_are_as_many():
    def config(names):
        return MiCRoConfig(num_experts=len(names), expert_names=names)

    assert label_names(config(["a", "b", "c", "d"])) == ["a", "b", "c", "d"]
    assert label_names(config(["a", "b", "c"])) is None
    suite = analysis.LossSuite(generate(2, seed=3), tiny_tokenizer(), names=label_names(config(["a", "b", "c", "d"])))
    assert suite.names == ["a", "b", "c", "d"]
