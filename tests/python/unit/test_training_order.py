"""Rows in few bytes, the order of a run, random labels, metrics files."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from micro.training.metrics import MetricsWriter, flat
from micro.training.order import RowBuilder, Rows, WindowSampler
from micro.training.statistics import RoutingStatistics


def rows(count: int = 23, **options: int) -> Rows:
    builder = RowBuilder()
    generator = np.random.default_rng(0)
    for _ in range(count):
        ids = generator.integers(0, 60000, generator.integers(3, 30)).tolist()
        labels = [-100] * 2 + ids[2:]
        builder.add({"input_ids": ids, "labels": labels, "routing_labels": [i % 4 for i in ids]})
    return builder.build(**options)


def test_rows_come_back_as_they_were() -> None:
    data = rows()
    assert len(data) == 23
    first = data[0]
    assert first["labels"][:2] == [-100, -100]
    assert first["labels"][2:] == first["input_ids"][2:]
    assert first["routing_labels"] == [i % 4 for i in first["input_ids"]]
    assert first["attention_mask"] == [1] * len(first["input_ids"])
    assert data.tokens == sum(len(data[i]["input_ids"]) for i in range(23))
    assert data.targets == data.tokens - 2 * 23


def test_labels_must_be_ids() -> None:
    with pytest.raises(ValueError, match="input_ids, or -100"):
        RowBuilder().add({"input_ids": [1, 2], "labels": [1, 3]})


def test_repeat_takes_rows_again() -> None:
    builder = RowBuilder()
    builder.add({"input_ids": [1], "labels": [1]})
    builder.add({"input_ids": [2, 3], "labels": [-100, 3]})
    builder.repeat(1, 3)
    data = builder.build()
    assert [row["input_ids"] for row in (data[i] for i in range(len(data)))] == [[1], [2, 3], [2, 3], [2, 3]]


def test_digest_sees_every_part() -> None:
    base = rows()
    changed = [rows() for _ in range(3)]
    changed[0].ids[5] += 1
    changed[1].trained[5] ^= True
    changed[2].routing[5] ^= 1
    assert rows().digest() == base.digest()
    assert len({base.digest(), *(other.digest() for other in changed)}) == 4


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    data = rows()

    def order(seed: int, epoch: int) -> list[int]:
        sampler = WindowSampler(data.lengths, 6, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0)) == list(range(23))
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4


def test_windows_hold_the_same_rows_whatever_the_grouping() -> None:
    """Sorting by length happens inside a window: which rows make up a step is the plain shuffle's choice."""
    data = rows()
    grouped = list(WindowSampler(data.lengths, 6, 3))
    plain = np.random.default_rng([3, 0]).permutation(23)
    for begin in range(0, 23, 6):
        window = grouped[begin : begin + 6]
        assert sorted(window) == sorted(plain[begin : begin + 6].tolist())
        lengths = [int(data.lengths[i]) for i in window]
        assert lengths == sorted(lengths, reverse=True)


def test_random_labels_are_uniform_and_drawn_again_at_every_visit() -> None:
    data = rows(400, random_labels=4, seed=1)
    first = [data[i]["routing_labels"] for i in range(400)]
    assert [data[i]["routing_labels"] for i in range(400)] == first
    data.set_epoch(1)
    again = [data[i]["routing_labels"] for i in range(400)]
    flat_first, flat_again = list(chain.from_iterable(first)), list(chain.from_iterable(again))
    counts = np.bincount(flat_first, minlength=4) / len(flat_first)
    # 4 sigma of a share of 1/4 among N tokens; the two draws agree by chance in a quarter of them.
    bound = 4 * (3 / 16 / len(flat_first)) ** 0.5
    assert np.abs(counts - 0.25).max() < bound
    assert abs(np.mean(np.equal(flat_first, flat_again)) - 0.25) < bound


class Trace:
    """What the statistics read of a RoutingTrace: two layers, one row of four slots, the last one padding."""

    ids = torch.tensor([[[[0], [1], [1], [3]]], [[[2], [2], [1], [3]]]])
    weights = torch.ones(2, 1, 4, 1)
    probs = torch.nn.functional.one_hot(ids[..., 0], 4).float()
    mask = torch.tensor([[True, True, True, False]])


def test_routing_statistics_by_hand() -> None:
    statistics = RoutingStatistics(2, 4, 3)
    assert statistics.summary() is None
    labels = torch.tensor([[-100, 7, 7, 7]])
    statistics.add(Trace(), labels, torch.tensor([[0, 1, 2, 3]]))  # type: ignore[arg-type]
    summary = statistics.summary()
    assert summary is not None
    assert summary.load == [pytest.approx([1 / 3, 2 / 3, 0, 0]), pytest.approx([0, 1 / 3, 2 / 3, 0])]
    assert summary.mean_load == pytest.approx([1 / 6, 1 / 2, 1 / 3, 0])
    assert summary.decision_entropy == 0
    third = -(np.log(1 / 3) / 3 + np.log(2 / 3) * 2 / 3)
    assert summary.usage_entropy == pytest.approx(third, rel=1e-6)
    assert summary.label_accuracy_by_layer == [0.5, 0.0]
    assert summary.label_accuracy == 0.25


def test_load_of_labels_counts_the_prompt_as_language() -> None:
    statistics = RoutingStatistics(2, 4, 3)
    statistics.add_labels(torch.tensor([[-1, -1, 0, 2], [3, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    summary = statistics.summary()
    assert summary is not None
    assert summary.load == [pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])] * 2
    assert (summary.decision_entropy, summary.label_accuracy) == (0, None)


def record(stage: int, step: int) -> dict[str, object]:
    return {"stage": f"s{stage}", "stage_index": stage, "step": step, "loss": 1.5, "load": {"logic": 0.5}, "none": None}


def test_metrics_are_trimmed_to_the_place_that_is_resumed_from(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, ["csv"])
    for stage, step in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        writer.write(record(stage, step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage_index": 1, "st')  # killed here
    writer.trim(1, 1)
    writer.write(record(1, 2))
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage_index"], r["step"]) for r in kept] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    table = (tmp_path / "metrics.csv").read_text().splitlines()
    assert table[0] == "stage,stage_index,step,name,value"
    assert table[1:3] == ["s0,0,1,loss,1.5", "s0,0,1,load.logic,0.5"]
    assert len(table) == 1 + 2 * 4


def test_metrics_stay_json_for_numbers_that_are_none(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write({**record(0, 1), "loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_flat_names() -> None:
    assert flat({"a": 1, "b": {"c": [2, 3]}, "d": None}) == {"a": 1, "b.c.0": 2, "b.c.1": 3}
