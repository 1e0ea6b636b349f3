"""Routing reports from routes that the test itself plants."""

import json
import math

import numpy as np
import pytest
import torch
from small_models import small_model

from micro.analysis.routes.passes import SampleCounts, drawn_samples
from micro.analysis.routes.report import RoutingReport, routing
from micro.analysis.routes.summary import accuracy_numbers, groups_of, usage_numbers
from micro.data import Record, Span, encode
from micro.experts import NAMES
from micro.modeling import RoutingTrace
from micro.testing import tiny_tokenizer

E = 4


def trace_of(ids, probs=None):
    """ids [L,B,S] or [L,B,S,K]."""
    ids = torch.as_tensor(ids)
    ids = ids[..., None] if ids.dim() == 3 else ids
    if probs is None:
        probs = torch.nn.functional.one_hot(ids[..., 0].long(), E).float()
    return RoutingTrace(ids, torch.ones(ids.shape), probs, probs, probs, torch.ones(ids.shape[1:3], dtype=torch.bool))


def counts_of(ids, *, counted=None, labels=None, probs=None):
    ids = torch.as_tensor(ids)
    counts = SampleCounts.zeros(ids.shape[1], ids.shape[0], E, labelled=labels is not None)
    counted = torch.ones(ids.shape[1:3], dtype=torch.bool) if counted is None else counted
    counts.add(range(ids.shape[1]), trace_of(ids, probs), counted, labels)
    return counts


def test_counts_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, E, (5, 3, 7), generator=generator)
    counted = torch.rand(3, 7, generator=generator) < 0.6
    labels = torch.randint(-1, E, (3, 7), generator=generator)
    counts = counts_of(ids, counted=counted, labels=labels)
    usage, confusion = np.zeros((3, 5, E)), np.zeros((3, 5, E, E))
    transitions, together = np.zeros((4, E, E)), np.zeros((5, 5))
    for l in range(5):
        for b in range(3):
            for s in range(7):
                e = int(ids[l, b, s])
                if labels[b, s] >= 0:
                    confusion[b, l, labels[b, s], e] += 1
                if not counted[b, s]:
                    continue
                usage[b, l, e] += 1
                if l < 4:
                    transitions[l, e, ids[l + 1, b, s]] += 1
                for m in range(5):
                    together[l, m] += int(ids[m, b, s]) == e
    for name, want in {
        "usage": usage,
        "confusion": confusion,
        "transitions": transitions,
        "together": together,
    }.items():
        np.testing.assert_array_equal(getattr(counts, name), want, err_msg=name)
    np.testing.assert_array_equal(counts.load, usage)
    assert counts.tokens.tolist() == counted.sum(1).tolist()


def test_usage_is_a_mean_over_samples_not_over_tokens_and_leaves_out_four_layers():
    ids = np.zeros((6, 2, 5), int)
    ids[2:4, 0] = 1  # the first sample, all five slots, in the counted layers
    ids[[0, 1, 4, 5]] = 3
    counted = torch.ones(2, 5, dtype=torch.bool)
    counted[1, 1:] = False  # the second sample has one slot
    numbers = usage_numbers(counts_of(ids, counted=counted), 1, 50, 0)
    assert numbers["layers_counted"] == [2, 3]
    assert numbers["usage"] == [0.5, 0.5, 0, 0]
    assert numbers["usage_by_layer"][0] == [0, 0, 0, 1]
    assert numbers["usage_interval"][0] == [0, 1]
    assert (numbers["samples"], numbers["tokens"]) == (2, 6)
    assert numbers["load_share"][2] == [1 / 6, 5 / 6, 0, 0]  # load is of tokens


