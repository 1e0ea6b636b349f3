"""generate(): every mode gives what forward gives, controls reach the right rows and slots, traces tell the truth."""

from __future__ import annotations

import threading

import pytest
import torch
from small_models import ALL_FOUR, random_ids, small_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.generation import BaseStreamer

import micro.steering as steering
from micro.modeling import MiCRoCache, MiCRoForCausalLM

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def greedy_by_forward(model: MiCRoForCausalLM, ids: torch.Tensor, new: int, **controls: object) -> torch.Tensor:
    """Without any cache: the whole sequence again for every token."""
    for _ in range(new):
        with torch.no_grad():
            logits = model(ids, use_cache=False, **controls).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("backbone,kind", ALL_FOUR)
def test_greedy_equals_repeated_forward(backbone: str, kind: str) -> None:
    model = small_model(backbone, kind)
    ids = random_ids(2, 6)
    want = greedy_by_forward(model, ids, 8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, **GREEDY), want)
    assert torch.equal(model.generate(ids, max_new_tokens=8, use_cache=False, **GREEDY), want)
    assert torch.equal(model.generate(ids, max_new_tokens=8, cache_implementation="static", **GREEDY), want)
    assert torch.equal(model.generate(ids, max_new_tokens=8, cache_implementation="dynamic", **GREEDY), want)
    assert torch.equal(model.generate(ids, max_new_tokens=8, prefill_chunk_size=4, **GREEDY), want)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)):
        assert torch.equal(model.generate(ids, max_new_tokens=8, past_key_values=cache, **GREEDY), want)


def test_left_padded_batch_equals_single_prompts() -> None:
    model = small_model()
    prompts = [random_ids(1, n, seed=n) for n in (3, 7, 5)]
    ids = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (7 - p.shape[1], 0)) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, output_routing=True, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=6, output_routing=True, **GREEDY)
        assert torch.equal(out.sequences[row, 7:], alone.sequences[0, prompt.shape[1] :])
        mine = out.routing.ids[:, row][:, out.routing.mask[row]]
        assert torch.equal(mine, alone.routing.ids[:, 0])
    static = model.generate(ids, attention_mask=mask, max_new_tokens=6, cache_implementation="static", **GREEDY)
    assert torch.equal(static, out.sequences)


def check_trace(model: MiCRoForCausalLM, sequences: torch.Tensor, trace, mask: torch.Tensor | None = None) -> None:  # type: ignore[no-untyped-def]
    """The trace equals the routing of one forward pass over the returned sequences."""
    assert trace.ids.shape[1:3] == (sequences.shape[0], sequences.shape[1] - 1 - trace.start)
    with torch.no_grad():
        again = model(sequences[:, :-1], use_cache=False, output_routing=True).routing
    real = trace.mask if mask is None else mask
    assert torch.equal(trace.ids[:, real], again.ids[:, :, trace.start :][:, real])
    assert torch.allclose(trace.probs[:, real], again.probs[:, :, trace.start :][:, real], atol=1e-9)


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_trace_of_every_mode(kind: str) -> None:
    model = small_model(kind=kind)
    ids = random_ids(1, 6)
    for options in (
        {},
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"num_beams": 3, "prefill_chunk_size": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        torch.manual_seed(1)
        out = model.generate(ids, max_new_tokens=7, output_routing=True, **{**GREEDY, **options})
        check_trace(model, out.sequences, out.routing)
        assert (out.routing.start, out.routing.prompt_length) == (0, 6), options
        assert out.routing.answer.ids.shape[2] == out.sequences.shape[1] - 7
        assert out.routing.prompt.ids.shape[2] == 6


def test_prompt_lookup_and_assistant_give_the_greedy_answer() -> None:
    model, draft = small_model(), small_model(seed=9, num_hidden_layers=2)
    ids = torch.cat([random_ids(1, 5)] * 3, 1)
    want = model.generate(ids, max_new_tokens=12, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=12, prompt_lookup_num_tokens=4, **GREEDY), want)
    assert torch.equal(model.generate(ids, max_new_tokens=12, assistant_model=draft, **GREEDY), want)
    forced = model.generate(ids, max_new_tokens=12, force="logic", **GREEDY)
    out = model.generate(ids, max_new_tokens=12, force="logic", assistant_model=draft, output_routing=True, **GREEDY)
    assert torch.equal(out.sequences, forced)
    assert bool((out.routing.ids == 0).all())


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, {"num_experts": 2}], ids=["layers", "experts"])
def test_drafts_of_other_sizes_draft_without_the_controls(fields: dict[str, int]) -> None:
    model, draft = small_model(), small_model(seed=9, **fields)
    ids = random_ids(1, 5)
    controls = {"ablate": {0: "logic"}, "max_new_tokens": 8}
    want = model.generate(ids, **controls, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=draft, **controls, **GREEDY), want)


