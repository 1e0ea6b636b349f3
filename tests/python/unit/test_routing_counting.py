"""Counts of first choices on arrays with ties, holes and other types."""

import numpy as np
import pytest
import torch

from micro import ops
from micro.analysis import majority_vote, usage_counts


def by_hand(logits, offset=0):
    """Loops over everything, in plain Python."""
    layers, slots, experts = len(logits), len(logits[0]), len(logits[0][0])
    counts = [[0] * experts for _ in range(layers)]
    for layer in range(layers):
        for slot in range(offset, slots - 1):
            best = 0
            for e in range(1, experts):
                if logits[layer][slot][e] > logits[layer][slot][best]:
                    best = e
            counts[layer][best] += 1
    return counts


def votes_by_hand(logits):
    out = []
    for slot in range(len(logits[0])):
        tally = [0] * len(logits[0][0])
        for layer in logits:
            tally[max(range(len(tally)), key=lambda e: (layer[slot][e], -e))] += 1
        out.append(tally.index(max(tally)))
    return out


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 4), (2, 40, 4), (30, 5, 4), (6, 9, 2), (5, 8, 16)])
def test_counts_and_votes_agree_with_loops_where_ties_are_common(shape, seed):
    generator = np.random.default_rng(seed)
    logits = generator.integers(-2, 3, size=shape).astype(float)
    logits[generator.uniform(size=shape) < 0.2] = -np.inf
    logits[..., generator.integers(shape[-1])] = generator.integers(-2, 3, size=shape[:2])  # one is always left
    offset = int(generator.integers(shape[1]))
    assert usage_counts(logits, offset).tolist() == by_hand(logits, offset)
    assert majority_vote(logits).tolist() == votes_by_hand(logits)


def test_the_first_choice_is_that_of_the_model():
    logits = torch.randn(64, 4) * torch.logspace(-8, 2, 64)[:, None]
    ids = ops.route(logits, 1).ids[:, 0]
    counts = usage_counts(torch.cat([logits, logits[:1]])[None])
    assert counts[0].tolist() == torch.bincount(ids, minlength=4).tolist()


@pytest.mark.parametrize("offset", [0, 3, 5, 6])
def test_each_layer_sums_to_the_slots_that_predict_an_answer(offset):
    counts = usage_counts(np.random.default_rng(0).normal(size=(5, 7, 4)), offset)
    assert counts.shape == (5, 4) and counts.dtype == np.int64
    assert counts.sum(1).tolist() == [6 - offset] * 5


def test_the_last_slot_never_counts():
    logits = np.zeros((1, 3, 2))
    logits[0, 2] = [np.nan, np.nan]  # what stands there does not matter
    logits[0, 1] = [0, 1]
    assert usage_counts(logits).tolist() == [[1, 1]]
    assert usage_counts(logits, 2).tolist() == [[0, 0]]
    assert usage_counts(np.zeros((3, 1, 4))).tolist() == [[0] * 4] * 3
    assert usage_counts(np.zeros((3, 0, 4))).tolist() == [[0] * 4] * 3
    assert majority_vote(np.zeros((3, 0, 4))).shape == (0,)


def test_nan_never_wins_and_minus_infinity_loses_to_every_number():
    logits = np.array([[[np.nan, -5.0, -9.0], [-np.inf, np.nan, -1e30], [np.inf, 7.0, np.inf], [0, 0, 0]]])
    assert usage_counts(logits).tolist() == [[1, 1, 1]]
    assert majority_vote(logits).tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("hole", [np.nan, -np.inf])
def test_a_slot_without_any_expert_is_refused_by_name(hole):
    logits = np.zeros((3, 4, 2))
    logits[1, 2] = hole
    for call in (usage_counts, majority_vote):
        with pytest.raises(ValueError, match="layer 1, slot 2"):
            call(logits)
    with pytest.raises(ValueError, match="layer 1, slot 2"):
        usage_counts(logits, 1)


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "int64", "bool", "bf16", "lists", "grad"])
def test_types_that_hold_the_same_numbers_give_the_same_counts(kind):
    numbers = np.random.default_rng(3).integers(0, 2, size=(4, 9, 4))
    given = {
        "bf16": lambda: torch.tensor(numbers).bfloat16(),
        "lists": lambda: numbers.tolist(),
        "grad": lambda: torch.tensor(numbers, dtype=torch.float32, requires_grad=True),
    }.get(kind, lambda: numbers.astype(kind))()
    assert usage_counts(given, 2).tolist() == by_hand(numbers.tolist(), 2)
    assert majority_vote(given).tolist() == votes_by_hand(numbers.tolist())


def test_what_is_given_is_not_changed_and_need_not_be_contiguous():
    logits = np.random.default_rng(4).normal(size=(4, 9, 5))
    logits[0, 0, 0] = np.nan
    before = logits.copy()
    assert usage_counts(logits.transpose(2, 1, 0)).tolist() == usage_counts(logits.transpose(2, 1, 0).copy()).tolist()
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("offset", [-1, 5, 10**9])
def test_an_offset_outside_is_refused(offset):
    with pytest.raises(ValueError, match=r"offset must lie in 0\.\.4"):
        usage_counts(np.zeros((2, 5, 4)), offset)


@pytest.mark.parametrize("offset", [1.0, True, "1", None])
def test_an_offset_that_is_no_slot_number_is_refused(offset):
    with pytest.raises(TypeError):
        usage_counts(np.zeros((2, 5, 4)), offset)
    assert usage_counts(np.zeros((2, 5, 4)), np.int64(1)).sum() == 6


@pytest.mark.parametrize("shape", [(5, 4), (1, 2, 5, 4), (0, 5, 4), (2, 5, 0)])
def test_other_shapes_are_refused(shape):
    for call in (usage_counts, majority_vote):
        with pytest.raises(ValueError, match="router_logits"):
            call(np.zeros(shape))


def test_words_are_no_logits():
    with pytest.raises(TypeError, match="real numbers"):
        usage_counts([[["a", "b"]]])
    with pytest.raises(TypeError, match="real numbers"):
        majority_vote(np.zeros((1, 2, 2), complex))