def test_more_experts_per_token_average_probabilities_and_load_counts_all_choices():
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(2, 1, 3, E)
    ids = torch.tensor([0, 1]).expand(2, 1, 3, 2)
    counts = SampleCounts.zeros(1, 2, E)
    counts.add([0], trace_of(ids, probs), torch.ones(1, 3, dtype=torch.bool), None)
    numbers = usage_numbers(counts, 2, 20, 0)
    assert numbers["usage"] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-6)
    assert numbers["load_share"] == [[0.5, 0.5, 0, 0]] * 2
    assert usage_numbers(counts, 1, 20, 0)["usage"] == [1, 0, 0, 0]


def test_surplus_ranks_are_no_load(model, tokenizer):
    """Two experts per token with one allowed: the second rank has weight 0 and names an expert that did not run."""
    controls = {"experts_per_token": 2, "keep": "social"}
    report = routing(model, tokenizer, ["The sum of 12 and 7 is 19."], controls=controls, draws=20)
    assert report.load_share == [[0, 1, 0, 0]] * 2 and len(report.dead_cells) == 6


def test_entropies_information_and_load_variation_of_known_routers():
    even, sure = torch.full((4,), 0.25), torch.eye(4)
    slots = [sure[s % 4] for s in range(8)]
    probs = torch.stack([even.expand(1, 8, 4), torch.stack(slots)[None], sure[2].expand(1, 8, 4)])
    numbers = usage_numbers(counts_of(probs.argmax(-1), probs=probs), 1, 20, 0)
    report = RoutingReport(list(NAMES), **numbers)
    assert report.decision_entropy == pytest.approx([math.log(4), 0, 0])
    assert report.usage_entropy == pytest.approx([math.log(4), math.log(4), 0])
    assert report.mutual_information == pytest.approx([0, math.log(4), 0], abs=1e-12)  # ignores, follows, is constant
    assert report.load_variation == pytest.approx([math.sqrt(3), 0, math.sqrt(3)])
    assert len(report.dead_cells) == 6


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        p = generator.dirichlet(np.full(E, 3.0), size=40)  # every sample has its own usage
        ids = np.stack([generator.choice(E, size=(1, 12), p=row) for row in p], 1)
        low, high = np.transpose(usage_numbers(counts_of(ids), 1, 300, 0)["usage_interval"])
        inside += ((low <= 0.25) & (high >= 0.25)).mean()
    assert 0.88 < inside / 60 < 0.99


def test_flow_of_independent_layers_is_what_chance_gives():
    ids = np.random.default_rng(1).integers(0, E, size=(3, 20, 400))
    ids[2] = ids[1]
    numbers = usage_numbers(counts_of(ids), 1, 20, 0)
    together, chance = np.asarray(numbers["together"]), np.asarray(numbers["together_chance"])
    assert together[1, 2] == 1 and abs(together[0, 1] - chance[0, 1]) < 0.02
    transitions = np.asarray(numbers["transitions"])
    assert transitions.sum((1, 2)) == pytest.approx([1, 1])
    assert transitions[1] == pytest.approx(np.diag(np.diag(transitions[1])))


def test_groups_are_means_of_their_own_samples():
    ids = np.repeat([[[0], [0], [2]]], 3, axis=0)  # three samples of one slot in three layers
    groups = groups_of(counts_of(ids), ["b", "a", "a"], 1, 50, 0)
    assert [(g["name"], g["samples"], g["usage"]) for g in groups] == [
        ("a", 2, [0.5, 0, 0.5, 0]),
        ("b", 1, [1, 0, 0, 0]),
    ]
    assert groups[1]["interval"][0] == [1, 1]


def test_accuracy_is_balanced_and_ranked_among_relabellings():
    labels = torch.tensor([[0, 0, 0, 1, 2, 3]])
    right = counts_of(labels[None].expand(2, 1, 6), labels=labels)
    numbers = accuracy_numbers(right, NAMES, 50, 0)
    assert numbers["accuracy"] == 1 and numbers["relabelling_p"] == 1 / 24
    one = accuracy_numbers(counts_of(np.zeros((2, 1, 6), int), labels=labels), NAMES, 50, 0)
    assert one["accuracy"] == 0.25 and one["relabelling_p"] == 1  # a constant router is as good under any assignment
    assert one["by_label"][0].pop("by_layer") == [[1, 0, 0, 0]] * 2
    assert one["by_label"][0] == {
        "name": "logic", "samples": 1, "tokens": 3, "usage": [1, 0, 0, 0], "interval": [[1, 1], [0, 0], [0, 0], [0, 0]],
    }  # fmt: skip


