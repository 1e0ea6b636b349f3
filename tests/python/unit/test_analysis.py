import numpy as np
import pytest
import torch

from micro.analysis import AblationReport, RoutingReport, majority_vote, usage_counts
from micro.analysis.figures import depth_upward, heat_map, new_figure, shown_order
from micro.analysis.modes import evaluating
from micro.analysis.result import plain
from micro.analysis.routes.counting import counted_layers, entropy
from micro.analysis.statistics import bootstrap
from micro.experts import NAMES


def one_hot(ids, experts=4):
    return np.eye(experts)[np.asarray(ids)]


def test_usage_counts_the_slots_that_predict_an_answer_token():
    logits = one_hot([[0, 1, 2, 3, 0], [3, 3, 1, 1, 2]])
    assert usage_counts(logits, offset=1).tolist() == [[0, 1, 1, 1], [0, 2, 0, 1]]
    assert usage_counts(logits).sum() == 2 * 4  # the last slot predicts nothing, also for offset 0


def test_usage_of_an_ablated_expert_is_zero():
    logits = np.random.default_rng(0).normal(size=(3, 9, 4))
    logits[..., 2] = -np.inf
    assert usage_counts(logits)[:, 2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("offset", [-1, 5])
def test_an_offset_outside_the_sample_is_refused(offset):
    with pytest.raises(ValueError, match=r"offset must lie in 0\.\.4"):
        usage_counts(np.zeros((2, 5, 4)), offset)


def test_the_vote_goes_to_the_most_frequent_expert_and_ties_to_the_lower_id():
    logits = one_hot([[3, 1, 0], [3, 2, 1], [0, 2, 2], [1, 1, 3]])
    assert majority_vote(logits).tolist() == [3, 1, 0]


def test_the_first_and_last_two_layers_do_not_count():
    assert counted_layers(30) == list(range(2, 28))
    assert counted_layers(4) == [0, 1, 2, 3]


def test_entropy_of_a_certain_and_an_even_choice():
    assert entropy([1.0, 0.0]) == 0
    assert entropy([0.25] * 4) == pytest.approx(np.log(4))


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        sample = generator.normal(size=40)
        low, high = bootstrap(40, lambda w, s=sample: np.asarray(w @ s / w.sum()), draws=300, seed=seed)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def routing_report():
    confusion = np.broadcast_to(0.4 * np.eye(4) + 0.15, (6, 4, 4)).tolist()
    group = {"name": "sums", "samples": 3, "tokens": 90, "usage": [0.25] * 4, "interval": [[0.2, 0.3]] * 4}
    return RoutingReport(
        experts=list(NAMES),
        samples=3,
        tokens=90,
        layers_counted=[2, 3],
        usage=[0.25] * 4,
        usage_interval=[[0.2, 0.3]] * 4,
        usage_by_layer=[[0.25] * 4] * 6,
        usage_by_layer_interval=[[[0.2, 0.3]] * 4] * 6,
        decision_entropy=[1.0] * 6,
        decision_entropy_interval=[[0.9, 1.1]] * 6,
        usage_entropy=[1.2] * 6,
        usage_entropy_interval=[[1.1, 1.3]] * 6,
        mutual_information_interval=[[0.1, 0.3]] * 6,
        load_share=[[0.25] * 4] * 5 + [[0.5, 0.5, 0.0, 0.0]],
        load_variation=[0.0] * 5 + [1.0],
        load_variation_interval=[[0.0, 0.1]] * 5 + [[1.0, 1.0]],
        transitions=[[[1 / 16] * 4] * 4] * 5,
        together=(0.75 * np.eye(6) + 0.25).tolist(),
        together_chance=[[0.25] * 6] * 6,
        by_group=[group],
        by_label=[group | {"name": "logic"}],
        labelled_tokens=[9] * 4,
        confusion=confusion,
        accuracy=0.55,
        accuracy_interval=[0.5, 0.6],
        accuracy_by_layer=[0.55, 0.6, 0.5, 0.5, 0.5, 0.5],
        accuracy_by_layer_interval=[[0.4, 0.7]] * 6,
        relabelling_p=1 / 24,
    )


def ablation_report():
    rise = [[0.0, 0.5, 0.1, 0.1, 0.1], [0.0, 0.1, -0.2, 0.1, 0.3]]
    return AblationReport(
        ["logic", "social"], ["none", *NAMES], [[1.0] * 5] * 2, rise, [[[0.0, 1.0]] * 5] * 2, 3, [9, 9]
    )


def test_a_report_reads_back_what_it_wrote(tmp_path):
    for report in (routing_report(), ablation_report()):
        report.save(tmp_path)
        assert type(report).load(tmp_path) == report
        assert (tmp_path / f"{report.name}.csv").read_text().count("\n") == len(report.table()) + 1
        assert not list(tmp_path.glob(".*"))


def test_another_kind_of_result_is_refused(tmp_path):
    routing_report().save(tmp_path)
    with pytest.raises(ValueError, match=r"routing\.json.*kind 'ablation'"):
        AblationReport.load(tmp_path / "routing.json")


def test_best_layer_information_and_verdict():
    report = routing_report()
    assert report.best_layer == 1
    assert report.mutual_information == pytest.approx([0.2] * 6)
    assert ablation_report().own_domain_is_worst == {"logic": True, "social": False}


def test_the_routing_report_names_dead_cells_and_fair_shares():
    report = routing_report()
    assert report.dead_cells == [(5, "world"), (5, "language")]
    assert report.utilisation[5] == [2, 2, 0, 0]
    assert report.table()["utilisation"].tolist() == [1] * 4  # layers 2 and 3
    layers, groups = report.layer_table(), report.group_table()
    assert layers["dead_experts"].tolist() == [0] * 5 + [2]
    assert layers["counted"].tolist() == [False, False, True, True, False, False]
    assert list(zip(groups["by"], groups["group"], strict=True))[::4] == [("group", "sums"), ("label", "logic")]
    assert "layers 2..3 of 6" in str(report) and "dead cells (layer, expert): 2 of 24" in str(report)


def test_reports_draw_themselves():
    assert len(routing_report().plot().axes) == 2
    assert len(ablation_report().plot().axes) == 1


def test_a_heat_map_writes_its_numbers_and_depth_grows_upward():
    (ax,) = new_figure(4, 4)[1]
    values = [[0.1, None], [-0.95, 0.5], [0.0, 1.0]]
    heat_map(ax, values, ["0", "1", "2"], ["a", "b"], signed=True, starred=np.array([[True, False]] * 3))
    depth_upward(ax, 3)
    assert [text.get_text() for text in ax.texts] == ["+0.10*", "", "-0.95*", "+0.50", "+0.00*", "+1.00"]
    assert ax.texts[2].get_color() == "white" and ax.texts[3].get_color() == "black"
    assert ax.get_ylim() == (-0.5, 2.5)
    assert ax.images[0].get_array()[2, 1] == 1.0  # the numbers stay with their rows


def test_names_stand_in_the_order_of_all_figures():
    names = ["tail", "social", "other", "language", "world", "logic"]
    assert [names[i] for i in shown_order(names)] == ["language", "logic", "social", "world", "tail", "other"]


def test_a_model_is_measured_without_noise_and_gradient_and_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.9))
    for training in (True, False):
        model.train(training)
        with pytest.raises(KeyError), evaluating(model):
            assert not any(part.training for part in model.modules())
            assert not model(torch.ones(1, 2)).requires_grad
            raise KeyError
        assert all(part.training is training for part in model.modules())
    with evaluating(object()):  # what is no module has no mode
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_pass_over_batches_leaves_gradients_to_its_caller():
    from small_models import small_model

    from micro.analysis.routes.passes import sentence_samples, traces
    from micro.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = small_model(vocab_size=len(tokenizer), jitter_noise=0.1).train()
    samples = sentence_samples(["The key is here.", "Who is sad?"], tokenizer, what="t", chat=False)
    passes = traces(model, samples, tokenizer, max_tokens=8)
    next(passes)
    assert torch.is_grad_enabled() and not model.training
    passes.close()
    assert torch.is_grad_enabled() and model.training


def test_numbers_of_a_result_are_plain():
    values = [np.float32(0.5), np.array([[1.0, np.nan]]), (np.int64(3), None, "a"), float("nan"), True]
    got = plain(values)
    assert got == [0.5, [[1.0, None]], [3, None, "a"], None, True]
    assert type(got[2][0]) is int and type(got[0]) is float
