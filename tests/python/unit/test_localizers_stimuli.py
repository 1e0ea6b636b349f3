import importlib.metadata
import json
import sys

import pytest

from micro.analysis.localizers import find_stimuli, language, load_stimuli, multiple_demand, theory_of_mind
from micro.analysis.localizers import sentences as language_texts
from micro.analysis.localizers.stimuli import Stimuli, multiple_demand_sums
from micro.analysis.localizers.stories import BELIEFS, PHOTOGRAPHS, told
from micro.errors import MissingExtraError


def test_the_sums_begin_as_their_definition_says():
    hard, easy = multiple_demand_sums(100, 200), multiple_demand_sums(1, 20)
    assert [(a, b, a + b) for a, b, o in hard[:3] if o == "+"] == [(151, 192, 343), (171, 160, 331), (182, 186, 368)]
    assert easy[:3] == [(7, 15, "+"), (8, 7, "-"), (19, 11, "+")]
    assert [sum(o == "+" for *_, o in sums) for sums in (hard, easy)] == [56, 43]
    assert all(100 <= x < 200 for a, b, _ in hard for x in (a, b))
    assert {x for a, b, _ in easy for x in (a, b)} == set(range(1, 20))


def test_the_draws_are_masked_words_of_the_mersenne_twister():
    """The definition spelled out: 32-bit outputs, masked to the next power of two, rejected where too large."""
    from numpy.random import RandomState

    stream = RandomState(42)

    def below(n):
        mask = (1 << (n - 1).bit_length()) - 1
        while True:
            value = int(stream.randint(0, 2**32, dtype="uint32")) & mask
            if value < n:
                return value

    drawn = [(1 + below(19), 1 + below(19), "+-"[below(2)]) for _ in range(100)]
    assert drawn == multiple_demand_sums(1, 20)


def test_demand_texts():
    stimuli = multiple_demand()
    assert stimuli.positive[0] == "Question: Solve 151 + 192?\nAnswer: 343"
    assert stimuli.negative[1] == "Question: Solve 8 - 7?\nAnswer: 1"
    assert len(stimuli.positive) == len(stimuli.negative) == 100
    assert stimuli.pooling == "mean" and stimuli.max_tokens is None
    assert stimuli.distractors[0][0] == "Question: Copy 151 , 192?\nAnswer: 151"


def test_stories_have_their_parts_and_random_answers():
    stimuli = theory_of_mind(seed=0)
    assert len(stimuli.positive) == len(stimuli.negative) == 10
    for text in (*stimuli.positive, *stimuli.negative):
        instruction, story, question, answer = text.split("\n")
        assert story.startswith("Story: ") and question.startswith("Question: ")
        assert question.endswith(" Options: True, False") and answer in ("Answer: True", "Answer: False")
        assert "true or false" in instruction
    assert "low power" in stimuli.note and stimuli.pooling == "mean"
    assert theory_of_mind(seed=0) == stimuli != theory_of_mind(seed=1)
    answers = [text.split()[-1] for text in told(BELIEFS * 20, seed=3)]
    assert 60 < answers.count("True") < 140


def test_beliefs_and_photographs_are_matched_in_length():
    lengths = [sum(len(" ".join(s[:2]).split()) for s in stories) / 10 for stories in (BELIEFS, PHOTOGRAPHS)]
    assert abs(lengths[0] - lengths[1]) < 5
    assert len({s.setting for s in (*BELIEFS, *PHOTOGRAPHS)}) == 20
    assert all(s.noticed != s.unnoticed for s in (*BELIEFS, *PHOTOGRAPHS))


def test_own_sentences_and_non_words():
    said, nonsense = language_texts.generated(0)
    assert len(said) == len(set(said)) == len(nonsense) == len(set(nonsense)) == 240
    known = {word for sentence in said for word in sentence.split()}
    for sentence, strings in zip(said, nonsense, strict=True):
        words, others = sentence.split(), strings.split()
        assert len(words) == len(others) == 12 and [len(w) for w in words] == [len(w) for w in others]
        assert strings.isascii() and strings.islower() and sentence.islower()
        assert not {w for w in others if len(w) > 2} & known
    assert language_texts.generated(0) == (said, nonsense) != language_texts.generated(1)