def test_a_dense_draft_model() -> None:
    model = small_model()
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    draft = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).double().eval()
    ids = random_ids(1, 5)
    want = model.generate(ids, max_new_tokens=10, keep=["logic", "world"], **GREEDY)
    out = model.generate(
        ids, max_new_tokens=10, keep=["logic", "world"], assistant_model=draft, output_routing=True, **GREEDY
    )
    assert torch.equal(out.sequences, want)
    assert set(out.routing.ids.unique().tolist()) <= {0, 2}


def test_continued_cache_traces_from_its_start() -> None:
    model = small_model()
    ids = random_ids(1, 6)
    cache = MiCRoCache(model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=5, output_routing=True, **GREEDY)
    assert torch.equal(out.sequences, model.generate(ids, max_new_tokens=5, **GREEDY))
    assert (out.routing.start, out.routing.prompt_length) == (4, 6)
    check_trace(model, out.sequences, out.routing)
    assert out.routing.prompt.ids.shape[2] == 2
    # only the new ids, with the mask of the whole sequence; an S axis then counts from the first new id
    cache.truncate(4)
    force = torch.tensor([[[0, 2]]])
    more = model.generate(
        ids[:, 4:], attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, force=force,
        output_routing=True, **GREEDY,
    )  # fmt: skip
    assert (more.routing.start, more.routing.prompt_length) == (4, 6)
    assert more.routing.prompt.ids[:, 0, :, 0].tolist() == [[0, 2], [0, 2]]
    assert more.routing.answer.ids.shape[2] == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_controls_per_row_follow_their_rows(beams: int) -> None:
    model = small_model()
    ids = random_ids(2, 5)
    out = model.generate(
        ids, keep=[["logic"], ["world", "LN"]], max_new_tokens=6, num_beams=beams, output_routing=True, **GREEDY
    )
    chosen = out.routing.ids
    assert bool((chosen[:, 0] == 0).all())
    assert set(chosen[:, 1].unique().tolist()) <= {2, 3}
    if beams == 1:
        for row, keep in enumerate(("logic", ["world", "LN"])):
            alone = model.generate(ids[row : row + 1], keep=keep, max_new_tokens=6, **GREEDY)
            assert torch.equal(alone[0], out.sequences[row])


def test_a_slot_axis_covers_the_prompt_and_the_answer_is_free() -> None:
    model = small_model()
    ids = random_ids(2, 5)
    force = torch.full((1, 1, 5), 2)
    labels = torch.tensor([[0, 1, 2, 3, -1], [1] * 5])
    for controls, prompt in (({"force": force}, force[0]), ({"routing_labels": labels}, labels.where(labels >= 0, 3))):
        for extra in ({}, {"prefill_chunk_size": 2}):
            out = model.generate(ids, max_new_tokens=8, output_routing=True, **controls, **GREEDY, **extra)
            assert torch.equal(out.routing.prompt.ids[..., 0].long(), prompt.expand(2, 2, 5))
            assert len(out.routing.answer.ids.unique()) > 1
            free = model.generate(out.sequences[:, :5], max_new_tokens=8, **GREEDY)
            assert free.shape == out.sequences.shape
    one = random_ids(1, 5)
    out = model.generate(
        torch.cat([one, one], 1), routing_labels=torch.ones(1, 10, dtype=torch.long), prompt_lookup_num_tokens=4,
        max_new_tokens=9, output_routing=True, **GREEDY,
    )  # fmt: skip
    assert bool((out.routing.prompt.ids == 1).all()) and len(out.routing.answer.ids.unique()) > 1
    everywhere = model.generate(
        ids, routing_labels=torch.tensor([1, -1]), max_new_tokens=5, output_routing=True, **GREEDY
    )
    assert everywhere.routing.ids[:, 0].unique().tolist() == [1]
    assert everywhere.routing.ids[:, 1].unique().tolist() == [3]


def test_phases_and_callables() -> None:
    model = small_model()
    ids = random_ids(2, 4)
    phases = steering.Phases(prompt="social", answer="logic")
    out = model.generate(ids, force=phases, max_new_tokens=5, output_routing=True, **GREEDY)
    assert out.routing.prompt.ids.unique().tolist() == [1]
    assert out.routing.answer.ids.unique().tolist() == [0]
    half = model.generate(
        ids, ablate=steering.Phases(answer=["logic", "social"]), max_new_tokens=6, output_routing=True, **GREEDY
    )
    assert set(half.routing.answer.ids.unique().tolist()) <= {2, 3}
    plain = model(ids, output_routing=True).routing
    assert torch.equal(half.routing.prompt.ids, plain.ids)

    asked = []

    def by_step(row: int, step: int) -> str | None:
        asked.append((row, step))
        return None if step == 0 else ("world" if (row + step) % 2 else "language")

    for extra in ({}, {"num_beams": 2}):
        asked.clear()
        out = model.generate(ids, force=by_step, max_new_tokens=5, output_routing=True, **GREEDY, **extra)
        assert torch.equal(out.routing.prompt.ids, plain.ids)
        want = torch.tensor([[2 if (row + step) % 2 else 3 for step in range(1, 5)] for row in range(2)])
        assert torch.equal(out.routing.answer.ids[..., 0].long(), want.expand(2, 2, 4))
        assert len(asked) == len(set(asked)) == 2 * 5
    with pytest.raises(ValueError, match=r"generate\(\) only"):
        model(ids, force=by_step)