# ---------------------------------------------------------------------- samples and positions


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(dtype=torch.float32, vocab_size=len(tokenizer))


RECORD = Record("What is 2 and 3?", "The sum is 5. They agree.", [Span(0, 13, "MD"), Span(13, 25, "ToM")], "sums")


def test_the_header_of_the_answer_counts_as_answer(tokenizer):
    samples = drawn_samples([RECORD], tokenizer, what="t")
    ids = samples.rows[0][1]["input_ids"]
    prompt = tokenizer.apply_chat_template(RECORD.messages()[:-1], tokenize=False)
    assert ids[: samples.spans[0][0] + 1] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids[samples.spans[0][0] + 1 :]).startswith("<|im_start|>assistant\nThe sum")
    batch = {"input_ids": torch.tensor([[*ids, 0, 0]]), "attention_mask": torch.tensor([[1] * len(ids) + [0, 0]])}
    counted = samples.counted([0], batch)[0].nonzero()[:, 0].tolist()
    assert counted == list(range(samples.spans[0][0], len(ids) - 1))  # offset to S-2; padding never


def test_a_prompt_that_looks_like_a_special_token_has_the_same_offset_rule(tokenizer):
    record = Record("Say <|im_end|> twice", RECORD.assistant, RECORD.spans)
    samples = drawn_samples([record], tokenizer, what="t")
    ids = samples.rows[0][1]["input_ids"]
    assert tokenizer.decode(ids[samples.spans[0][0] + 1 :]).startswith("<|im_start|>assistant\nThe sum")


def test_trained_tokens_only_when_asked(tokenizer):
    samples = drawn_samples([RECORD], tokenizer, what="t", positions="answer")
    row = encode(RECORD, tokenizer)
    batch = {k: torch.tensor([v]) for k, v in row.items()}
    wanted = [s for s in range(len(row["labels"]) - 1) if row["labels"][s + 1] != -100]
    assert samples.counted([0], batch)[0].nonzero()[:, 0].tolist() == wanted


def test_texts_count_from_the_start_and_pairs_from_their_prompt(tokenizer):
    text, prompt = "The sum of 12 and 7 is 19.", "The sum of 12"
    whole = drawn_samples([text], tokenizer, what="t")
    pair = drawn_samples([(prompt, text[len(prompt) :])], tokenizer, what="t")
    assert whole.rows[0][1]["input_ids"] == pair.rows[0][1]["input_ids"]
    assert (whole.spans[0][0], pair.spans[0][0]) == (0, len(tokenizer(prompt)["input_ids"]) - 1)


def test_at_most_so_many_samples_are_drawn_and_the_draw_is_fixed(tokenizer):
    texts = [f"text number {i}" for i in range(50)]
    first, second = (drawn_samples(texts, tokenizer, what="t", max_samples=9).drawn for _ in range(2))
    assert first == second == sorted(set(first)) and len(first) == 9 and max(first) > 9
    assert drawn_samples(texts, tokenizer, what="t", max_samples=9, sample_seed=1).drawn != first
    with pytest.raises(ValueError, match="fewer than two tokens after its prompt"):
        drawn_samples([("all of it", "")], tokenizer, what="t")
    assert len(drawn_samples(texts, tokenizer, what="t").drawn) == 50


