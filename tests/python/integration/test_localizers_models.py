"""Localizers on small models whose units are known, and the command over them."""

import json

import numpy as np
import pytest
import torch
from small_models import small_model

from micro import analysis
from micro import interventions as iv
from micro.analysis.localizers import Stimuli, TextSuite, random_masks, silence
from micro.analysis.localizers.units import UnitReader, tokenized
from micro.cli import main as cli
from micro.testing import tiny_tokenizer


class Words:
    """A tokenizer of words w0, w1, ...: the number is the id."""

    pad_token_id = 0

    def __call__(self, text, truncation=False, max_length=None):
        ids = [int(word[1:]) for word in text.split()]
        return {"input_ids": ids[:max_length] if truncation else ids}


def texts(count, *, low=3, high=61, slots=(3, 9), seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in generator.integers(low, high, generator.integers(*slots))) for _ in range(count)]


def pair(count=12, **options):
    return Stimuli("pair", texts(count, seed=1), texts(count, seed=2), **options)


@torch.no_grad()
def alone(model, unit, text, *, mode, pooling):
    """Pooled units of one text, by its definition: a forward of its own, token by token."""
    ids = torch.tensor([Words()(text)["input_ids"]])
    with model.intervene(iv.read(unit, name="all"), all_experts=True) as run:
        model(ids)
    reading = run["all"]
    layers, experts, _ = UnitReader(unit, mode, pooling).shape(model)
    out = []
    for layer in range(layers):
        for expert in range(experts):
            rows = reading.at(layer, expert)
            values, chosen = rows.values, rows.chosen
            if pooling == "last":
                values, chosen = values[rows.slot == ids.shape[1] - 1], chosen[rows.slot == ids.shape[1] - 1]
            if mode == "routed":
                out.append(values[chosen].mean(0))  # NaN of an empty mean
            else:
                out.append((values * chosen[:, None] if mode == "zero" else values).mean(0))
    return torch.stack(out).view(layers, experts, -1)


