"""The engine against the model: the same routes, logits and tokens, however a sequence is cut, batched and stored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model
from torch import Tensor

import micro
from micro.engine import Engine
from micro.modeling import MiCRoForCausalLM, RoutingTrace
from micro.steering import Phases

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 12, 1, 8)]


def near_copies(
    backbone: str = "llama", kind: str = "block", *, dtype: torch.dtype = torch.float32, **fields: Any
) -> MiCRoForCausalLM:
    """Experts that are one block with 2 % of noise, as after upcycling."""
    model = small_model(backbone, kind, dtype=torch.float32, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name:
                parameter.copy_(parameter[:1] * (1 + 0.02 * torch.randn_like(parameter)))
    return model.to(dtype)


@torch.no_grad()
def of_model(model: MiCRoForCausalLM, ids: Tensor, **controls: Any) -> Any:
    return model(ids, use_cache=False, output_routing=True, **controls)


def assert_same_trace(got: RoutingTrace | None, want: RoutingTrace) -> None:
    assert got is not None
    for name in ("ids", "weights", "probs", "logits", "raw_logits", "mask"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


# ---------------------------------------------------------------- logits and routes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_logits_and_routes_are_the_models_bits(backbone: str, kind: str, dtype: torch.dtype) -> None:
    model = near_copies(backbone, kind, dtype=dtype)
    ids = random_ids(3, 20)
    want = of_model(model, ids)
    for keys_values in ("lazy", "eager"):
        engine = model.engine(keys_values=keys_values)
        out = engine.prefill(ids, all_logits=True, output_routing=True)
        assert torch.equal(out.logits, want.logits.float())
        assert_same_trace(out.routing, want.routing)
        token = torch.tensor([4, 5, 6])
        step = engine.decode(token, output_routing=True)
        longer = of_model(model, torch.cat([ids, token[:, None]], 1))
        assert torch.equal(step.logits, longer.logits[:, -1].float())
        assert_same_trace(step.routing, longer.routing.slots(20, 21))
        assert engine.lengths == [21, 21, 21]


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"num_experts_per_tok": 2, "weight_rule": "probability"},
        {"num_experts": 3, "num_key_value_heads": 4, "router_hidden_size": 16},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["tied", "top-2", "three experts", "llama3 rope"],
)
def test_other_configurations(fields: dict[str, Any]) -> None:
    model = near_copies(dtype=torch.bfloat16, **fields)
    ids = random_ids(2, 90)
    engine = model.engine()
    want = of_model(model, ids)
    out = engine.prefill(ids, all_logits=True, output_routing=True)
    assert torch.equal(out.logits, want.logits.float())
    assert_same_trace(out.routing, want.routing)


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_rows_of_inputs_of_any_width_and_number(backbone: str, kind: str) -> None:
    """Kept inputs of 96 bytes, of which no whole number fills the pages of a row."""
    model = near_copies(backbone, kind, hidden_size=24, max_position_embeddings=40)
    ids = random_ids(3, 15)
    want = of_model(model, ids).logits
    for keys_values in ("lazy", "eager"):
        assert torch.equal(model.engine(keys_values=keys_values).prefill(ids, all_logits=True, chunk=4).logits, want)
    together = model.engine().generate(PROMPTS, max_new_tokens=7)
    assert together.tokens == [model.engine().generate([p], max_new_tokens=7).tokens[0] for p in PROMPTS]


def test_a_folder_gives_the_same_engine(tmp_path: Path) -> None:
    model = near_copies(dtype=torch.bfloat16, eos_token_id=7)
    model.save_pretrained(tmp_path / "model")
    of_folder, of_parameters = micro.Engine.open(tmp_path / "model"), model.engine()
    assert of_folder.weight_bytes == of_parameters.weight_bytes
    for engine in (of_folder, of_parameters):
        assert engine.dtype == torch.bfloat16
        out = engine.prefill(PROMPTS, all_logits=True)
        again = of_parameters if engine is of_folder else of_folder
        assert torch.equal(out.logits, again.prefill(PROMPTS, all_logits=True).logits)
        of_folder.reset()
        of_parameters.reset()
    assert of_folder.generate(PROMPTS).tokens == of_parameters.generate(PROMPTS).tokens


# ---------------------------------------------------------------- one function, however it is cut
@pytest.mark.parametrize("keys_values", ["lazy", "eager"])
@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_chunks_batches_and_threads_do_not_change_a_bit(kind: str, keys_values: str) -> None:
    model = near_copies(kind=kind, dtype=torch.bfloat16, num_experts_per_tok=1)
    engine = model.engine(keys_values=keys_values)
    alone = []
    for prompt in PROMPTS:
        engine.reset()
        alone.append(engine.prefill([prompt], all_logits=True).logits[0])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for chunk in (0, 1, 3, 64):
                engine.reset()
                out = engine.prefill(PROMPTS, chunk=chunk, all_logits=True)
                for row, want in enumerate(alone):
                    assert torch.equal(out.logits[row, : len(want)], want)
                    assert not out.logits[row, len(want) :].any()
    finally:
        torch.set_num_threads(threads)
    engine.reset()
    for slot in range(5):
        logits = engine.prefill([[p[slot]] for p in (PROMPTS[0], PROMPTS[1], PROMPTS[3])]).logits
    assert torch.equal(logits, torch.stack([alone[0][4], alone[1][4], alone[3][4]]))


def test_rows_can_be_cut_chosen_and_repeated() -> None:
    model = near_copies(dtype=torch.bfloat16)
    for keys_values in ("lazy", "eager"):
        engine = model.engine(keys_values=keys_values)
        engine.prefill(PROMPTS)
        engine.truncate(4, row=1)
        engine.select([1, 3, 1])
        assert engine.lengths == [4, 8, 4]
        engine.repeat(2)
        engine.truncate(6)
        assert engine.lengths == [4, 4, 6, 6, 4, 4]
        logits = engine.decode([9] * 6).logits
        for row, prompt in enumerate((PROMPTS[1][:4], PROMPTS[1][:4], PROMPTS[3][:6])):
            want = of_model(model, torch.tensor([[*prompt, 9]])).logits[:, -1].float()
            assert torch.equal(logits[row : row + 1], want)
        with pytest.raises(IndexError, match="row 6 does not exist"):
            engine.select([6])
        with pytest.raises(ValueError, match="cannot be cut"):
            engine.truncate(9, row=0)
        engine.reset()
        assert engine.rows == 0
        assert engine.cache_bytes == {"keys_values": 0, "inputs": 0, "resident": 0}


# ---------------------------------------------------------------- lazy keys and values
def unit(model: MiCRoForCausalLM, slots: int) -> int:
    """Bytes of one dense set of keys and values."""
    config = model.config
    heads = int(config.num_key_value_heads or 0) * int(config.head_dim or 0)
    return 2 * heads * config.num_hidden_layers * slots * model.dtype.itemsize


def test_lazy_equals_eager_while_steering_changes() -> None:
    """Experts that were idle for long are made up from the kept inputs: over 64 slots apart, and cut in between."""
    model = near_copies(dtype=torch.bfloat16, max_position_embeddings=512)
    engines = [model.engine(keys_values=policy) for policy in ("lazy", "eager")]
    ids = random_ids(2, 400)
    plan: list[tuple[int, dict[str, Any]]] = [
        (150, {"force": "logic"}),
        (80, {"force": "social"}),
        (90, {"keep": ["logic", "world"]}),
        (1, {}),
        (40, {"experts_per_token": 3}),
        (39, {"ablate": [["logic"], ["social", "world"]]}),
    ]
    at = 0
    for slots, controls in plan:
        for position in (at, None):
            if position is None:
                for engine in engines:
                    engine.truncate(at + slots // 2)
                first = at + slots // 2
            else:
                first = at
            outs = [e.prefill(ids[:, first : at + slots], all_logits=True, chunk=33, **controls) for e in engines]
            assert torch.equal(outs[0].logits, outs[1].logits)
        at += slots
    assert engines[0].lengths == [400, 400]


def test_one_forced_expert_costs_one_set_of_keys_and_the_inputs() -> None:
    model = near_copies(dtype=torch.bfloat16, hidden_size=32, max_position_embeddings=512)
    engine, eager = model.engine(), model.engine(keys_values="eager")
    ids = random_ids(1, 300)
    for e in (engine, eager):
        e.prefill(ids, force="world")
        for token in range(3, 10):
            e.decode([token], force="world")
    own = unit(model, 307)
    inputs = model.config.num_hidden_layers * 307 * 32 * 2
    assert engine.cache_bytes["keys_values"] == own
    assert engine.cache_bytes["inputs"] == inputs
    assert eager.cache_bytes["keys_values"] == 4 * own
    assert eager.cache_bytes["inputs"] == 0


def test_inputs_go_when_every_expert_has_made_its_keys() -> None:
    model = near_copies(dtype=torch.bfloat16, max_position_embeddings=4096)
    engine, eager = model.engine(), model.engine(keys_values="eager")
    ids = random_ids(2, 1000)
    engine.prefill(ids, force="logic")
    alone = engine.cache_bytes["resident"]
    assert alone <= eager_resident(eager, ids) / 2  # the inputs are as wide as one set of keys and values
    engine.prefill(ids[:, :1], experts_per_token=4)
    eager.decode(ids[:, 0])
    held, want = engine.cache_bytes, eager.cache_bytes
    assert held["inputs"] == 0
    assert held["keys_values"] == want["keys_values"]
    pages = 2 * 2 * 4096  # at most one that is not yet full, per row and layer
    assert held["resident"] <= want["resident"] + pages
    engine.truncate(10)
    assert engine.cache_bytes["resident"] < held["resident"] / 4


def eager_resident(engine: Engine, ids: Tensor) -> int:
    engine.prefill(ids)
    return engine.cache_bytes["resident"]


def test_no_slot_costs_more_than_all_experts() -> None:
    """Three experts made and the input kept would be more than four sets where the input is wide."""
    model = near_copies(
        dtype=torch.bfloat16, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512
    )
    engine, eager = model.engine(), model.engine(keys_values="eager")
    ids = random_ids(1, 400)
    want = eager.prefill(ids, ablate="language").logits
    got = engine.prefill(ids[:, :100], ablate="language")
    for first in range(100, 400):
        got = engine.prefill(ids[:, first : first + 1], ablate="language")
    assert torch.equal(got.logits, want)
    held = engine.cache_bytes
    lag = 65 * model.config.num_hidden_layers * 64 * 2
    assert held["keys_values"] + held["inputs"] <= 4 * unit(model, 400) + lag
    assert torch.equal(engine.decode([5]).logits, eager.decode([5]).logits)


# ---------------------------------------------------------------- steering
CONTROLS: list[dict[str, Any]] = [
    {"ablate": "social"},
    {"ablate": [["logic"], ["world", "language"], []]},
    {"keep": {0: ["logic"], 1: ["social", "world"]}},
    {"bias": {"logic": 3.0, "world": -2.5}},
    {"bias": torch.randn(3, 2, 1, 4, generator=torch.Generator().manual_seed(3)) * 3},
    {"force": "language"},
    {"force": torch.tensor([[[0], [-1]], [[-1], [2]], [[3], [3]]])},
    {"ablate": torch.rand(3, 2, 12, 4, generator=torch.Generator().manual_seed(5)) < 0.25, "experts_per_token": 2},
    {"routing_labels": torch.randint(0, 4, (3, 12), generator=torch.Generator().manual_seed(6))},
    {"routing_labels": torch.tensor([2, -1, 0]), "experts_per_token": 2},
]


@pytest.mark.parametrize("controls", CONTROLS, ids=lambda c: "-".join(c))
@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_steering_is_the_models(kind: str, controls: dict[str, Any]) -> None:
    model = near_copies(kind=kind, dtype=torch.bfloat16)
    ids = random_ids(3, 12)
    if isinstance(controls.get("ablate"), Tensor):  # no token may lose all experts
        controls["ablate"][..., 0] = False
    want = of_model(model, ids, **controls)
    out = model.engine().prefill(ids, all_logits=True, output_routing=True, chunk=5, **controls)
    assert torch.equal(out.logits, want.logits.float())
    assert_same_trace(out.routing, want.routing)


def test_context_managers_steer_the_engine() -> None:
    model = near_copies()
    engine = model.engine()
    with micro.steering.ablate("logic"), micro.steering.ablate("social"):
        inside = engine.prefill(PROMPTS).logits
    engine.reset()
    assert torch.equal(inside, engine.prefill(PROMPTS, ablate=["logic", "social"]).logits)
    engine.reset()
    assert not torch.equal(inside, engine.prefill(PROMPTS).logits)


@pytest.mark.parametrize(
    "controls, message",
    [
        ({"ablate": ["logic", "social", "world", "language"]}, "every expert is ablated at row 0, layer 0, slot 0"),
        ({"force": "logic", "ablate": "logic"}, "forced expert is ablated"),
        ({"bias": {"logic": float("nan")}}, "NaN"),
        ({"force": torch.full((1, 1, 1), 7)}, "outside 0..3"),
        ({"routing_labels": torch.tensor([1, 1, 1, 9])}, "label lies outside 0..3 at row 3"),
        ({"routing_labels": torch.tensor([1, 1, 1, 1]), "bias": {"logic": 1.0}}, "labels route"),
        ({"routing_labels": torch.tensor([1, 1, 1, 1]), "ablate": "social"}, "labelled expert is ablated"),
        ({"ablate": [["logic"], ["social"]]}, r"ablate has shape \[2, 1, 1, 4\]"),
        ({"experts_per_token": 5}, "1..4"),
        ({"ablate": torch.zeros(1, 1, 3, 4, dtype=torch.bool)}, "S axis has 3 slots"),
        ({"routing_weights": torch.ones(4, 4)}, "routing_weights"),
    ],
)
def test_contradicting_controls_are_refused(controls: dict[str, Any], message: str) -> None:
    engine = near_copies().engine()
    with pytest.raises(ValueError, match=message):
        engine.prefill(PROMPTS, **controls)
    assert engine.rows == 0
    engine.prefill(PROMPTS)
    held = engine.cache_bytes
    with pytest.raises(ValueError, match=message):
        engine.prefill(PROMPTS, chunk=2, **controls)
    assert engine.lengths == [len(prompt) for prompt in PROMPTS]
    assert engine.cache_bytes["inputs"] <= held["inputs"]


# ---------------------------------------------------------------- generation
def model_answers(model: MiCRoForCausalLM, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out.append(model.generate(ids, max_new_tokens=new, **{**GREEDY, **options})[0, len(prompt) :].tolist())
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_greedy_answers_are_the_models(backbone: str, kind: str, dtype: torch.dtype) -> None:
    model = near_copies(backbone, kind, dtype=dtype)
    found = model.engine().generate(PROMPTS, max_new_tokens=10)
    assert found.tokens == model_answers(model, PROMPTS, 10)
    assert found.finish == ["length"] * 4


def test_the_trace_of_a_generation_is_the_models() -> None:
    model = near_copies(dtype=torch.bfloat16)
    found = model.engine().generate(PROMPTS, max_new_tokens=6, output_routing=True)
    routing = found.routing
    assert routing is not None
    assert routing.prompt_length == 12
    assert routing.ids.shape[:3] == (2, 4, 12 + 6 - 1)
    for row, prompt in enumerate(PROMPTS):
        want = of_model(model, torch.tensor([prompt + found.tokens[row][:-1]])).routing
        part = routing.rows(torch.tensor([row])).slots(12 - len(prompt), 17)
        assert part.mask.all()
        assert not routing.mask[row, : 12 - len(prompt)].any()
        part.start = 0
        assert_same_trace(part, want)


def test_rows_end_alone() -> None:
    """A row that meets a stop id leaves the batch; the others go on as if nothing had happened."""
    model = near_copies()
    engine = model.engine()
    free = engine.generate(PROMPTS, max_new_tokens=12).tokens
    stop = free[2][3]
    found = engine.generate(PROMPTS, max_new_tokens=12, stop_ids=[stop], output_routing=True)
    for row, tokens in enumerate(free):
        end = tokens.index(stop) + 1 if stop in tokens else 12
        assert found.tokens[row] == tokens[:end]
        assert found.finish[row] == ("stop" if stop in tokens else "length")
        assert found.routing is not None
        assert int(found.routing.mask[row].sum()) == len(PROMPTS[row]) + end - 1
    late = engine.generate(PROMPTS, max_new_tokens=12, stop_ids=[stop], min_new_tokens=8)
    assert all(stop not in tokens[:8] for tokens in late.tokens)


@pytest.mark.parametrize(
    "controls",
    [
        {"ablate": [["logic"], ["social"], [], ["world", "language"]]},
        {"force": Phases(prompt="logic", answer="social")},
        {"bias": Phases(answer={"world": 4.0})},
        {"ablate": lambda row, step: ["logic"] if (row + step) % 2 else ["social", "world"]},
        {"experts_per_token": 2},
    ],
    ids=["rows", "phases", "answer", "callable", "top-2"],
)
def test_steered_answers_are_the_models(controls: dict[str, Any]) -> None:
    model = near_copies()
    ids = random_ids(4, 7)
    want = model.generate(ids, max_new_tokens=8, **GREEDY, **controls)[:, 7:]
    assert model.engine().generate(ids, max_new_tokens=8, **controls).tokens == want.tolist()


def test_labels_route_the_prompt_or_everything() -> None:
    model = near_copies()
    engine = model.engine()
    ids = random_ids(2, 6)
    for labels in (torch.tensor([[0, 1, 2, 3, 0, 1], [2, 2, -1, 1, 0, 3]]), torch.tensor([1, 2])):
        want = model.generate(ids, max_new_tokens=5, routing_labels=labels, **GREEDY)[:, 6:]
        assert engine.generate(ids, max_new_tokens=5, routing_labels=labels).tokens == want.tolist()
    ragged = engine.generate(PROMPTS[:2], max_new_tokens=4, routing_labels=[[1] * 5, [2] * 12], output_routing=True)
    assert ragged.routing is not None
    assert (ragged.routing.ids[:, 0, 7:12] == 1).all()
    assert (ragged.routing.ids[:, 1, :12] == 2).all()


def test_sampling_depends_on_row_and_seed_only() -> None:
    model = near_copies(vocab_size=61)
    engine = model.engine()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.95, "top_k": 40}
    first = engine.generate(PROMPTS, seed=5, **options).tokens
    assert engine.generate(PROMPTS, seed=5, **options).tokens == first
    assert engine.generate(PROMPTS, seed=6, **options).tokens != first
    for row, prompt in enumerate(PROMPTS):
        assert engine.generate([prompt], seed=5 + row, **options).tokens == [first[row]]
    mixed = engine.generate(PROMPTS, max_new_tokens=12, temperature=[0.0, 1.3, 0.0, 1.3], top_p=0.95, top_k=40, seed=5)
    greedy = engine.generate(PROMPTS, max_new_tokens=12).tokens
    assert mixed.tokens == [greedy[0], first[1], greedy[2], first[3]]
    penalised = engine.generate(PROMPTS, max_new_tokens=12, repetition_penalty=1.8).tokens
    assert penalised == model_answers(model, PROMPTS, 12, repetition_penalty=1.8)
    for name, value in {"temperature": -1.0, "seed": -1, "top_p": 0.0, "top_k": -1, "repetition_penalty": 0.0}.items():
        with pytest.raises(ValueError, match=name):
            engine.generate(PROMPTS, **{name: value})


# ---------------------------------------------------------------- streaming, cancelling, threads
def test_streaming_sees_every_token_and_may_end_a_row() -> None:
    engine = near_copies().engine()
    free = engine.generate(PROMPTS, max_new_tokens=6).tokens
    seen: list[tuple[int, int]] = []

    def watch(row: int, token: int) -> bool:
        seen.append((row, token))
        return row == 1 and sum(r == 1 for r, _ in seen) == 2

    found = engine.generate(PROMPTS, max_new_tokens=6, on_token=watch)
    assert found.finish == ["length", "callback", "length", "length"]
    for row, tokens in enumerate(found.tokens):
        assert tokens == free[row][: 2 if row == 1 else 6]
        assert [token for r, token in seen if r == row] == tokens

    def broken(row: int, token: int) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        engine.generate(PROMPTS, on_token=broken)
    assert engine.rows == 0
    assert engine.generate(PROMPTS, max_new_tokens=6).tokens == free


def test_cancel_and_a_second_caller() -> None:
    engine = near_copies(max_position_embeddings=100_000).engine()
    started, answers = threading.Event(), []

    def watch(row: int, token: int) -> None:
        started.set()

    thread = threading.Thread(
        target=lambda: answers.append(engine.generate([[5]], max_new_tokens=90_000, stop_ids=[], on_token=watch))
    )
    thread.start()
    assert started.wait(20)
    with pytest.raises(RuntimeError, match="another thread"):
        engine.reset()
    engine.cancel()
    thread.join(20)
    assert not thread.is_alive()
    assert answers[0].finish == ["cancelled"]
    assert 1 <= len(answers[0].tokens[0]) < 90_000


def test_ctrl_c_ends_a_generation() -> None:
    import signal

    engine = near_copies(max_position_embeddings=100_000).engine()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[5]], max_new_tokens=90_000, stop_ids=[])
        assert engine.rows == 0
        engine.prefill([[5]])
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            engine.prefill([[5] * 90_000], chunk=1)
        assert engine.lengths == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)

    def work(i: int) -> None:
        results[i] = jobs[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_engines_in_two_threads() -> None:
    models = [near_copies(dtype=torch.bfloat16, seed=seed) for seed in (1, 2)]
    want = [model.engine().generate(PROMPTS, max_new_tokens=30).tokens for model in models]
    engines = [model.engine() for model in models]
    got = in_threads([lambda e=e: e.generate(PROMPTS, max_new_tokens=30).tokens for e in engines])
    assert got == want


def test_an_engine_works_after_fork() -> None:
    import multiprocessing

    engine = near_copies(vocab_size=50_000).engine()  # enough for torch to want threads, too
    want = engine.generate(PROMPTS, max_new_tokens=5).tokens
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(engine.generate(PROMPTS, max_new_tokens=5).tokens))
    process.start()
    assert receive.poll(20)
    assert receive.recv() == want
    process.join(20)
    assert process.exitcode == 0


# ---------------------------------------------------------------- other numbers
@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_fast_numerics_are_near_and_route_alike(backbone: str, kind: str) -> None:
    model = near_copies(backbone, kind)
    ids = random_ids(2, 40)
    want = of_model(model, ids)
    out = model.engine(numerics="fast").prefill(ids, all_logits=True, output_routing=True)
    assert out.routing is not None
    assert torch.equal(out.routing.ids, want.routing.ids)
    assert not torch.equal(out.routing.raw_logits, want.routing.raw_logits)
    assert float((out.logits - want.logits).abs().max() / want.logits.abs().max()) < 1e-5
    narrow = near_copies(backbone, kind, dtype=torch.bfloat16)
    out = narrow.engine(numerics="fast").prefill(ids, all_logits=True, output_routing=True)
    assert out.routing is not None
    assert float((out.routing.ids == want.routing.ids).float().mean()) > 0.9


def test_int8_weights_say_what_they_cost() -> None:
    model = near_copies()
    engine, exact = model.engine(weights="int8"), model.engine()
    assert exact.quantization_errors == {}
    assert set(engine.quantization_errors) == {
        "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    for largest, rms in engine.quantization_errors.values():
        assert 0 < largest <= 0.5 / 127 + 1e-6
        assert 0 < rms < 0.02
    assert engine.weight_bytes < 0.5 * exact.weight_bytes
    ids = random_ids(2, 30)
    want, got = exact.prefill(ids).logits, engine.prefill(ids).logits
    with torch.no_grad():
        model.model.layers[1].blocks.up_proj.weight[2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="up_proj matrix holds NaN"):
        model.engine(weights="int8")
    assert 0 < float((got - want).abs().max() / want.abs().max()) < 0.2


def test_other_dtypes() -> None:
    model = near_copies()
    engine = model.engine(dtype=torch.bfloat16)
    narrow = near_copies(dtype=torch.bfloat16)
    assert torch.equal(engine.prefill(PROMPTS).logits, narrow.engine().prefill(PROMPTS).logits)
    wide = small_model(dtype=torch.float64)
    out = wide.engine().prefill(random_ids(1, 9), all_logits=True)
    assert torch.equal(out.logits, of_model(wide, random_ids(1, 9)).logits)
    with pytest.raises(ValueError, match="pass the dtype"):
        model.half().engine()
    with pytest.raises(ValueError, match="int8 weights"):
        wide.engine(weights="int8")


# ---------------------------------------------------------------- bad input
def test_bad_input_is_named() -> None:
    model = near_copies(max_position_embeddings=20)
    engine = model.engine()
    with pytest.raises(ValueError, match="row 1 has no tokens"):
        engine.prefill([[1], []])
    with pytest.raises(ValueError, match="no rows"):
        engine.prefill([])
    with pytest.raises(ValueError, match=r"token id 61, expected 0\.\.60"):
        engine.prefill([[3, 61]])
    with pytest.raises(ValueError, match=r"before decode"):
        engine.decode([3])
    with pytest.raises(ValueError, match="max_length is 20"):
        engine.prefill([list(range(21))])
    with pytest.raises(ValueError, match="exceeds max_length = 20"):
        engine.generate([[1, 2]], max_new_tokens=20)
    with pytest.raises(ValueError, match="has no tokenizer"):
        engine.generate("a text")
    for tokens in ([[3.7, 4.2]], torch.tensor([[3.0]]), torch.ones(1, 2, 3, dtype=torch.int64), torch.tensor(3), 3):
        with pytest.raises(TypeError, match="whole numbers"):
            engine.prefill(tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature is 1e-07"):
        engine.generate([[1]], max_new_tokens=2, temperature=1e-7)
    engine.prefill([[1], [2]])
    with pytest.raises(ValueError, match="2 rows were read before and 1 are given"):
        engine.prefill([[1]])
    with pytest.raises(ValueError, match=r"expected \[2\]"):
        engine.decode([1])
    with pytest.raises(ValueError, match="numerics is 'exact'"):
        model.engine(numerics="exact")
    with pytest.raises(ValueError, match="head_dim is 4"):
        near_copies(head_dim=4).engine()
    with pytest.raises(ValueError, match=r"q_proj\.weight is missing"):
        parameters = {n: p.detach() for n, p in model.named_parameters() if "layers.1.blocks.q_proj" not in n}
        model.named_parameters = parameters.items  # type: ignore[method-assign]
        Engine.from_model(model)
