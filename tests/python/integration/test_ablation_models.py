"""Ablations of whole models: routes replayed and free, conditions as rows of one batch, and the command."""

import json

import numpy as np
import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model

from micro import analysis, data, ops
from micro.analysis.ablations.replayed_routes import record_routes, replayed_routes, without
from micro.analysis.ablations.scores import ScoreStore
from micro.cli import main as cli
from micro.evaluation.candidates import CandidateScorer
from micro.experts import NAMES
from micro.modeling.controls import ControlReader
from micro.testing import tiny_tokenizer

REPLAY_SETS = ["logic", ["social", "language"], {0: ["world"], 1: ["logic", "social"]}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def records():
    return data.generate(6, split="test", seed=3)


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(dtype=torch.float32, vocab_size=len(tokenizer), num_hidden_layers=2)


@pytest.fixture(scope="module")
def suite(records, tokenizer):
    return analysis.LossSuite(records, tokenizer, max_tokens=256)


def padded(rows=3, slots=9):
    mask = torch.ones(rows, slots, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": random_ids(rows, slots), "attention_mask": mask, "use_cache": False}


def ablated(model, value):
    return ControlReader(model.config).tensor("ablate", value)


# ---------------------------------------------------------------- the choices that are replayed
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("ablate", REPLAY_SETS)
def test_choices_of_the_intact_run_with_the_next_best_in_place_of_ablated_ones(k, ablate):
    model = small_model()
    intact = model(**padded(), experts_per_token=k, output_routing=True).routing
    gone = ablated(model, ablate).expand(1, 2, 1, 4)
    got = without(intact, gone)
    logits = intact.logits.masked_fill(gone.transpose(0, 1).expand(intact.logits.shape), -torch.inf)
    want = ops.route(logits.flatten(0, 2), k)
    weighted = want.weights.view(got.ids.shape) > 0  # surplus places hold anybody
    assert torch.equal(got.ids[weighted], want.ids.view(got.ids.shape)[weighted])
    left = ~torch.gather(gone.transpose(0, 1).expand(intact.logits.shape), -1, intact.ids.long())
    untouched = left.all(-1)
    assert torch.equal(got.ids[untouched], intact.ids[untouched])
    assert (got.ids.long().sort(-1).values.diff(dim=-1) > 0).all()  # nobody twice


@pytest.mark.parametrize(("backbone", "kind"), ALL_FOUR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_without_ablation_is_bit_identical(backbone, kind, dtype):
    model = small_model(backbone, kind, dtype=dtype)
    for k in (1, 2):
        plain = model(**padded(), experts_per_token=k).logits
        with record_routes(model) as routes:
            recorded = model(**padded(), experts_per_token=k).logits
        with replayed_routes(model, routes):
            again = model(**padded(), experts_per_token=k).logits
            assert len(routes.calls) == 1
        assert torch.equal(plain, recorded) and torch.equal(plain, again)


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_replayed_and_free_routes_agree_in_the_first_layer_and_replayed_ones_hold_behind_it(kind):
    model = small_model(kind=kind, num_hidden_layers=4)
    intact = model(**padded(), output_routing=True).routing
    with record_routes(model) as routes:
        model(**padded())
    free = model(**padded(), ablate="logic", output_routing=True).routing
    with replayed_routes(model, routes):
        replayed = model(**padded(), ablate="logic", output_routing=True).routing
    assert torch.equal(free.ids[0], replayed.ids[0])
    held = (intact.ids != 0) & intact.mask[None, :, :, None]
    assert torch.equal(replayed.ids[held], intact.ids[held])
    assert not (replayed.ids[intact.mask.expand(4, -1, -1)] == 0).any()
    assert not torch.equal(free.ids[held], intact.ids[held])  # else the test shows nothing
    # By hand: the same as forcing every single choice.
    forced = model(**padded(), force=without(intact, ablated(model, "logic")).ids[..., 0].transpose(0, 1).long())
    with replayed_routes(model, routes):
        got = model(**padded(), ablate="logic").logits[intact.mask]
    assert torch.allclose(got, forced.logits[intact.mask], rtol=1e-6, atol=1e-6)  # 1e-9 in the weights


def test_held_choices_keep_their_weight_when_the_router_no_longer_wants_them():
    model = small_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.out_proj.weight.mul_(300)  # probabilities of other states fall far below 1e-9
    with record_routes(model) as routes:
        model(**padded())
    with replayed_routes(model, routes):
        trace = model(**padded(), ablate="logic", output_routing=True).routing
    assert float(trace.weights[trace.mask.expand(2, -1, -1)].min()) > 1 - 1e-8


@pytest.mark.parametrize("rule", ["renormalized", "probability"])
def test_two_experts_per_token_are_weighed_by_the_router_as_it_is(rule):
    model = small_model(weight_rule=rule)
    with record_routes(model) as routes:
        intact = model(**padded(), experts_per_token=2, output_routing=True).routing
    with replayed_routes(model, routes):
        got = model(**padded(), experts_per_token=2, ablate="social", output_routing=True).routing
    z = got.raw_logits.clone()
    z[..., NAMES.index("social")] = -torch.inf
    want = z.softmax(-1).gather(-1, got.ids.long())
    if rule == "renormalized":
        want = want / want.sum(-1, keepdim=True)
    real = intact.mask.expand(2, -1, -1)
    assert torch.allclose(got.weights[real], want[real], atol=1e-7)
    planned = without(intact, ablated(model, "social")).ids
    assert torch.equal(got.ids[real].sort(-1).values, planned[real].sort(-1).values)


def test_calls_with_a_cache_are_replayed_too():
    model = small_model()
    ids = random_ids(2, 10)

    def chunks(**controls):
        cache, parts = None, []
        for part in (ids[:, :4], ids[:, 4:9], ids[:, 9:]):
            out = model(part, past_key_values=cache, use_cache=True, **controls)
            cache = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1)

    with record_routes(model) as routes:
        intact = chunks()
    with replayed_routes(model, routes):
        assert torch.equal(chunks(), intact)
    with replayed_routes(model, routes):
        in_chunks = chunks(ablate="world")
    with record_routes(model) as whole:
        model(ids, use_cache=False)
    with replayed_routes(model, whole):
        assert torch.equal(in_chunks, model(ids, use_cache=False, ablate="world").logits)


class Choices:
    """Forced choices whose prompts share a beginning, which the scorer reads once and keeps."""

    task, names, records, higher_is_better, chance = "choices", ["right"], 6, True, 0.5

    def score(self, model, controls):
        ids = random_ids(6, 20).tolist()
        pairs = [([3, 4, 5] * 8 + row[:12], row[k:20]) for row in ids for k in (12, 16)]
        scores = CandidateScorer(model, controls=controls, max_tokens=200).score_ids(pairs)
        right = [a.value("tokens") > b.value("tokens") for a, b in zip(scores[::2], scores[1::2], strict=True)]
        return np.array(right, float)[:, None], np.ones((6, 1))


def test_a_scorer_that_reuses_prefixes_is_replayed():
    model = small_model(num_hidden_layers=3)
    report = analysis.routing_compensation(model, Choices(), draws=20)
    assert report.exact and [line["unit"] for line in report.lines] == ["points"] * 4
    one, scorer = random_ids(1, 9).tolist()[0], CandidateScorer(model, controls={"ablate": "logic"})
    pair = [(one[:5], one[5:])]
    with record_routes(model) as routes:
        CandidateScorer(model).score_ids(pair)
    with replayed_routes(model, routes):
        in_parts = scorer.score_ids(pair)[0].logprob
    with record_routes(model) as routes:
        model(torch.tensor([one]))
    with replayed_routes(model, routes):
        logits = model(torch.tensor([one]), ablate="logic").logits[0].detach().log_softmax(-1)
    assert in_parts == pytest.approx(float(sum(logits[t - 1, one[t]] for t in range(5, 9))), abs=1e-9)


def test_other_texts_or_another_number_of_calls_are_refused_and_nothing_stays():
    model = small_model()
    with record_routes(model) as routes:
        model(**padded())
    with pytest.raises(ValueError, match="other input"), replayed_routes(model, routes):
        model(random_ids(3, 9, seed=2))
    with pytest.raises(ValueError, match="fewer forward passes"), replayed_routes(model, routes):
        pass
    with pytest.raises(ValueError, match="every expert"), replayed_routes(model, routes):
        model(**padded(), keep=[])
    trace = model(**padded(), output_routing=True).routing
    with pytest.raises(ValueError, match="routes already"), replayed_routes(model, routes):
        model(**padded(), replay=trace)
    assert not model.model._forward_pre_hooks and not model.model._forward_hooks
    assert model(**padded(), ablate="logic").logits.isfinite().any()


# ---------------------------------------------------------------- reports of whole models
def test_conditions_as_rows_of_one_batch_have_the_bits_of_single_ones(model, suite):
    conditions = [{}, {"ablate": "logic"}, {"ablate": {1: ["world"]}}, {"ablate": ["logic", "social"]}]
    many = suite.score_many(model, conditions)
    for (sums, counts), controls in zip(many, conditions, strict=True):
        one_sums, one_counts = suite.score(model, controls)
        assert np.array_equal(sums, one_sums) and np.array_equal(counts, one_counts)
    mixed = [{"experts_per_token": 2}, {"ablate": "logic"}]  # not only ablate differs: one after the other
    assert np.array_equal(suite.score_many(model, mixed)[0][0], suite.score(model, mixed[0])[0])


def test_free_and_replayed_ablations_of_a_model_and_what_routing_makes_up_for(model, suite, tmp_path):
    store = ScoreStore(tmp_path / "scores")
    report = analysis.routing_compensation(model, suite, draws=200, store=store)
    assert report.exact and "bit for bit" in str(report)
    assert len(report.lines) == 16 and any(line["compensation"] != 0 for line in report.lines)
    free = analysis.ablation(model, suite, draws=200, store=store)
    for line in report.lines:
        row, condition = free.rows.index(line["task"]), free.conditions.index(line["ablated"])
        assert line["free"] == pytest.approx(free.rise[row][condition], abs=1e-12)
        assert line["compensation"] == pytest.approx(line["replayed"] - line["free"])
        assert line["low"] <= line["compensation"] <= line["high"]
        assert line["p"] <= line["p_holm"] <= 1
    report.save(tmp_path)
    assert analysis.CompensationReport.load(tmp_path) == report
    assert len(report.plot().axes) == 4
    files = len(list((tmp_path / "scores").glob("*.npz")))
    assert files == 10  # intact and four sets, both ways

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    again = ScoreStore(tmp_path / "scores")
    handle = model.model.register_forward_pre_hook(refuse)
    assert analysis.routing_compensation(model, suite, draws=200, store=again) == report
    handle.remove()


class Message:
    """Loss of token 5 behind any text: small where the message, dimension 1 of the residual stream, is there."""

    names, records = ["message"], 4

    def score(self, model, controls):
        with torch.no_grad():
            logits = model(random_ids(4, 6), use_cache=False, **controls).logits[:, -1]
        losses = torch.nn.functional.cross_entropy(logits, torch.full((4,), 5), reduction="none")
        return losses.double().numpy()[:, None], np.ones((4, 1))


def model_with_a_backup():
    """Logic of layer 0 writes the message. Layer 1 goes to social (which does nothing) where it finds the message, else
    to world, which writes it. Language does nothing anywhere and is second in layer 0.
    """
    model = small_model(hidden_size=32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, 0] = 1
        model.lm_head.weight[5, 1] = 4
        for layer, writer, router in zip(
            model.model.layers, (0, 2), ({0: (0, 2), 3: (0, 1)}, {1: (1, 1), 2: (0, 0.5)}), strict=True
        ):
            layer.router.in_proj.weight.copy_(torch.eye(32))
            for expert, (dimension, weight) in router.items():
                layer.router.out_proj.weight[expert, dimension] = weight
            layer.blocks.gate_proj.weight[writer, 0, 0] = layer.blocks.up_proj.weight[writer, 0, 0] = 1
            layer.blocks.down_proj.weight[writer, 1, 0] = 0.1
    return model


def test_a_planted_backup_is_what_routing_compensates():
    model = model_with_a_backup()
    routing = model(random_ids(1, 3), output_routing=True).routing
    assert routing.ids[0].eq(0).all() and routing.ids[1].eq(1).all()
    report = analysis.routing_compensation(model, Message(), draws=50)
    lines = {line["ablated"]: line for line in report.lines}
    uniform = np.log(61)
    assert lines["logic"]["free"] == pytest.approx(0, abs=0.01)  # ablation alone says that logic does nothing
    assert lines["logic"]["replayed"] == pytest.approx(uniform, abs=0.01)
    assert lines["logic"]["compensation"] == pytest.approx(uniform, abs=0.01)
    assert lines["logic"]["p"] == 0.125  # the least that four records can say
    for name in ("social", "world", "language"):
        assert lines[name]["compensation"] == 0 and lines[name]["p"] == 1
    both = analysis.routing_compensation(model, Message(), [["logic", "world"]], draws=50).lines[0]
    assert both["free"] == pytest.approx(uniform, abs=0.01) and both["compensation"] == pytest.approx(0, abs=1e-6)


def test_routers_that_see_nothing_cannot_compensate(tokenizer, records):
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer), num_hidden_layers=3)
    suite = analysis.LossSuite(records, tokenizer)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.router.out_proj.weight.zero_()
    with record_routes(model) as routes:
        suite.score(model, {})
    first_layer = {"ablate": {0: ["language"]}}
    with replayed_routes(model, routes):
        replayed = suite.score(model, first_layer)[0]
    assert np.array_equal(suite.score(model, first_layer)[0], replayed)


