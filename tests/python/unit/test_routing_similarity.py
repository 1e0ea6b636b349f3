"""Similarity of experts: the shortcut against all pairs of tokens, and models whose answer is known."""

import numpy as np
import pytest
import torch
from small_models import KINDS, small_model

from micro.analysis.routes.passes import sentence_samples
from micro.analysis.routes.similarity_report import SimilarityReport, similarity
from micro.testing import tiny_tokenizer

SENTENCES = ["Mia feels sad today.", "The key is still in the drawer.", "Rivers carry sand to the sea."]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def outputs_alone(model, tokenizer, sentence, expert):
    """B_e rows [L,T,H] of the sentence's tokens, in a batch of one, every token forced to the expert."""
    from micro import interventions as iv

    samples = sentence_samples([sentence], tokenizer, what="t")
    ids = torch.tensor([samples.rows[0][1]["input_ids"]])
    with torch.no_grad(), model.intervene(iv.read("block_output")) as run:
        model.model(input_ids=ids, use_cache=False, force=expert)
    first, last = samples.spans[0]
    reading = run["block_output"]
    return [reading.at(l).values[first:last] for l in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dot_product_of_mean_directions_is_the_mean_of_all_cosines(tokenizer, kind):
    model = small_model(kind=kind, vocab_size=len(tokenizer))
    report = similarity(model, tokenizer, SENTENCES, max_tokens=48, draws=20)  # batches of one and of several
    names = report.experts
    for number, (first, second) in enumerate(report.pairs):
        for layer in range(2):
            means = []
            for sentence in SENTENCES:
                a, b = (outputs_alone(model, tokenizer, sentence, names.index(e))[layer] for e in (first, second))
                cosines = [torch.cosine_similarity(x, y, dim=0) for x in a for y in b]  # every pair of tokens
                means.append(torch.stack(cosines).mean().item())
            assert report.by_layer[number][layer] == pytest.approx(np.mean(means), abs=1e-9)
        assert report.mean[number] == pytest.approx(np.mean(report.by_layer[number]))


def test_equal_experts_are_as_alike_as_an_expert_with_itself(tokenizer):
    model = small_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.blocks.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    report = similarity(model, tokenizer, SENTENCES, draws=20)
    assert np.ptp(report.by_layer, axis=0) == pytest.approx([0, 0], abs=1e-9)


def test_opposite_experts_are_opposite(tokenizer):
    """FFN experts that differ by the sign of their last map: B_e of the first layer is mirrored."""
    model = small_model(kind="ffn", vocab_size=len(tokenizer))
    with torch.no_grad():
        blocks = model.model.layers[0].blocks
        for weight in (blocks.gate_proj.weight, blocks.up_proj.weight, blocks.down_proj.weight):
            weight[1] = weight[0]
        blocks.down_proj.weight[1] *= -1
    report = similarity(model, tokenizer, SENTENCES, draws=20)
    own = report.pairs.index(["logic", "logic"])
    assert report.by_layer[report.pairs.index(["logic", "social"])][0] == pytest.approx(-report.by_layer[own][0])


def test_six_pairs_then_the_ceilings(tokenizer, tmp_path):
    report = similarity(small_model(vocab_size=len(tokenizer)), tokenizer, SENTENCES, draws=50)
    assert len(report.pairs) == 10 and all(a != b for a, b in report.pairs[:6])
    assert all(low <= m <= high for (low, high), m in zip(report.mean_interval, report.mean, strict=True))
    report.save(tmp_path)
    assert SimilarityReport.load(tmp_path) == report
    assert len(report.plot().axes) == 1
    assert len(report.layer_table()) == 20 and (tmp_path / "similarity_layers.csv").is_file()


def test_only_the_sentence_counts(tokenizer):
    samples = sentence_samples(SENTENCES, tokenizer, what="t")
    for (_, row), sentence in zip(samples.rows, SENTENCES, strict=True):
        first, last = samples.spans[_]
        assert tokenizer.decode(row["input_ids"][first:last]) == sentence
    plain = sentence_samples(SENTENCES, tokenizer, what="t", chat=False)
    assert plain.spans[0] == (0, len(tokenizer(SENTENCES[0])["input_ids"]))


def test_the_published_tokens_are_the_sentence_where_one_token_follows_it(tokenizer):
    from copy import deepcopy

    one = deepcopy(tokenizer)
    one.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    exact, published = (sentence_samples(SENTENCES, one, what="t", tokens=t).spans for t in ("sentence", "published"))
    assert exact == published
    behind = sentence_samples(SENTENCES, tokenizer, what="t", tokens="published").spans
    exact = sentence_samples(SENTENCES, tokenizer, what="t").spans  # two tokens follow: the rule is off by one
    assert behind == {i: (a + 1, b + 1) for i, (a, b) in exact.items()}


@pytest.mark.parametrize(
    "sentences, reason", [([], "list of sentences"), ("one", "list of"), (["a b", " "], "1 is empty")]
)
def test_bad_sentences_are_refused(tokenizer, sentences, reason):
    with pytest.raises(ValueError, match=reason):
        sentence_samples(sentences, tokenizer, what="t")
