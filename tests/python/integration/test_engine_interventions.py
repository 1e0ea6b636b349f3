"""Actions in the engine against ``model.intervene``: the same bits, however a sequence is cut and batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model
from torch import Tensor

from micro import interventions as iv
from micro.modeling import MiCRoForCausalLM

DTYPES = (torch.float32, torch.bfloat16)


def changes(model: MiCRoForCausalLM) -> list[iv.Action]:
    """One of every kind, at every point, so that each is felt."""
    config = model.config
    generator = torch.Generator().manual_seed(3)

    def table(point: iv.Point) -> Tensor:
        info = next(p for p in iv.points(config) if p.point == point)
        return torch.randn(info.layers, info.experts, info.width, generator=generator) * 0.2

    routed = {} if not config.is_block else {"experts": ["logic", "world"]}
    return [
        iv.shift("residual", table("residual"), layers=[0, 1, 2], positions=[2, 5, 13]),
        iv.scale("router", 1.5),
        iv.zero("heads", heads=[1], **routed),
        iv.scale("attention", table("attention")),
        iv.replace("up", 0.25, experts="social", units=[0, 7]),
        iv.scale("units", 1 + table("units"), positions=slice(1, None, 2)),
        iv.shift("ffn", table("ffn"), experts=[0]),
        iv.scale("block_output", 0.9, layers=1),
    ]


@torch.no_grad()
def of_model(
    model: MiCRoForCausalLM, ids: Tensor, actions: list[iv.Action], *, all_experts: bool = False, **controls: Any
) -> tuple[Tensor, iv.Findings]:
    with model.intervene(*actions, all_experts=all_experts) as run:
        return model(ids, use_cache=False, **controls).logits.float(), run


def assert_same_rows(got: iv.Reading, want: iv.Reading) -> None:
    """Whatever the order: calls may be cut otherwise."""

    def sorted_rows(reading: iv.Reading) -> tuple[Tensor, ...]:
        place = torch.stack([reading.layer, reading.expert, reading.row, reading.slot], 1)
        order = sorted(range(len(place)), key=lambda i: place[i].tolist())
        return place[order], reading.chosen[order], reading.values[order]

    for mine, theirs in zip(sorted_rows(got), sorted_rows(want), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_actions_give_the_models_bits_in_one_call_in_chunks_and_token_by_token(
    backbone: str, kind: str, dtype: torch.dtype
) -> None:
    model = small_model(backbone, kind, dtype=dtype)
    ids = random_ids(3, 17)
    actions = [*changes(model), *(iv.read(point, name=point) for point in iv.POINTS)]
    want, run = of_model(model, ids, actions)
    plain, _ = of_model(model, ids, [])
    assert not torch.equal(want, plain)
    for keys_values in ("lazy", "eager"):
        engine = model.engine(keys_values=keys_values)
        whole = engine.prefill(ids, all_logits=True, interventions=actions)
        assert torch.equal(whole.logits, want)
        assert whole.findings is not None
        for point in iv.POINTS:
            assert_same_rows(whole.findings.reading(point), run.reading(point))
        engine.reset()
        assert torch.equal(engine.prefill(ids, all_logits=True, chunk=5, interventions=actions).logits, want)
        engine.reset()
        engine.prefill(ids[:, :11], interventions=actions)
        for slot in range(11, 17):
            step = engine.decode(ids[:, slot], interventions=actions)
            assert torch.equal(step.logits, want[:, slot])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_all_experts_are_read_as_in_the_model_and_change_no_result(
    backbone: str, kind: str, dtype: torch.dtype
) -> None:
    model = small_model(backbone, kind, dtype=dtype)
    ids = random_ids(2, 13)
    actions = [*changes(model), *(iv.read(point, name=point) for point in iv.POINTS)]
    want, run = of_model(model, ids, actions, all_experts=True)
    usual, _ = of_model(model, ids, actions)
    assert torch.equal(want, usual)
    rows = run.reading("block_output")
    assert len(rows) == 2 * 26 * 4
    assert int(rows.chosen.sum()) == 2 * 26
    for keys_values in ("lazy", "eager"):
        engine = model.engine(keys_values=keys_values)
        for cuts in ([13], [5, 5, 3], [9, 1, 1, 1, 1]):
            found, first = [], 0
            for count in cuts:
                part = ids[:, first : first + count]
                out = engine.prefill(part, all_logits=True, chunk=4, interventions=actions, all_experts=True)
                assert torch.equal(out.logits, want[:, first : first + count])
                assert out.findings is not None
                found.append(out.findings)
                first += count
            for point in iv.POINTS:
                assert_same_rows(iv.Reading.cat([part.reading(point) for part in found]), run.reading(point))
            engine.reset()


def test_all_experts_with_two_chosen_weights_that_underflow_and_rows_of_unequal_length() -> None:
    model = small_model(dtype=torch.float32, num_experts_per_tok=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.router.out_proj.weight *= 200
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 12, 1)]
    actions = [
        iv.read("block_output", name="b"),
        iv.read("units", only_chosen=True, name="u"),
        iv.moments("ffn", name="m"),
        iv.moments("ffn", only_chosen=True, name="c"),
    ]
    out = model.engine().prefill(rows, all_logits=True, interventions=actions, all_experts=True)
    assert out.findings is not None
    counts = {"m": torch.zeros(2, 4, dtype=torch.float64), "c": torch.zeros(2, 4, dtype=torch.float64)}
    for number, row in enumerate(rows):
        logits, run = of_model(model, torch.tensor([row]), actions, all_experts=True)
        assert torch.equal(out.logits[number, : len(row)], logits[0])
        for name in ("b", "u"):
            mine = out.findings.reading(name)
            mine = mine.select(mine.row == number)
            mine.row[:] = 0
            assert_same_rows(mine, run.reading(name))
        for name, total in counts.items():
            total += run.moments(name).count
    for name, total in counts.items():
        assert torch.equal(out.findings.moments(name).count, total)
    assert int(counts["m"].sum()) == 2 * 18 * 4
    assert int(out.findings.reading("b").chosen.sum()) == len(out.findings.reading("u")) == int(counts["c"].sum())
    assert int(counts["c"].sum()) < 2 * 18 * 2  # some weights are 0: those experts are not chosen


@pytest.mark.parametrize("options", [{}, {"numerics": "fast"}, {"weights": "int8"}, {"keys_values": "eager"}], ids=str)
def test_tokens_are_the_same_whoever_looks_on(options: dict[str, Any]) -> None:
    model = small_model(dtype=torch.float32)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (4, 9)]
    engine = model.engine(**options)
    ask: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": [], "temperature": 1.0}
    plain = engine.generate(prompts, **ask)
    empty = engine.generate(prompts, **ask, all_experts=True)
    seen = engine.generate(prompts, **ask, interventions=[iv.read("block_output")], all_experts=True)
    assert plain.tokens == empty.tokens == seen.tokens
    assert seen.findings is not None
    assert len(seen.findings.reading("block_output")) == 2 * 4 * (4 + 5 + 9 + 5)
    # Keys that all experts made serve calls without them, and the other way round.
    ids = random_ids(2, 9)
    want = engine.prefill(ids, all_logits=True).logits
    for watched in ((3,), (0, 4), (8,)):
        engine.reset()
        for slot in range(9):
            actions = [iv.read("ffn")] if slot in watched else []
            step = engine.prefill(ids[:, slot : slot + 1], interventions=actions, all_experts=True)
            assert torch.equal(step.logits, want[:, slot])


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_reading_changes_no_bit(backbone: str, kind: str) -> None:
    model = small_model(backbone, kind, dtype=torch.float32)
    ids = random_ids(2, 9)
    plain = model.engine().prefill(ids, all_logits=True).logits
    reads = [iv.read(point, name=point) for point in iv.POINTS]
    assert torch.equal(model.engine().prefill(ids, all_logits=True, interventions=reads).logits, plain)
    for one in reads:  # each point alone has its own steps
        assert torch.equal(model.engine().prefill(ids, all_logits=True, interventions=[one]).logits, plain)


def test_two_experts_per_token_and_rows_of_unequal_length() -> None:
    model = small_model(dtype=torch.float32, num_experts_per_tok=2)
    rows = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 12, 1)]
    actions = [*changes(model), iv.read("block_output", rows=[1], name="b"), iv.moments("units", name="m")]
    out = model.engine().prefill(rows, all_logits=True, interventions=actions)
    assert out.findings is not None
    total = torch.zeros(2, 4, dtype=torch.float64)
    for number, row in enumerate(rows):
        logits, run = of_model(model, torch.tensor([row]), actions)
        assert torch.equal(out.logits[number, : len(row)], logits[0])
        total += run.moments("m").count
        if number == 1:
            continue
    moments, reading = out.findings.moments("m"), out.findings.reading("b")
    assert torch.equal(moments.count, total)
    assert bool((reading.row == 1).all())
    assert len(reading) == 2 * 2 * 12


def test_moments_and_covariances_are_the_models() -> None:
    model = small_model(dtype=torch.float32)
    ids = random_ids(2, 9)
    actions = [iv.moments("units", covariance=True, name="m")]
    _, run = of_model(model, ids, actions)
    out = model.engine().prefill(ids, interventions=actions)
    assert out.findings is not None
    got, want = out.findings.moments("m"), run.moments("m")
    assert torch.equal(got.count, want.count)
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.m2, want.m2)
    assert got.covariance is not None and want.covariance is not None
    torch.testing.assert_close(got.covariance, want.covariance, equal_nan=True)


@pytest.mark.parametrize("kind", ["replace", "resample"])
def test_rows_of_another_run_take_their_place(kind: str) -> None:
    model = small_model(dtype=torch.float32)
    ids, other = random_ids(2, 9), random_ids(2, 9, seed=8)
    with torch.no_grad(), model.intervene(iv.read("block_output"), all_experts=True) as run:
        model(other)
    source = run.reading("block_output")
    make = iv.replace if kind == "replace" else iv.resample
    actions = [make("block_output", source=source, layers=[0], positions=slice(2, 6))]
    want, _ = of_model(model, ids, actions)
    engine = model.engine()
    assert torch.equal(engine.prefill(ids, all_logits=True, chunk=4, interventions=actions).logits, want)
    few = [iv.replace("block_output", source=source.select(source.slot < 3))]
    engine.reset()
    with pytest.raises(ValueError, match="the source holds no row of layer 0"):
        engine.prefill(ids, interventions=few)
    assert engine.rows == 0  # a failed call leaves the rows as they were


def test_generation_under_actions_is_the_models() -> None:
    model = small_model(dtype=torch.float32)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (4, 9)]
    actions = [iv.scale("units", 0.5, experts="logic"), iv.shift("residual", 0.3, layers=1), iv.read("router")]
    got = model.engine().generate(prompts, max_new_tokens=6, stop_ids=[], interventions=actions)
    for number, prompt in enumerate(prompts):
        with model.intervene(*actions) as run:
            want = model.generate(
                torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        assert prompt + got.tokens[number] == want[0].tolist()
        assert got.findings is not None
        mine = got.findings.reading("router")
        assert int((mine.row == number).sum()) == len(run.reading("router"))


def test_fast_numerics_take_all_points() -> None:
    model = small_model(dtype=torch.float32)
    ids = random_ids(2, 9)
    actions = [*changes(model), *(iv.read(point, name=point) for point in iv.POINTS)]
    want, run = of_model(model, ids, actions)
    out = model.engine(numerics="fast").prefill(ids, all_logits=True, interventions=actions)
    torch.testing.assert_close(out.logits, want, rtol=1e-3, atol=1e-4)
    assert out.findings is not None
    torch.testing.assert_close(out.findings.reading("units").values, run.reading("units").values, rtol=1e-3, atol=1e-4)


def test_what_the_engine_cannot_do_is_refused() -> None:
    engine = small_model(dtype=torch.float32).engine()
    with pytest.raises(ValueError, match="keeps no graph"):
        engine.prefill([[4, 5]], interventions=[iv.read("units", keep_graph=True)])
    out = engine.prefill([[4, 5]], interventions=[iv.read("units", positions=[9])])
    assert out.findings is not None
    with pytest.raises(ValueError, match="nothing was read"):
        out.findings["units"]