def test_language_without_the_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    stimuli = language()
    assert stimuli.source == "generated, seed 0" and len(stimuli.positive) == 240
    assert (stimuli.pooling, stimuli.max_tokens) == ("last", 12)
    with pytest.raises(MissingExtraError, match="pip install --no-deps brainscore-language"):
        language("brainscore")


def test_language_tables_of_the_package(tmp_path, monkeypatch):
    """Tables of the package's layout; its own are read where it is installed."""
    folder = tmp_path / language_texts.TABLES
    folder.mkdir(parents=True)
    header = ",".join(f"stim{i}" for i in range(1, 15))
    for table in range(2):
        rows = [f"{i},{','.join(f'{kind}{table}{i}X{w}' for w in range(12))},{kind}" for kind in "SN" for i in range(3)]
        (folder / f"run{table}.csv").write_text("\n".join([header, *rows]) + "\n")

    class Found:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Found())
    stimuli = language("brainscore")
    assert len(stimuli.positive) == len(stimuli.negative) == 6
    assert stimuli.positive[0] == " ".join(f"s00x{w}" for w in range(12))
    assert stimuli.negative[-1].startswith("n12x0 ")
    (folder / "run1.csv").write_text(header + "\n1" + ",a" * 12 + ",Q\n")
    with pytest.raises(ValueError, match=r"run1\.csv: expected the columns"):
        language()


def test_installed_tables_are_read_without_importing_the_package():
    try:
        importlib.metadata.distribution(language_texts.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("brainscore-language is not installed")
    stimuli = language("brainscore")
    assert len(stimuli.positive) == len(stimuli.negative) == 240
    assert {len(text.split()) for text in (*stimuli.positive, *stimuli.negative)} == {12}
    assert all(text.islower() for text in stimuli.positive)
    assert "brainscore_language" not in sys.modules


def test_scrambled_sentences_keep_words_and_lengths():
    said = language_texts.generated(0)[0]
    mixed = language_texts.scrambled(said, seed=0)
    assert sorted(" ".join(mixed).split()) == sorted(" ".join(said).split())
    assert {len(text.split()) for text in mixed} == {12} and not set(mixed) & set(said)


def test_own_files_and_folders(tmp_path):
    (tmp_path / "positive.txt").write_text("one\n\ntwo\n")
    (tmp_path / "negative.txt").write_text("three\n")
    assert list(load_stimuli(tmp_path).positive) == ["one", "two"]
    table = tmp_path / "own.csv"
    table.write_text('condition,text\npositive,"a, b"\n0,c\nNegative,d\n')
    assert find_stimuli(str(table)) == Stimuli("own", ["a, b"], ["c", "d"], source="own.csv")
    lists = tmp_path / "own.json"
    lists.write_text(json.dumps({"positive": ["x"], "negative": ["y"], "pooling": "last", "max_tokens": 5}))
    assert load_stimuli(lists) == Stimuli("own", ["x"], ["y"], "last", 5, source="own.json")


def test_bad_stimuli_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'langage': did you mean 'language'"):
        find_stimuli("langage")
    with pytest.raises(ValueError, match=r"positive\.txt: no such file"):
        load_stimuli(tmp_path)
    table = tmp_path / "own.csv"
    table.write_text("condition,text\npositive,a\nmaybe,c\n")
    with pytest.raises(ValueError, match=r"own\.csv, line 3: condition 'maybe'"):
        load_stimuli(table)
    table.write_text("text\na\n")
    with pytest.raises(ValueError, match="columns text and condition"):
        load_stimuli(table)
    with pytest.raises(ValueError, match="pooling 'max'"):
        Stimuli("own", ["a"], ["b"], "max")
    with pytest.raises(ValueError, match="negative must be a list of texts"):
        Stimuli("own", ["a"], [])
    with pytest.raises(ValueError, match="positive must be a list of texts"):
        Stimuli("own", "abc", ["d"])
    with pytest.raises(ValueError, match="source 'web'"):
        language("web")