@pytest.mark.parametrize("kind, unit", [("block", "block_output"), ("ffn", "up"), ("block", "heads")])
@pytest.mark.parametrize("mode", ["all", "routed", "zero"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooled_units_are_those_of_each_text_alone(kind, unit, mode, pooling):
    model = small_model(kind=kind)
    some = texts(7)
    want = torch.stack([alone(model, unit, text, mode=mode, pooling=pooling) for text in some])
    assert want.isnan().any() == (mode == "routed")
    for max_bytes in (1, 1 << 30):  # one text at a time; all in one padded batch
        got = torch.empty_like(want)
        for indices, values in UnitReader(unit, mode, pooling, max_bytes).pooled(model, tokenized(Words(), some)):
            got[indices] = values
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, equal_nan=True)


def test_the_residual_stream_behind_each_layer():
    model = small_model("olmo2")
    some = texts(4)
    capture = UnitReader("residual", "all", "mean")
    rows = tokenized(Words(), some)
    got = torch.empty(4, 2, 1, 32, dtype=torch.float64)
    for indices, values in capture.pooled(model, rows):
        got[indices] = values
    with torch.no_grad():
        states = model(torch.tensor([rows[0]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(got[0, 0, 0], states[1][0].mean(0))


@pytest.mark.parametrize("mode", ["all", "routed", "zero"])
def test_streaming_and_keeping_give_the_same_result(mode):
    model = small_model()
    options = {"mode": mode, "random_draws": 50}
    kept = analysis.localize(model, Words(), pair(pooling="mean"), permutations=3, **options)
    streamed = analysis.localize(model, Words(), pair(pooling="mean"), permutations=0, max_bytes=1, **options)
    np.testing.assert_allclose(kept.t, streamed.t, rtol=1e-6, atol=1e-9)
    assert (kept.mask == streamed.mask).all() and kept.counts == streamed.counts
    assert kept.specificity["permutations"] == 3 and streamed.specificity is None and streamed.share_permuted is None
    assert kept.selected == 2 * 4 * 32 // 10 == int(kept.mask.sum())
    used = np.asarray(kept.stimuli_used)
    assert used.shape == (2, 4, 2) and ((used == 12).all() if mode != "routed" else (used < 12).any())


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_results_are_the_test_of_the_pooled_activations(pooling):
    model = small_model(dtype=torch.float32)
    stimuli = pair(pooling=pooling, max_tokens=4)
    result = analysis.localize(model, Words(), stimuli, percent=5, permutations=0)
    sides = []
    for side in (stimuli.positive, stimuli.negative):
        cut = [" ".join(text.split()[:4]) for text in side]
        sides.append(torch.stack([alone(model, "block_output", text, mode="all", pooling=pooling) for text in cut]))
    want = analysis.localizer_test(*sides)
    np.testing.assert_allclose(result.t, want.t, atol=1e-3)
    np.testing.assert_array_equal(result.mask, analysis.localizer_mask(result.t, percent=5))
    np.testing.assert_array_equal(np.asarray(result.counts), result.mask.sum(-1))
    assert result.settings["max_tokens"] == 4 and result.stimuli == [12, 12]


@pytest.fixture(scope="module")
def planted():
    """An FFN model, two sets of words, and the up-projections [L,E,F] that read what tells the words apart.

    Embeddings have 3 in component 0 for the words below 31 and in component 1 for the others, and noise elsewhere.
    Attention and FFNs add nothing. Planted rows of the up-projection read component 0; the others read noise.
    """
    model = small_model(kind="ffn", dtype=torch.float64)
    mask = np.zeros((2, 4, 40), bool)
    mask[0, 1, :5] = mask[1, 1, 3:9] = mask[1, 3, 30] = True
    with torch.no_grad():
        words = model.model.embed_tokens.weight
        words.normal_(generator=torch.Generator().manual_seed(3))
        words[:, :2] = 0
        words[:31, 0] = words[31:, 1] = 3
        for layer, wanted in zip(model.model.layers, torch.tensor(mask), strict=True):
            layer.self_attn.o_proj.weight.zero_()
            layer.blocks.down_proj.weight.zero_()
            up = layer.blocks.up_proj.weight
            up[:, :, :2] = 0
            up[wanted] *= 0.5  # noise of their own: multiples of one another would have the same t
            up[..., 0][wanted] = 1
    stimuli = Stimuli("planted", texts(60, high=31, seed=4), texts(60, low=31, seed=5), "mean")
    return model, stimuli, mask


@pytest.mark.parametrize("mode", ["all", "routed"])
def test_planted_units_are_found_in_their_expert(planted, mode):
    model, stimuli, mask = planted
    options = {"unit": "up", "units": int(mask.sum()), "percent": None, "mode": mode, "random_draws": 200}
    result = analysis.localize(model, Words(), stimuli, permutations=20, **options)
    np.testing.assert_array_equal(result.mask, mask)
    assert result.share == pytest.approx([0, 11 / 12, 0, 1 / 12])
    assert result.share[1] > result.share_random[1][1] and result.share[0] < result.share_random[0][0] + 1e-9
    assert result.share[1] > result.share_permuted[1][1]
    assert result.significant >= mask.sum() and result.specificity["share_with_discovery"] <= 0.3
    assert result.counts[1][1] == 6 and result.rate[1][1] == pytest.approx(6 / 40)


def test_experts_that_are_copies_tie_and_the_result_says_so():
    model = small_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.blocks.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    result = analysis.localize(model, Words(), pair(), percent=10, permutations=0, random_draws=10)
    assert result.settings["k"] == 25 and result.selected == 100 and result.share == [0.25] * 4
    assert "25 distinct values of t were asked for" in str(result)


def test_layers_can_be_ranked_by_themselves(planted):
    model, stimuli, mask = planted
    result = analysis.localize(
        model, Words(), stimuli, unit="up", units=7, ranking="layer", permutations=0, random_draws=20
    )
    assert result.mask[1].sum() == 7 and (result.mask[1] == mask[1]).all()
    assert result.mask[0].sum() == 7 and (result.mask[0] & mask[0]).sum() == 5
    strict = analysis.localize(
        model, Words(), stimuli, unit="up", percent=50, significant_only=True, permutations=0, random_draws=20
    )
    assert mask[strict.mask].sum() == mask.sum() and strict.selected == strict.significant < 160


def test_noise_passes_the_specificity_check():
    generator = np.random.default_rng(11)
    model = small_model(dtype=torch.float32)
    both = [" ".join(f"w{i}" for i in generator.integers(3, 61, 8)) for _ in range(40)]
    result = analysis.localize(model, Words(), Stimuli("noise", both[:20], both[20:], "last"), permutations=200)
    assert result.specificity["passed"] and result.specificity["permutations"] == 200
    assert result.significant <= 10
    for share, (low, high) in zip(result.share, result.share_permuted, strict=True):
        assert low - 0.05 <= share <= high + 0.05


def test_distractors_that_share_the_units_are_seen(planted):
    model, stimuli, mask = planted
    same = Stimuli(
        "same",
        stimuli.positive,
        stimuli.negative,
        "mean",
        distractors=(texts(20, high=31, seed=8), texts(20, low=31, seed=9)),
    )
    other = Stimuli(
        "other", stimuli.positive, stimuli.negative, "mean", distractors=(texts(20, seed=8), texts(20, seed=9))
    )
    options = {"unit": "up", "units": int(mask.sum()), "permutations": 0, "distractors": True, "random_draws": 10}
    first = analysis.localize(model, Words(), same, **options)
    second = analysis.localize(model, Words(), other, **options)
    assert first.distractors["overlap"] == 1 and second.distractors["overlap"] < 0.5
    assert first.distractors["chance"] == pytest.approx(12 / 320)
    assert "distractors: 1.000" in str(first)
    with pytest.raises(ValueError, match="'pair' have no distractors"):
        analysis.localize(model, Words(), pair(), **options)


def test_a_result_reads_back_with_its_arrays(tmp_path, planted):
    model, stimuli, _ = planted
    result = analysis.localize(model, Words(), stimuli, unit="up", permutations=4, random_draws=20)
    result.save(tmp_path)
    again = analysis.LocalizerResult.load(tmp_path)
    assert again == result
    for name in ("t", "p", "q", "mask"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "localizer.csv", "localizer.json", "localizer.npz", "localizer_cells.csv",
    ]  # fmt: skip
    (tmp_path / "localizer.npz").unlink()
    bare = analysis.LocalizerResult.load(tmp_path)
    assert bare == result and bare.mask is None
    figure = bare.plot()
    assert len(figure.axes) == 4
    band, *bars = figure.axes[0].patches
    assert band.get_zorder() < min(bar.get_zorder() for bar in bars)  # chance lies behind what was found
    assert "95 % of random masks" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert list(bare.table()["expert"]) == ["language", "logic", "social", "world"]
    assert len(bare.cells()) == 8 and bare.cells()["selected"].sum() == result.selected
    with pytest.raises(ValueError, match=r"localizer\.npz"):
        analysis.lesion(model, Words(), texts(2), bare)


@pytest.fixture(scope="module")
def copying():
    """A block model that adds nothing to the embeddings, reads component 0 alone, and predicts word 5 from it."""
    model = small_model(dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 0] = 4
        model.lm_head.weight.zero_()
        model.lm_head.weight[5, 0] = 4
        for layer in model.model.layers:
            layer.blocks.o_proj.weight.zero_()
            layer.blocks.down_proj.weight.zero_()
    mask = np.zeros((2, 4, 32), bool)
    mask[:, :, 0] = True
    return model, mask


@pytest.mark.parametrize("matched", [False, True])
def test_a_lesion_of_the_units_that_matter_harms_more_than_any_random_one(copying, matched):
    model, mask = copying
    data = ["w5 w5 w5 w5", "w5 w5 w5", "w5 w5 w5 w5 w5"]
    result = analysis.lesion(model, Words(), data, mask, draws=99, matched=matched)
    assert result.above_all_random == {"texts": True}
    assert result.p == [0.01]
    assert result.harm[0] > 1 and result.excess_interval[0][0] > 0.5
    assert result.unlesioned[0] + result.harm[0] == pytest.approx(np.log(61))  # nothing is left to predict from
    assert result.selected == 8 and result.units == 256 and len(result.random[0]) == 99
    harmless = analysis.lesion(model, Words(), data, random_masks(mask, 1, seed=5)[0], draws=20, matched=matched)
    assert harmless.p is None and not harmless.above_all_random["texts"]
    assert "at least 99 random masks" in str(harmless)


def test_a_lesion_reads_back_and_draws_itself(tmp_path, copying):
    model, mask = copying
    result = analysis.lesion(model, Words(), texts(5), mask, draws=3)
    result.save(tmp_path)
    assert analysis.LesionResult.load(tmp_path) == result
    assert len(result.plot().axes) == 1 and "3 random masks of the same size" in str(result)


@pytest.mark.parametrize("kind, unit", [("block", "block_output"), ("ffn", "up"), ("block", "residual")])
def test_an_empty_mask_changes_no_bit_and_a_full_one_is_zero(kind, unit):
    model = small_model(kind=kind, dtype=torch.float32)
    suite = TextSuite(texts(3), Words())
    shape = UnitReader(unit, "all", "mean").shape(model)
    base = suite.score(model, {})[0]
    with model.intervene(silence(model, unit, torch.zeros(shape, dtype=torch.bool))):
        np.testing.assert_array_equal(suite.score(model, {})[0], base)
    action = silence(model, unit, torch.ones(shape, dtype=torch.bool))
    layers = [1, 2] if unit == "residual" else None
    with torch.no_grad(), model.intervene(action, iv.read(unit, layers=layers, name="after")) as run:
        model(torch.tensor([[5, 6, 7]]))
    assert len(run["after"].values) and not run["after"].values.any()


def test_records_and_suites_can_be_lesioned(copying):
    model, mask = copying
    suite = TextSuite(texts(4), Words())
    one = analysis.lesion(model, Words(), suite, mask, draws=2, controls={"ablate": "logic"})
    two = analysis.lesion(model, Words(), texts(4), mask, draws=2, controls={"ablate": "logic"})
    assert one == two and one.settings["controls"] == {"ablate": "logic"}


def test_bad_requests_are_refused_before_the_model_runs(copying):
    model, mask = copying
    for options, words in (
        ({"unit": "blocks"}, "unit 'blocks'"),
        ({"mode": "none"}, "mode 'none'"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"ranking": "expert"}, "ranking 'expert'"),
        ({"percent": 0.1}, "0.1 % of 256 units"),
        ({"units": 257}, r"1\.\.256"),
        ({"q": 0}, "q must lie"),
        ({"permutations": -1}, "permutations"),
        ({"range": (0, 50), "significant_only": True}, "random band"),
    ):
        with pytest.raises(ValueError, match=words):
            analysis.localize(model, Words(), pair(), **options)
    with pytest.raises(ValueError, match="no unit is selected"):
        analysis.lesion(model, Words(), texts(2), mask & False)
    with pytest.raises(ValueError, match=r"bool \[2, 4, 32\]"):
        analysis.lesion(model, Words(), texts(2), mask[:1])
    with pytest.raises(TypeError, match="one string"):
        analysis.lesion(model, Words(), "w3 w4", mask)


def test_activations_that_are_not_numbers_are_refused_and_not_dropped():
    model = small_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].blocks.down_proj.weight[2] = float("nan")
    for mode in ("all", "routed"):
        with pytest.raises(ValueError, match="not finite"):
            analysis.localize(model, Words(), pair(), mode=mode, permutations=0)


def test_the_built_in_localizers_run_on_a_tokenizer(tmp_path):
    tokenizer = tiny_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16)
    result = analysis.localize(model, tokenizer, "theory_of_mind", permutations=5, random_draws=20, distractors=True)
    assert result.stimuli == [10, 10] and "low power" in str(result)
    assert result.distractors is not None and result.settings["pooling"] == "mean"
    language = analysis.localize(model, tokenizer, "language", permutations=0, random_draws=20)
    assert language.stimuli == [240, 240] and language.settings["max_tokens"] == 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("model")
    small_model(dtype=torch.float32, vocab_size=len(tokenizer), hidden_size=16, head_dim=4).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["localize", str(folder), "--localizer", "theory_of_mind", "--permutations", "5", "-o", str(out)]
    assert cli.run([*call, "--lesion-text", "Mia thinks that Tom is sad.", "--lesion-masks", "3"]) == 0
    shown = capsys.readouterr().out
    assert "low power" in shown and "written: " in shown and "no p value" in shown
    assert {p.name for p in out.iterdir()} == {
        "localizer.json", "localizer.csv", "localizer_cells.csv", "localizer.npz", "localizer.png", "localizer.svg",
        "lesion.json", "lesion.csv", "lesion.png", "lesion.svg",
    }  # fmt: skip
    stimuli = tmp_path / "own.json"
    stimuli.write_text(json.dumps({"positive": ["the cat", "a dog", "two"], "negative": ["x", "yy y", "zz"]}))
    options = ["--localizer", str(stimuli), "--permutations", "0", "--range", "0", "0", "-o", str(out)]
    assert cli.run(["localize", str(folder), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["localizer"]["localizer"] == "own" and found["localizer"]["selected"] > 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--localizer", "langage"], "did you mean 'language'"),
        (["--unit", "block"], "unit 'block'"),
        (["--percent", "0"], "percent must lie"),
    ],
)
def test_bad_usage_of_the_command(folder, arguments, words, capsys):
    assert cli.run(["localize", str(folder), *arguments]) == 2
    assert words in capsys.readouterr().err