def test_changing_controls_does_not_touch_cached_entries() -> None:
    """The cache of the prompt is that of the prompt's control, whatever the answer's is (model.md 4.5)."""
    model = small_model()
    ids = random_ids(1, 5)
    with torch.no_grad():
        cache = MiCRoCache(model.config)
        logits = model(ids, past_key_values=cache, force="social").logits
        token, made = logits[:, -1:].argmax(-1), []
        for _ in range(4):
            made.append(token)
            token = model(token, past_key_values=cache, force="logic").logits.argmax(-1)
    out = model.generate(ids, force=steering.Phases("social", "logic"), max_new_tokens=4, **GREEDY)
    assert torch.equal(out[:, 5:], torch.cat(made, 1))


def test_replay_in_generate() -> None:
    model = small_model()
    ids = random_ids(1, 5)
    first = model.generate(ids, max_new_tokens=5, ablate="logic", output_routing=True, **GREEDY)
    again = model.generate(ids, max_new_tokens=5, replay=first.routing, output_routing=True, **GREEDY)
    assert torch.equal(again.sequences, first.sequences)
    assert torch.equal(again.routing.ids, first.routing.ids)
    longer = model.generate(ids, max_new_tokens=9, replay=first.routing.prompt, output_routing=True, **GREEDY)
    assert torch.equal(longer.routing.prompt.ids, first.routing.prompt.ids)


def test_rows_that_stop_early_are_masked() -> None:
    model = small_model()
    ids = random_ids(3, 4)
    free = model.generate(ids, max_new_tokens=8, **GREEDY)
    stop = int(free[0, 6])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=stop, output_routing=True)
    for row in range(3):
        answer = out.sequences[row, 4:].tolist()
        end = answer.index(stop) + 1 if stop in answer else len(answer)
        want = [True] * (4 + end) + [False] * (len(answer) - end)
        assert out.routing.mask[row].tolist() == want[: out.sequences.shape[1] - 1]


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming_and_its_end_on_errors() -> None:
    model = small_model()
    ids = random_ids(1, 4)
    listener = Listener()
    out = model.generate(ids, max_new_tokens=5, streamer=listener, **GREEDY)
    assert listener.ended and listener.tokens == out[0].tolist()
    broken = Listener()
    with pytest.raises(ValueError, match="unknown expert"):
        model.generate(ids, streamer=broken, ablate="logi", **GREEDY)
    assert broken.ended, "a consumer in another thread would wait for ever"


def test_refusals() -> None:
    model = small_model()
    ids = random_ids(1, 4)
    for name in ("quantized", "paged", "sliding_window", "offloaded", "offloaded_static", "magic"):
        with pytest.raises(ValueError, match=f'cache_implementation="{name}"'):
            model.generate(ids, cache_implementation=name, **GREEDY)
    with pytest.raises(ValueError, match="made without config"):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(ids, output_routing=True, return_dict_in_generate=False, **GREEDY)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(ids, ablated="logic", **GREEDY)
    with pytest.raises(ValueError, match=r"every expert is ablated at row 0, layer 0 .*slot 0"):
        model.generate(ids, ablate=[0, 1, 2, 3], **GREEDY)
    with pytest.raises(ValueError, match="use_router=False"):
        small_model(use_router=False).generate(ids, **GREEDY)


def test_controls_do_not_outlive_the_call() -> None:
    model = small_model()
    ids = random_ids(1, 5)
    before = model.generate(ids, max_new_tokens=5, **GREEDY)
    model.generate(ids, max_new_tokens=5, force="world", bias={"logic": 3.0}, experts_per_token=2, **GREEDY)
    with steering.force("social"):
        inside = model.generate(ids, max_new_tokens=5, output_routing=True, **GREEDY)
    assert inside.routing.ids.unique().tolist() == [1]
    assert torch.equal(model.generate(ids, max_new_tokens=5, **GREEDY), before)


def test_a_new_thread_starts_without_the_context() -> None:
    model = small_model()
    ids = random_ids(1, 5)
    seen = {}

    def run() -> None:
        seen["out"] = model.generate(ids, max_new_tokens=4, **GREEDY)

    with steering.force("social"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(seen["out"], model.generate(ids, max_new_tokens=4, **GREEDY))


def test_embeddings_as_prompt() -> None:
    model = small_model()
    ids = random_ids(1, 5)
    embeds = model.get_input_embeddings()(ids).detach()
    out = model.generate(inputs_embeds=embeds, max_new_tokens=5, output_routing=True, **GREEDY)
    whole = model.generate(ids, max_new_tokens=5, output_routing=True, **GREEDY)
    assert torch.equal(out.sequences, whole.sequences[:, 5:])
    assert torch.equal(out.routing.ids, whole.routing.ids)
