"""What the replication is made of: the plan, the text, the items of held-out answers, the recipes of the arms."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_model

from benchmarks.replication import arms, corpus, data, measure
from benchmarks.replication.data import Items
from benchmarks.replication.plan import ARMS, FULL, NANO, OWN, SMOLLM2, Job, Plan, jobs
from micro.data import Record, Span
from micro.data.generators import TEMPLATES
from micro.experts import LABELS, NAMES
from micro.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_the_plan_is_what_was_asked_for() -> None:
    found = jobs(FULL)
    seeds = {arm.name: sum(job.arm is arm for job in found) for arm in ARMS}
    assert seeds == {"micro": 5, "random": 5, "straight_through": 3, "mob": 3, "moe": 3, "micro_moe": 3, "dense": 3}
    assert [job.name for job in found if job.setup is SMOLLM2] == ["smollm2-micro-s0", "smollm2-random-s0"]
    names = [job.name for job in found]
    assert len(set(names)) == len(names) == 27
    for job in found:
        assert job.source is None or names.index(job.source) < names.index(job.name)
    assert FULL.budget.training_tokens == 300_000
    assert FULL.draws == 10_000
    changed = replace(FULL, setups=(replace(OWN, rows=9), SMOLLM2))
    assert isinstance(changed, Plan) and changed.digest != FULL.digest == replace(FULL).digest


@pytest.mark.parametrize("setup", [OWN, SMOLLM2, NANO.setups[0]], ids=lambda setup: setup.name)
def test_held_out_answers(setup: Any) -> None:
    records = data.held_out_records(setup)
    assert records == data.held_out_records(setup)
    seen = {name for record in records for name in record.meta["templates"]}
    trained = {name for record in data.training_records(setup, 0) for name in record.meta["templates"]}
    assert not seen & trained
    for domain in NAMES:
        assert sum(name.startswith(f"{domain}.") for name in seen) >= 8
    with pytest.raises(ValueError, match="8 held-out templates"):
        data.held_out_records(replace(setup, test_records=2))


def test_every_token_of_a_sentence_belongs_to_it() -> None:
    records = data.held_out_records(NANO.setups[0])[:12]
    items = Items.of(records, TOKENIZER, max_length=2048, max_tokens=4000)
    texts = dict.fromkeys(range(len(items.items)), "")
    for batch in items.batches:
        inside = batch["items"] >= 0
        assert torch.equal(inside & (batch["labels"] == -100), torch.zeros_like(inside))
        for row in range(len(inside)):
            for index in batch["items"][row].unique().tolist():
                if index >= 0:
                    ids = batch["input_ids"][row][batch["items"][row] == index]
                    texts[index] += TOKENIZER.decode(ids)
                    labels = batch["routing_labels"][row][batch["items"][row] == index]
                    assert set(labels.tolist()) == {items.items[index].domain}
    spans = [
        (record, span, name)
        for record in records
        for span, name in zip(record.spans, record.meta["templates"], strict=True)
    ]
    assert len(spans) == len(texts)
    for (record, span, name), item, text in zip(spans, items.items, texts.values(), strict=True):
        assert text.strip() == record.assistant[span.start : span.end]
        assert (item.template, NAMES[item.domain]) == (name, name.split(".")[0])
    assert items.counts().sum() == sum(int((batch["items"] >= 0).sum()) for batch in items.batches)
    with pytest.raises(ValueError, match="does not fit into 60 tokens"):
        Items.of(records, TOKENIZER, max_length=60, max_tokens=4000)


def test_neighbours_of_one_domain_are_two_items() -> None:
    answer = "One is odd. Two is even."
    record = Record("Say.", answer, [Span(0, 11, LABELS[0]), Span(12, 24, LABELS[0])])
    places = data.span_of_token(record, TOKENIZER, 512)
    assert places is not None
    assert {0, 1} <= set(places.tolist()) <= {-1, 0, 1}


def test_losses_and_routes_of_items() -> None:
    records = data.held_out_records(NANO.setups[0])[:6]
    items = Items.of(records, TOKENIZER, max_length=2048, max_tokens=3000)
    model = small_model(dtype=torch.float32, vocab_size=len(TOKENIZER), max_position_embeddings=2048)
    sums, routed = measure.item_losses(model, items, {}), measure.item_routing(model, items)
    counts = items.counts()
    assert (routed.sum(-1) == counts[:, None]).all()
    # One record by itself, by hand.
    batch = next(b for b in items.batches if (b["items"] == 0).any())
    row = int((batch["items"] == 0).any(1).nonzero()[0])
    length = int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row : row + 1, :length]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double().log_softmax(-1)
    place = (batch["items"][row, :length] == 0).nonzero()[:, 0]
    expected = -sum(float(logits[s - 1, ids[0, s]]) for s in place.tolist())
    assert sums[0] == pytest.approx(expected, rel=1e-4)
    ablated = measure.item_losses(model, items, {"ablate": ["logic"]})
    assert np.abs(ablated - sums).max() > 1e-3
    kept = measure.kept_items(items, 1)
    assert len({items.items[i].template for i in kept}) == len(kept)
    routes = measure.token_routes(model, items, kept)
    assert [len(line) for line in routes] == [sum(counts[kept])] * 2
    for layer, line in enumerate(routes):
        at = 0
        for item in kept:
            chosen = np.bincount([int(c) for c in line[at : at + counts[item]]], minlength=4)
            assert (chosen == routed[item, layer]).all()
            at += counts[item]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = measure.fresh_router_routes(model, items, kept, seed=5)
    assert fresh != routes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert measure.token_routes(model, items, kept) == routes


def test_arms_of_a_seed_share_what_they_should(tmp_path: Path) -> None:
    recipes = {
        arm.name: arms.recipe(Job(OWN, arm, 3), "b", tmp_path / "records.jsonl", tmp_path / "chats.jsonl")
        for arm in ARMS
    }
    micro, random = recipes["micro"], recipes["random"]
    assert [s.name for s in micro.stages] == ["induce", "calibrate", "finish"]
    assert [s.experts_per_token for s in micro.stages] == [2, 2, 1]
    assert [s.trainable for s in micro.stages] == ["experts", "routers", "everything"]
    assert random.stages[0].random_labels and not micro.stages[0].random_labels
    assert replace(random.stages[0], random_labels=False) == micro.stages[0]
    assert random.stages[1:] == micro.stages[1:]
    for name in ("mob", "moe", "dense"):
        (stage,) = recipes[name].stages
        assert [(s.path.rsplit("/")[-1], s.repeat) for s in stage.data] == [("records.jsonl", 2), ("chats.jsonl", 1)]
        assert (stage.epochs, stage.learning_rate) == (1, micro.stages[0].learning_rate)
    assert recipes["moe"].stages[0].losses == {"load_balancing_loss": 0.001}
    branch = recipes["straight_through"]
    assert branch.stages == micro.stages[2:]
    assert branch.seed == micro.seed + 2  # stage 3 visits its rows in the order of (seed + stage index)
    assert {recipe.seed for name, recipe in recipes.items() if name != "straight_through"} == {3}
    shared = ("batch_size", "max_length", "precision", "warmup", "weight_decay", "freeze", "backbone")
    for recipe in recipes.values():
        assert [getattr(recipe, name) for name in shared] == [getattr(micro, name) for name in shared]


def test_the_pretraining_text_holds_no_template() -> None:
    """No phrase of a labelled answer, so that experts learn those with their labels."""
    fixed = {
        max(re.split(r"\{\w+\}", template.answer), key=len).strip()
        for splits in TEMPLATES.values()
        for templates in splits.values()
        for template in templates
    }
    text = "\n".join(islice(corpus.scenes(), 3000))
    assert [phrase for phrase in fixed if len(phrase) > 14 and phrase in text] == []


def test_missing_text_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "FORTUNES", tmp_path / "none")
    monkeypatch.setattr(corpus, "WORDNET", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = corpus.collect(share=0.01)
    assert found.missing == ["fortunes", "wordnet-base", "bible-kjv"]
    assert found.documents and found.documents == corpus.collect(share=0.01).documents
