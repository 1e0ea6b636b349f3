"""Alignment with a model: pooled features, surprisal, reading times, and the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from small_models import small_model

from micro.analysis import alignment as al
from micro.cli.main import BAD_INPUT, DONE, run
from micro.testing import tiny_tokenizer

TEXTS = ["Mia hid the key.", "Two and three make five, and four more make nine.", "It rains in the south."]

NAMES = ("Mia", "Tom", "Ann", "Leo")
WORDS = ("Mia", "hid", "the", "key", "and", "then", "she", "ran", "home")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(vocab_size=320)


@pytest.fixture(scope="module")
def model():
    return small_model(vocab_size=320)


def alone(model, tokenizer, text):
    """Embedding and outputs of the layers [L+1,S,H] and the trace, of one text without padding."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        out = model.model(input_ids=ids, output_hidden_states=True, output_routing=True, use_cache=False)
    return out.hidden_states, out.routing


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_residual_features_are_pooled_hidden_states(model, tokenizer, pooling):
    pooled = al.pooled_activations(model, tokenizer, TEXTS, layers=[0, 1], pooling=pooling, max_tokens=64)
    assert pooled.values.shape == (2, 1, 3, 32) and pooled.experts == [None]
    for i, text in enumerate(TEXTS):
        states, _ = alone(model, tokenizer, text)
        for layer in (0, 1):
            wanted = states[layer][0].mean(0) if pooling == "mean" else states[layer][0, -1]
            assert np.allclose(pooled.values[layer, 0, i], wanted.numpy(), atol=1e-9)
    assert [s.name for s in pooled.sets()] == ["model, layer 0", "model, layer 1"]
    assert len(al.pooled_activations(model, tokenizer, TEXTS).layers) == 3  # the end of the stream, too


def test_features_of_experts_are_those_of_all_tokens_or_of_their_own(model, tokenizer):
    every = al.pooled_activations(model, tokenizer, TEXTS, point="block_output")
    own = al.pooled_activations(model, tokenizer, TEXTS, point="block_output", tokens="zero")
    assert every.values.shape == own.values.shape == (2, 4, 3, 32) and not model.training
    for i, text in enumerate(TEXTS):
        states, trace = alone(model, tokenizer, text)
        # Top-1 with weight 1: the layer's output is the sum over experts of the output on their own tokens.
        assert np.allclose(own.values[0, :, i].sum(0), states[1][0].mean(0).numpy(), atol=1e-9)
        share = [float((trace.ids[0, 0, :, 0] == e).double().mean()) for e in range(4)]
        for e in range(4):
            assert (np.abs(own.values[0, e, i]).max() > 0) == (share[e] > 0)
            assert np.abs(every.values[0, e, i]).max() > 0
    logic = al.pooled_activations(model, tokenizer, TEXTS, point="block_output", experts=["logic"], layers=[1])
    assert np.allclose(logic.values[0, 0], every.values[1, 0]) and logic.sets()[0].group == "model: logic"


def test_units_of_a_mask_stand_side_by_side(model, tokenizer):
    pooled = al.pooled_activations(model, tokenizer, TEXTS, point="block_output")
    mask = np.zeros((2, 4, 32), dtype=bool)
    mask[0, 2, 5] = mask[1, 3, 7] = True
    features = pooled.masked(mask, "found")
    assert np.allclose(features.values, np.stack([pooled.values[0, 2, :, 5], pooled.values[1, 3, :, 7]], 1))
    with pytest.raises(ValueError, match="mask: expected bool"):
        pooled.masked(mask[:1], "found")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"pooling": "max"}, "pooling must be"),
        ({"point": "middle"}, "point is 'middle'"),
        ({"point": "block_output", "experts": ["nobody"]}, "the model has no nobody"),
        ({"texts": []}, "at least one text"),
        ({"texts": [""]}, "number 0 has no tokens"),
    ],
)
def test_wrong_arguments_are_named(model, tokenizer, arguments, words):
    with pytest.raises(ValueError, match=words):
        al.pooled_activations(model, tokenizer, **{"texts": TEXTS, **arguments})


