"""``model.intervene`` around everything a model can be asked for: hooks, generation, compilation, streams to disk."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model

from micro import analysis, ops
from micro import interventions as iv
from micro.interventions.sources import _uniform

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 9)


def halved():
    """A small model and one whose units are worth half."""
    model, other = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.blocks.down_proj.weight *= 0.5
    return model, other


def test_an_empty_block_is_free(ids, monkeypatch):
    model, calls, own = small_model(), [], ops.block_forward
    monkeypatch.setattr(ops, "block_forward", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    with torch.no_grad():
        with model.intervene():
            model(ids)
        assert len(calls) == 2  # a fused operator for each layer
        with model.intervene(iv.read("units", layers=1)):
            model(ids)
        assert len(calls) == 3  # the other layer takes its steps one by one


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_plain_hooks_see_the_modules_in_and_outside_a_block(ids, backbone, kind, inside):
    model = small_model(backbone, kind)
    seen = {}
    names = [name for name, _ in model.model.layers[1].named_modules() if "router" in name or "blocks." in name]
    handles = [
        model.model.layers[1]
        .get_submodule(name)
        .register_forward_hook(lambda module, arguments, result, name=name: seen.__setitem__(name, result))
        for name in names
    ]
    with torch.no_grad():
        plain = small_model(backbone, kind)(ids).logits
        if inside:
            with model.intervene(iv.read("units"), iv.read("router")) as run:
                assert torch.equal(model(ids).logits, plain)
            assert torch.equal(seen["router"], run.reading("router").at(1).values)
        else:
            assert torch.equal(model(ids).logits, plain)
        assert set(seen) == set(names)
        for handle in handles:
            handle.remove()
        seen.clear()
        assert torch.equal(model(ids).logits, plain)
        assert not seen


def test_a_hook_that_changes_the_router_acts_before_an_action_reads(ids):
    model = small_model()
    handle = model.model.layers[0].router.register_forward_hook(lambda m, a, result: result + 1)
    with torch.no_grad(), model.intervene(iv.read("router", layers=0)) as run:
        model(ids)
    handle.remove()
    with torch.no_grad(), model.intervene(iv.read("router", layers=0)) as plain:
        model(ids)
    torch.testing.assert_close(run.reading("router").values, plain.reading("router").values + 1)


def test_generation_with_beams_left_padding_and_an_assistant(ids):
    model, want = halved()
    action = iv.scale("units", 0.5)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with model.intervene(action):
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
        short = model.generate(ids[:1, 3:], max_new_tokens=4, **GREEDY)
        beams = model.generate(ids, max_new_tokens=4, num_beams=3, **GREEDY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drafted = model.generate(ids[1:], max_new_tokens=6, assistant_model=small_model(seed=1).float(), **GREEDY)
    assert padded[0, 9:].tolist() == short[0, 6:].tolist()
    assert torch.equal(padded[1], want.generate(ids[1:], max_new_tokens=4, **GREEDY)[0])
    assert torch.equal(beams, want.generate(ids, max_new_tokens=4, num_beams=3, **GREEDY))
    assert torch.equal(drafted, want.generate(ids[1:], max_new_tokens=6, **GREEDY))


def test_a_compiled_model_acts_in_the_block_and_only_there(ids):
    model = small_model(dtype=torch.float32, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(ids, use_cache=False).logits
        with model.intervene(iv.zero("units")):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
            assert not torch.equal(compiled(ids, use_cache=False).logits, plain)
        assert torch.equal(compiled(ids, use_cache=False).logits, plain)


def test_actions_stay_in_their_thread_and_end_with_an_error(ids):
    model = small_model()
    with torch.no_grad():
        plain, elsewhere = model(ids).logits, []
        with pytest.raises(RuntimeError, match="stop"), model.intervene(iv.zero("residual")):
            thread = threading.Thread(target=lambda: elsewhere.append(model(ids).logits))
            thread.start()
            thread.join()
            raise RuntimeError("stop")
        assert torch.equal(elsewhere[0], plain)
        assert torch.equal(model(ids).logits, plain)


def test_all_experts_with_two_chosen_and_weights_that_underflow(ids):
    model = small_model(dtype=torch.float32, num_experts_per_tok=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.out_proj.weight *= 200
        plain = model(ids, output_routing=True)
        routed = int((plain.routing.weights != 0).sum())
        assert routed < plain.routing.weights.numel()  # some weights are 0: those experts do not run
        with model.intervene(iv.read("block_output"), iv.read("units", only_chosen=True), all_experts=True) as run:
            assert torch.equal(model(ids).logits, plain.logits)
    assert len(run.reading("block_output")) == 2 * 18 * 4
    assert int(run.reading("block_output").chosen.sum()) == len(run.reading("units")) == routed


def test_training_through_an_action(ids):
    model = small_model().train()
    factor = torch.ones(2, 4, 1, dtype=torch.float64, requires_grad=True)
    with model.intervene(iv.scale("block_output", factor), iv.shift("ffn", torch.zeros(40 - 8, requires_grad=True))):
        model(ids, labels=ids).loss.backward()
    assert factor.grad is not None and bool(factor.grad.abs().sum() > 0)
    assert model.model.layers[0].blocks.down_proj.weight.grad is not None
    model.gradient_checkpointing_enable()
    with model.intervene(iv.zero("units")), pytest.raises(ValueError, match="disable gradient checkpointing"):
        model(ids)


def test_resampling_does_not_depend_on_how_a_sequence_is_cut(ids):
    model = small_model()
    with torch.no_grad(), model.intervene(iv.read("ffn"), all_experts=True) as run:
        model(random_ids(2, 9, seed=7))
    with torch.no_grad(), model.intervene(iv.resample("ffn", run.reading("ffn"), seed=11)):
        whole = model(ids).logits
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
    with torch.no_grad(), model.intervene(iv.resample("ffn", run.reading("ffn"), seed=12)):
        assert not torch.equal(model(ids).logits, whole)


def test_moments_of_inference_mode_can_be_merged_outside(ids):
    model, found = small_model(), []
    for part in (ids[:, :4], ids):
        with torch.inference_mode(), model.intervene(iv.moments("residual", covariance=True)) as run:
            model(part)
        found.append(run.moments("residual"))
    assert found[0].merge(found[1]).count.flatten().tolist() == [8 + 18] * 3


def test_draws_are_uniform_and_differ_from_place_to_place():
    rows = torch.arange(100)[:, None].expand(100, 100).flatten()
    slots = torch.arange(100).repeat(100)
    draws = _uniform(7, 3, torch.ones_like(rows), rows, slots)
    counts = torch.histc(draws, 20, 0, 1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 50  # chi squared with 19 degrees: once in 8000
    assert len(draws.unique()) == 10_000
    assert abs(float(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1])) < 0.04


def test_the_table_of_points_is_what_reads_see(ids):
    for backbone, kind in ALL_FOUR:
        model = small_model(backbone, kind)
        table = iv.points(model)
        with torch.no_grad(), model.intervene(*(iv.read(p.point) for p in table)) as run:
            model(ids)
        for info in table:
            reading = run.reading(info.point)
            assert reading.values.shape == (18 * info.layers, info.width)
            assert bool((reading.expert == -1).all()) == (info.rows == "tokens")
        assert len(str(table).splitlines()) == 9


# ---- capture --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_captured_is_what_the_calls_read(ids, tmp_path, monkeypatch, on_disk):
    model = small_model()
    monkeypatch.setattr(sys.modules["micro.analysis.capture"], "PART_BYTES", 4000)
    folder = tmp_path / "seen" if on_disk else None
    with torch.no_grad():
        with analysis.capture(model, ["units", "residual"], folder=folder, dtype=torch.float32, layers=1) as captured:
            model(ids)
            model(ids[:1, :4])
        with model.intervene(iv.read("units", layers=1)) as run:
            model(ids)
            model(ids[:1, :4])
    got, want = captured.reading("units"), run.reading("units")
    assert torch.equal(got.values, want.values.float())
    assert got.row.tolist() == [*want.row[:18].tolist(), *[2] * 4]
    assert torch.equal(got.slot, want.slot) and torch.equal(got.expert, want.expert)
    if on_disk:
        parts = sorted(path.name for path in folder.iterdir())
        assert parts == [
            f"{point}-0000{n}.safetensors" for point in ("residual", "units") for n in range(len(parts) // 2)
        ]
        with pytest.raises(FileExistsError, match="not empty"), analysis.capture(model, folder=folder):
            pass


def test_capture_ends_with_an_error_and_refuses_unknown_points(ids):
    model = small_model()
    with pytest.raises(RuntimeError, match="stop"), analysis.capture(model):
        raise RuntimeError("stop")
    with model.intervene():  # no block is left open
        model(ids)
    with pytest.raises(ValueError, match="point is 'nowhere'"), analysis.capture(model, ["nowhere"]):
        pass