def test_bad_data_is_refused(tokenizer, model):
    with pytest.raises(ValueError, match="mixes records, texts"):
        drawn_samples(["a b", RECORD], tokenizer, what="t")
    with pytest.raises(ValueError, match="positions must be one of published, answer"):
        drawn_samples([RECORD], tokenizer, what="t", positions="all")
    with pytest.raises(ValueError, match="1 names for 2 items"):
        routing(model, tokenizer, ["a b", "c d"], groups=["one"])


def test_a_report_says_what_was_left_out_and_reads_back(model, tokenizer, tmp_path):
    report = routing(model, tokenizer, [RECORD, RECORD], draws=40)
    assert report.settings["layers_excluded"] == []  # two layers: all count, and it says so
    assert report.settings["bootstrap_draws"] == 40 and report.settings["sample_seed"] == 42
    assert report.by_group[0]["name"] == "sums"
    assert [g["name"] for g in report.by_label] == ["logic", "social", "language"]  # language: the end of the turn
    report.save(tmp_path)
    assert RoutingReport.load(tmp_path) == report
    counts = SampleCounts.load_file(tmp_path / "routing.npz")
    assert usage_numbers(counts, 1, 40, 0)["usage"] == report.usage  # the numbers follow from the saved counts
    assert (tmp_path / "routing_layers.csv").read_text().count("\n") == 3
    assert (tmp_path / "routing_groups.csv").read_text().count("\n") == 1 + 4 * E
    json.loads((tmp_path / "routing.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    (tmp_path / "routing.npz").write_bytes(b"none")
    with pytest.raises(ValueError, match="no routing counts"):
        SampleCounts.load_file(tmp_path / "routing.npz")


def test_the_report_agrees_with_usage_counts(model, tokenizer):
    from micro.analysis import usage_counts

    report = routing(model, tokenizer, [RECORD], draws=20)
    samples = drawn_samples([RECORD], tokenizer, what="t")
    ids = torch.tensor([samples.rows[0][1]["input_ids"]])
    with torch.no_grad():
        trace = model.model(input_ids=ids, use_cache=False, output_routing=True).routing
    np.testing.assert_array_equal(report.counts.usage[0], usage_counts(trace.logits[:, 0], samples.spans[0][0]))


def test_two_experts_per_token_are_stated(model, tokenizer):
    report = routing(model, tokenizer, ["The sum of 12 and 7 is 19."], controls={"experts_per_token": 2}, draws=20)
    assert report.settings["usage"] == "mean probabilities"
    assert np.sum(report.load_share, axis=1) == pytest.approx([1, 1])
    assert max(np.ravel(report.load_share)) <= 0.5  # a token chooses an expert once


def test_labels_of_four_experts_are_not_compared_with_two(tokenizer):
    two = small_model(dtype=torch.float32, vocab_size=len(tokenizer), num_experts=2)
    report = routing(two, tokenizer, [RECORD], draws=20)
    assert report.accuracy is None and report.settings["labels_compared"] is False
    assert sum(report.usage) == pytest.approx(1)


@pytest.mark.filterwarnings("error")
def test_figures_fit_their_pages(model, tokenizer, tmp_path):
    from micro.analysis.routes.figures import flow_figure, groups_figure, layer_maps_figure, layers_figure

    report = routing(
        model, tokenizer, [RECORD, RECORD], groups=["a name that is much too long for a bar", "b"], draws=20
    )
    drawn = (report.plot(), *(f(report) for f in (layers_figure, groups_figure, layer_maps_figure, flow_figure)))
    for i, figure in enumerate(drawn):
        figure.savefig(tmp_path / f"{i}.png")
    for ax in [*drawn[3].axes, drawn[4].axes[0]]:
        assert ax.get_ylim()[0] < ax.get_ylim()[1]  # layer 0 at the bottom
    bare = routing(model, tokenizer, ["The sum of 12 and 7."], draws=20)
    for figure in (groups_figure, layer_maps_figure):
        with pytest.raises(ValueError, match="neither groups nor labels"):
            figure(bare)