def test_cells_and_shapley_values_of_a_model(model, suite):
    store = ScoreStore()
    cells = analysis.cell_map(model, suite, store=store)
    assert np.shape(cells.rise) == (4, 2, 4) and len(cells.whole) == 16
    for row, cell in ((0, (0, 1)), (3, (1, 3))):
        sums, counts = suite.score(model, {"ablate": {cell[0]: [NAMES[cell[1]]]}})
        base = suite.score(model, {})[0]
        k = suite.names.index(cells.rows[row])
        want = (sums - base)[:, k].sum() / counts[:, k].sum()
        assert cells.rise[row][cell[0]][cell[1]] == pytest.approx(want, abs=1e-9)
    values = analysis.expert_shapley(model, suite, draws=100, store=store)
    size = model.config.vocab_size
    for r in range(4):
        assert sum(values.values[r]) == pytest.approx(values.worth[r][15] + np.log(size), abs=1e-9)


def test_the_command_writes_every_report(model, tokenizer, records, tmp_path, capsys, monkeypatch):
    folder, file, out = tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "out"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.save_records(records, file)
    arguments = ["ablate", str(folder), "--data", str(file), "-o", str(out)]
    drawn = []
    for module in ("ablate", "analysis_common"):
        monkeypatch.setattr(f"micro.cli.{module}.save_figure", lambda figure, path: drawn.append(path.name))
    options = ["--sets", "all", "--shapley", "--replayed", "--validation", "0.5", "--json"]
    assert cli.run([*arguments, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["ablation", "shapley", "routing_compensation"]
    assert len(printed["ablation"]["conditions"]) == 15
    assert drawn == ["ablation_bars", "ablation", "shapley", "routing_compensation"]
    assert {p.name for p in out.iterdir()} == {
        "scores",
        "ablation_tests.csv",
        "ablation_best.csv",
        "shapley_interactions.csv",
    } | {f"{name}.{suffix}" for name in printed for suffix in ("json", "csv")}
    assert cli.run([*arguments, "--cells", "--random-cells", "--validation", str(file)]) == 0
    shown = capsys.readouterr()
    assert "excess" in shown.out and (out / "ablation_random.csv").is_file()
    assert "intervals: 95 % paired bootstrap over groups of records (templates), and records in them" in shown.out
    assert "p and p_holm: the named test, over records; published_p: unpaired t, over records" in shown.out
    assert "random cells may be the set's own (1 in 4" in shown.out
    assert f"written: {out}/ablation.json, .csv, .png, .svg and cells.json" in shown.out
    assert "cells with q <= 0.05" in shown.out and "validation" in shown.out and drawn[-1] == "cells"
    assert "conditions were scored before" in shown.err  # those of the first run
    tasks = ["ablate", str(folder), "--tasks", "arithmetic", "-o", str(tmp_path / "tasks"), "--set", "logic"]
    assert cli.run([*tasks, "--validation", "train", "--cell-orders", "4", "--cell-records", "2"]) == 0
    shown = capsys.readouterr().out
    assert "exact McNemar" in shown and "cell_shapley" in shown
    for wrong, message in (
        (["--sets", "all", "--set", "logic"], "--sets"), (["--validation", "none.jsonl"], "none.jsonl"),
    ):  # fmt: skip
        assert cli.run([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert cli.run(arguments[:2]) == 2
    assert "--data FILE" in capsys.readouterr().err