def test_surprisal_of_words_sums_their_tokens(model, tokenizer):
    sentences = [text.split() for text in TEXTS]
    found = al.word_surprisal(model, tokenizer, sentences, max_tokens=48)
    for words, values in zip(sentences, found, strict=True):
        ids = tokenizer(" ".join(words))["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-float(logs[i, token]) for i, token in enumerate(ids[1:])]
        assert len(values) == len(words) and np.isnan(values[0])
        first = len(tokenizer(words[0])["input_ids"])
        assert np.isclose(np.nansum(values), sum(losses[first - 1 :]), atol=1e-5)
        second = len(tokenizer(" " + words[1])["input_ids"])
        assert np.isclose(values[1], sum(losses[first - 1 : first - 1 + second]), atol=1e-5)
    steered = al.word_surprisal(model, tokenizer, sentences, controls={"ablate": "logic"})
    assert not np.allclose(steered[1][1:], found[1][1:])


def words_table(sentences=40, length=9, seed=0):
    """Reading times that depend on length, frequency, the word before and, by 12 per nat, on surprisal."""
    generator = np.random.default_rng(seed)
    n = sentences * length
    word = ["a" * size for size in generator.integers(2, 10, n)]
    frame = pd.DataFrame({"sentence": np.repeat(np.arange(sentences), length), "word": word})
    frame["frequency"] = np.exp(generator.normal(3, 1, n))
    surprisal = generator.gamma(4, 1, n)
    size = frame["word"].str.len().to_numpy()
    before = np.concatenate([[0], size[:-1]])
    noise = generator.normal(0, 20, n)
    frame["time"] = 250 + 8 * size - 5 * np.log(frame["frequency"]) + 4 * before + 12 * surprisal + noise
    return frame, surprisal


def test_planted_surprisal_is_recovered_and_noise_is_not(tmp_path):
    frame, surprisal = words_table()
    frame.loc[5, "time"] = np.nan
    noise = np.random.default_rng(5).gamma(4, 1, len(frame))
    result = al.reading_times(frame, {"true": surprisal, "noise": noise}, draws=300, permutations=19)
    true, other = result.models
    # Explained variance (12 * 2)^2 beside noise of 20^2: half the log of the ratio of the variances.
    assert true["gain"] == pytest.approx(0.5 * np.log(1 + (12 * 2 / 20) ** 2), abs=0.08)
    assert true["coefficient"] == pytest.approx(12, abs=3 * true["standard_error"]) and true["p"] == 1 / 20
    assert true["interval"][0] < true["gain_held_out"] < true["interval"][1] and true["interval"][0] > true["null_95"]
    assert abs(other["gain_held_out"]) < 0.02 and other["gain"] >= 0 and other["f_p"] > 0.01
    assert result.contrasts[0]["interval"][0] > 0
    assert result.left_out == {"without a time": 1, "at the start of a sentence": 40, "without surprisal": 0}
    assert result.words == 360 - 41 and result.sentences == 40
    result.save(tmp_path)
    again = al.ReadingTimesResult.load(tmp_path)
    assert again == result and again.plot().axes and "held out" in str(again)


def test_the_in_sample_gain_is_that_of_two_gaussian_fits():
    frame, surprisal = words_table(12)
    result = al.reading_times(frame, {"s": surprisal}, draws=10, permutations=1, folds=2)
    kept = np.arange(len(frame)) % 9 != 0
    size, log = frame["word"].str.len().to_numpy(float), np.log(frame["frequency"].to_numpy())
    x = np.stack([np.ones(len(frame)), size, log, np.roll(size, 1), np.roll(log, 1)], 1)[kept]
    y = frame["time"].to_numpy()[kept]

    def variance(design):
        return np.mean((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2)

    expected = 0.5 * np.log(variance(x) / variance(np.c_[x, surprisal[kept]]))
    assert result.models[0]["gain"] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.drop(columns="frequency"), "frequency or log_frequency"),
        (lambda f: f.assign(frequency=0.0), "must be above 0"),
        (lambda f: f.assign(time=-1.0), "times must be above 0"),
        (lambda f: f.assign(sentence=np.arange(len(f)) % 2), "stand together"),
        (lambda f: f.assign(time=np.nan), "0 of 90 words are left"),
    ],
)
def test_wrong_tables_are_named(change, words):
    frame, surprisal = words_table(10)
    with pytest.raises(ValueError, match=words):
        al.reading_times(change(frame), {"s": surprisal})


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("alignment") / "model"
    small_model(vocab_size=320, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_command_aligns_a_model_with_responses(folder, tmp_path, capsys):
    texts = [f"{name} has {i} apples and {i + j} pens." for i, name in enumerate(NAMES) for j in range(9)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    np.savez(tmp_path / "brain.npz", responses=np.random.default_rng(0).standard_normal((36, 5)))
    arguments = ["align", "responses", str(folder), "--texts", str(tmp_path / "texts.txt"), "--folds", "3"]
    arguments += ["--responses", str(tmp_path / "brain.npz"), "-o", str(tmp_path / "out"), "--draws", "20"]
    options = ["--permutations", "3", "--point", "block_output", "--layers", "1", "--experts", "logic,social"]
    assert run([*arguments, *options, "--untrained"]) == DONE
    content = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert [s["name"] for s in content["sets"]][2:] == ["untrained, logic, layer 1", "untrained, social, layer 1"]
    assert [c["first"] for c in content["contrasts"]] == ["model: logic"] * 2 + ["model: social"]
    assert (tmp_path / "out" / "alignment.png").stat().st_size > 1000 and "self-test" in capsys.readouterr().out
    found = ["--mask", str(tmp_path / "localizer"), "--compare", str(folder)]
    assert run(["localize", str(folder), "--permutations", "0", "-o", str(tmp_path / "localizer")]) == DONE
    assert run([*arguments, *options, *found]) == DONE
    content = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert [s["model"] for s in content["sets"]] == ["model"] * 2 + ["localized units"] + [str(folder)] * 2
    assert len(content["random_units"][0]["null"]) == 19 and content["settings"]["point"] == "block_output"
    assert run([*arguments, "--mask", str(tmp_path / "localizer")]) == BAD_INPUT
    assert "give --point block_output" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("\n".join(texts[:-1]))
    assert run([*arguments, *options]) == BAD_INPUT and "35 lines" in capsys.readouterr().err


def test_the_command_reads_reading_times(folder, tmp_path, capsys):
    generator = np.random.default_rng(0)
    rows = [(s, w, 200 + len(w), 5.0 + len(w)) for s in range(12) for w in WORDS]
    frame = pd.DataFrame(rows, columns=["sentence", "word", "time", "frequency"])
    frame["time"] += generator.normal(0, 10, len(frame))
    frame["frequency"] += generator.random(len(frame))
    frame.to_csv(tmp_path / "t.csv", index=False)
    arguments = ["align", "reading-times", str(folder), "--table", str(tmp_path / "t.csv"), "-o", str(tmp_path / "out")]
    assert run([*arguments, "--ablate", "logic,social", "--permutations", "3"]) == DONE
    content = json.loads((tmp_path / "out" / "reading_times.json").read_text())
    assert [m["name"] for m in content["models"]] == ["intact", "without logic,social"]
    assert content["words"] == 12 * 8 and "nats per word" in capsys.readouterr().out
