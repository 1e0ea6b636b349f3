"""Shapley values of cells from sampled orders: they converge to the exact ones of a planted function."""

import numpy as np
import pytest
from planted_suites import Planted, model

from micro.analysis.ablations.cell_shapley_report import CellShapleyReport, cell_shapley
from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.ablations.shapley import shapley_values

LAYERS = 5


def loss(gone, record):
    """Logic: a loss per layer, and one more where both layers 1 and 2 lack it. World: layer 4 distracts."""
    return 2 + record / 10 + gone[:, 0] @ [0.1, 0.5, 0.5, 0, 0.2] + 0.6 * (gone[1, 0] and gone[2, 0]) - 0.3 * gone[4, 2]


def exact(expert):
    table = []
    for mask in range(1 << LAYERS):
        gone = np.zeros((LAYERS, 4), bool)
        gone[:, expert] = [not mask >> l & 1 for l in range(LAYERS)]
        table.append(-loss(gone, 0))
    return shapley_values(table)


def test_values_converge_to_the_exact_ones_and_sum_to_the_whole_expert():
    report = cell_shapley(model(layers=LAYERS), Planted(loss, names=["a", "b"], layers=LAYERS), orders=300)
    for e in range(4):
        got = np.asarray(report.values)[:, :, e]
        assert np.abs(got - exact(e)).max() < 0.05
        assert (np.abs(got - exact(e)) <= 4 * np.asarray(report.error)[:, :, e] + 1e-9).all()
        assert got.sum(1) == pytest.approx([row[e] for row in report.whole], abs=1e-9)
    assert report.whole[0] == pytest.approx([1.9, 0, -0.3, 0])


def test_only_the_asked_experts_are_scored_and_truncation_saves_conditions():
    full, short = (Planted(loss, layers=LAYERS) for _ in range(2))
    exactly = cell_shapley(model(layers=LAYERS), full, ["world"], orders=20)
    cut = cell_shapley(model(layers=LAYERS), short, ["world"], orders=20, truncate=0.01)
    for call in full.calls:
        removed = call.get("ablate", ["world"])
        assert set(map(str, removed.values() if isinstance(removed, dict) else [removed])) == {"['world']"}
    assert len(short.calls) < len(full.calls)
    assert np.abs(np.subtract(exactly.values, cut.values)).max() < 1e-9
    with pytest.raises(ValueError, match="unknown expert 'nobody'"):
        cell_shapley(model(), Planted(loss), ["nobody"])


def test_a_stopped_run_goes_on_and_reads_back(tmp_path):
    suite, one = Planted(loss, layers=LAYERS, fingerprint="v1"), model(layers=LAYERS)
    first = cell_shapley(one, suite, ["logic"], orders=6, store=ScoreStore(tmp_path / "scores"))
    suite.calls.clear()
    again = cell_shapley(one, suite, ["logic"], orders=6, store=ScoreStore(tmp_path / "scores"))
    assert not suite.calls and again == first
    first.save(tmp_path)
    assert CellShapleyReport.load(tmp_path) == first
    assert len(first.plot().axes) == 1 and len(first.table()) == LAYERS


def test_one_pair_of_orders_has_no_standard_error_and_is_refused():
    with pytest.raises(ValueError, match="orders is 2, expected at least 4"):
        cell_shapley(model(layers=LAYERS), Planted(loss, layers=LAYERS), orders=2)
