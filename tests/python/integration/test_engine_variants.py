"""K interventions behind a prefix that the engine reads once: against one by one, and against the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model
from torch import Tensor

from micro import interventions as iv
from micro import steering
from micro.engine import Engine, EngineGeneration
from micro.modeling import MiCRoForCausalLM

DTYPES = (torch.float32, torch.bfloat16)
PREFIX, SLOTS = 5, 12


def plans(model: MiCRoForCausalLM) -> list[list[iv.Action]]:
    with torch.no_grad(), model.intervene(iv.read("ffn", name="f"), all_experts=True) as run:
        model(random_ids(1, SLOTS, seed=4))
    source = run.reading("f")
    behind = slice(PREFIX, None)
    return [
        [],
        [iv.zero("heads", heads=[1], positions=behind)],
        [iv.scale("units", 0.3, positions=[7, 8])],
        [iv.shift("residual", 2.0, layers=1, positions=[6, 11]), iv.scale("block_output", 0.7, positions=[11])],
        [iv.replace("ffn", source=source, layers=[1], positions=slice(PREFIX, SLOTS))],
        [iv.resample("ffn", source, seed=5, positions=behind)],
        [iv.zero("units", rows=[1], positions=behind)],  # no such row: nothing
    ]


def alone(engine: Engine, ids: Tensor, actions: list[iv.Action]) -> Tensor:
    engine.reset()
    engine.prefill(ids[:, :PREFIX])
    return engine.prefill(ids[:, PREFIX:], all_logits=True, interventions=actions).logits[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_logits_are_those_of_one_by_one_and_of_the_model(backbone: str, kind: str, dtype: torch.dtype) -> None:
    model = small_model(backbone, kind, dtype=dtype)
    ids, lists = random_ids(1, SLOTS), plans(model)
    want = iv.variants(model, ids, lists).float()
    assert len({tuple(row[-1].tolist()) for row in want}) == 6  # all are felt but the first and the last
    for keys_values in ("lazy", "eager"):
        engine = model.engine(keys_values=keys_values)
        engine.prefill(random_ids(2, 3))  # rows that are forgotten
        for batch in (3, 8):
            assert torch.equal(iv.variants(engine, ids, lists, batch=batch), want)
        assert engine.rows == 0
        assert torch.equal(iv.variants(engine, ids[0], lists, prefix=0)[:, PREFIX:], want)
        for k, actions in enumerate(lists):
            assert torch.equal(alone(engine, ids, actions), want[k]), k


def test_controls_differ_from_row_to_row() -> None:
    model = small_model(dtype=torch.float32)
    force = torch.tensor([[[0, 1, 2, -1, 3, 0, 1, -1]]])  # of the slots behind the prefix
    controls: list[dict[str, Any]] = [{}, {"ablate": "logic"}, {"bias": {"world": 3.0}}, {"force": force}]
    lists = [[iv.scale("ffn", 1.0 + k / 10)] for k in range(4)]
    options: dict[str, Any] = {"controls": controls, "prefix": 4, "batch": 3}
    ids = random_ids(1, SLOTS)
    assert torch.equal(iv.variants(model.engine(), ids, lists, **options), iv.variants(model, ids, lists, **options))


def generated(engine: Engine, prompts: list[list[int]], **options: Any) -> EngineGeneration:
    return engine.generate(prompts, max_new_tokens=7, stop_ids=[], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_generations_are_those_of_one_by_one_and_of_the_model(backbone: str, kind: str, dtype: torch.dtype) -> None:
    model = small_model(backbone, kind, dtype=dtype)
    ids, lists = random_ids(1, SLOTS), plans(model)
    prompt, engine = ids[0].tolist(), model.engine()
    table = iv.side_by_side(lists)
    got = generated(engine, [prompt] * len(lists), interventions=table, shared_prefix=PREFIX, chunk=4)
    assert len({tuple(row) for row in got.tokens}) >= 3
    for k, actions in enumerate(lists):
        assert [got.tokens[k]] == generated(engine, [prompt], interventions=actions).tokens, k
    for k in (1, 3):
        with model.intervene(*lists[k]):
            want = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert prompt + got.tokens[k] == want[0].tolist()


def test_actions_begin_behind_the_prefix() -> None:
    model = small_model(dtype=torch.float32)
    ids, engine = random_ids(1, SLOTS), model.engine()
    actions = [iv.shift("units", 4.0), iv.read("residual", layers=2)]  # everywhere, if nobody reads a prefix before
    got = generated(engine, [ids[0].tolist()], interventions=actions, shared_prefix=PREFIX)
    assert got.findings is not None
    assert got.findings.reading("residual").slot.tolist() == list(range(PREFIX, SLOTS + 6))
    engine.prefill(ids[:, :PREFIX])
    logits = engine.prefill(ids[:, PREFIX:], interventions=actions).logits
    by_hand = []
    for _ in range(7):
        by_hand.append(int(logits.argmax()))
        logits = engine.decode([by_hand[-1]], interventions=actions).logits
    assert got.tokens == [by_hand]
    everywhere = generated(engine, [ids[0].tolist()], interventions=actions).findings
    assert everywhere is not None
    felt = everywhere.reading("residual")
    assert felt.slot.tolist() == list(range(SLOTS + 6))
    assert not torch.equal(felt.values[PREFIX:SLOTS], got.findings.reading("residual").values[: SLOTS - PREFIX])


def test_no_row_feels_the_actions_of_another() -> None:
    model = small_model(dtype=torch.float32)
    prompts, engine = [random_ids(1, SLOTS)[0].tolist()] * 4, model.engine()
    look = iv.read("residual", name="r")
    plain = generated(engine, prompts, interventions=[look], shared_prefix=PREFIX)
    loud = generated(engine, prompts, interventions=[iv.shift("units", 4.0, rows=[2]), look], shared_prefix=PREFIX)
    assert plain.findings is not None
    assert loud.findings is not None
    want, got = plain.findings.reading("r"), loud.findings.reading("r")
    assert torch.equal(want.row, got.row)
    same = (want.values == got.values).all(1)
    assert bool(same[want.row != 2].all())
    touched = (want.row == 2) & (want.layer > 0)
    assert not bool(same[touched].any())
    assert [plain.tokens[row] for row in (0, 1, 3)] == [loud.tokens[row] for row in (0, 1, 3)]


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_prompts_that_part_behind_the_prefix_keep_tokens_routes_and_draws(kind: str) -> None:
    model = small_model(kind=kind, dtype=torch.float32)
    start, engine = random_ids(1, PREFIX)[0].tolist(), model.engine()
    prompts = [start + random_ids(1, n, seed=n)[0].tolist() for n in (1, 7, 3)]
    options: dict[str, Any] = {"temperature": 1.2, "seed": 3, "repetition_penalty": 1.3, "output_routing": True}
    want = generated(engine, prompts, **options)
    got = generated(engine, prompts, **options, shared_prefix=PREFIX, chunk=2)
    assert got.tokens == want.tokens
    assert got.routing is not None
    assert want.routing is not None
    for name in ("ids", "weights", "probs", "logits", "raw_logits", "mask"):
        assert torch.equal(getattr(got.routing, name), getattr(want.routing, name)), name
    assert got.routing.prompt_length == want.routing.prompt_length == PREFIX + 7


def test_controls_begin_behind_the_prefix() -> None:
    model = small_model(dtype=torch.float32)
    prompts, engine = [random_ids(1, SLOTS)[0].tolist()] * 2, model.engine()
    behind = torch.tensor([[[0, 1, 2, -1, 3, 0, 1]], [[-1, 1, 1, 1, -1, 2, 0]]])  # [B,1,S]
    whole = torch.cat([torch.full((2, 1, PREFIX), -1), behind], 2)
    want = generated(engine, prompts, force=whole, output_routing=True)
    got = generated(engine, prompts, force=behind, output_routing=True, shared_prefix=PREFIX)
    assert got.tokens == want.tokens
    assert got.routing is not None
    assert want.routing is not None
    assert torch.equal(got.routing.ids, want.routing.ids)
    off = generated(engine, prompts, ablate="logic", output_routing=True, shared_prefix=PREFIX).routing
    free = generated(engine, prompts, output_routing=True).routing
    assert off is not None
    assert free is not None
    assert torch.equal(off.ids[:, :, :PREFIX], free.ids[:, :, :PREFIX])
    assert not bool((off.ids[:, :, PREFIX:] == 0).any())


@pytest.mark.parametrize(
    ("prompts", "prefix", "error", "message"),
    [
        ([[4, 5, 6], [4, 5]], 2, ValueError, "prompt 1 has 2 tokens; at least one must be behind it"),
        ([[4, 5, 6], [4, 7, 6]], 2, ValueError, "prompt 1 differs from prompt 0 in the first 2"),
        ([[4, 5]], 9, ValueError, "shared_prefix is 9"),
        ([[4, 5]], -1, ValueError, "shared_prefix is -1"),
        ([[4, 5]], 0.5, TypeError, "integer"),
    ],
)
def test_wrong_prefixes_are_refused(prompts: Any, prefix: Any, error: type[Exception], message: str) -> None:
    engine = small_model(dtype=torch.float32).engine()
    with pytest.raises(error, match=message):
        engine.generate(prompts, shared_prefix=prefix, max_new_tokens=2)
    assert engine.rows == 0


def test_wrong_variants_are_refused() -> None:
    model = small_model(dtype=torch.float32)
    engine, ids = model.engine(max_length=12), random_ids(1, 12)
    with torch.no_grad():
        trace = model(ids, output_routing=True).routing
    with pytest.raises(ValueError, match="the engine takes no replay"):
        iv.variants(engine, ids, [[]], replay=trace)
    with pytest.raises(ValueError, match=r"read in model\.intervene or in the engine"):
        iv.variants(engine, ids, [[iv.read("units")]])
    with pytest.raises(ValueError, match="max_length is 12"):
        iv.variants(engine, random_ids(1, 13), [[]], prefix=4)
    assert engine.rows == 0
    assert iv.variants(engine, ids, [[]]).shape == (1, 1, 61)


def test_a_prefix_is_not_shared_inside_a_block_of_steering() -> None:
    model = small_model(dtype=torch.float32)
    prompts, engine = [random_ids(1, SLOTS)[0].tolist()] * 2, model.engine()
    with steering.ablate("logic"):
        with pytest.raises(ValueError, match=r"inside a block of micro\.steering \(ablate\).*leave shared_prefix out"):
            generated(engine, prompts, shared_prefix=PREFIX)
        inside = generated(engine, prompts, output_routing=True)
    assert inside.routing is not None
    assert not bool((inside.routing.ids == 0).any())  # without shared_prefix the block holds for the whole prompt
    assert inside.tokens == generated(engine, prompts, ablate="logic").tokens
    assert generated(engine, prompts, ablate="logic", shared_prefix=PREFIX).finish == ["length"] * 2


@pytest.mark.parametrize(
    "positions",
    [[1, PREFIX - 1], slice(0, PREFIX), slice(2, PREFIX + 2, 5), torch.tensor([0, 2]), torch.ones(1, PREFIX).bool()],
)
def test_actions_that_the_prefix_hides_are_refused(positions: Any) -> None:
    model = small_model(dtype=torch.float32)
    ids, engine = random_ids(1, SLOTS), model.engine()
    hidden = iv.zero("heads", heads=[1], positions=positions)
    with pytest.raises(ValueError, match=r'shared_prefix is 5, but zero\("heads"\) names slots up to'):
        generated(engine, [ids[0].tolist()], interventions=[hidden], shared_prefix=PREFIX)
    for either in (model, engine):
        with pytest.raises(ValueError, match=r'prefix is 5, but zero\("heads"\) names slots up to'):
            iv.variants(either, ids, [[], [hidden]], prefix=PREFIX)


@pytest.mark.parametrize("positions", [None, [0, PREFIX], slice(0, None), slice(1, SLOTS), [], [SLOTS + 3]])
def test_actions_that_reach_behind_the_prefix_are_taken(positions: Any) -> None:
    ids, engine = random_ids(1, SLOTS), small_model(dtype=torch.float32).engine()
    actions = [iv.zero("heads", heads=[1], positions=positions)]
    assert generated(engine, [ids[0].tolist()], interventions=actions, shared_prefix=PREFIX).finish == ["length"]
    assert iv.variants(engine, ids, [actions], prefix=PREFIX).shape[1] == SLOTS - PREFIX


def test_readings_side_by_side_carry_the_number_of_their_list() -> None:
    model = small_model(dtype=torch.float32)
    ids, engine = random_ids(1, SLOTS), model.engine()
    lists = [[iv.scale("units", s), iv.read("ffn", name="r"), iv.moments("ffn", name="m")] for s in (1.0, 0.0, 2.0)]
    table = iv.side_by_side(lists)
    engine.reset()
    got = engine.prefill(ids.expand(3, -1), interventions=table).findings
    assert got is not None
    with torch.no_grad(), model.intervene(*table) as run:
        model(ids.expand(3, -1))
    for k, actions in enumerate(lists):
        with torch.no_grad(), model.intervene(*actions) as alone:
            model(ids)
        for found in (got, run):
            assert set(found.reading(f"r_{k}").row.tolist()) == {k}
            assert torch.equal(found.reading(f"r_{k}").values, alone.reading("r").values)
            assert torch.equal(found.moments(f"m_{k}").mean, alone.moments("m").mean)
