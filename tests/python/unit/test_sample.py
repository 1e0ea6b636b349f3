import pytest
import torch
from op_cases import OPCHECKS
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from micro import ops
from micro.testing import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# How far a share of one row may lie from the definition in float64: 2000 weights of float32, and their sums.
SHARE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def logits(rows, vocab, dtype=torch.float32):
    """Multiples of 1/8: exact in every dtype, with ties."""
    return ((torch.randn(rows, vocab, dtype=torch.float64) * 24).round() / 8).to(dtype)


def keys(rows):
    return {"seeds": torch.randint(-(2**62), 2**62, (rows,)), "steps": torch.arange(rows) % 5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 1000])
def test_greedy_equals_the_reference(vocab, dtype):
    z = logits(9, vocab, dtype)
    previous = torch.randint(-1, vocab + 1, (9, 6))
    barred = {"min_new_tokens": 3, "stop_ids": torch.tensor([0, vocab - 1, vocab + 4]), "steps": torch.arange(9) % 5}
    for options in ({}, {"previous": previous, "repetition_penalty": 1.25}, barred):
        got = ops.sample(z, **options)
        assert got.dtype == torch.int64
        assert torch.equal(got, reference.sample(z, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.0},
        {"top_p": 0.8},
        {"top_k": 30, "top_p": 0.6, "temperature": 1.7},
        {"temperature": 50.0, "top_p": 0.9},
    ],
)
def test_draws_follow_the_definition(options, dtype):
    """Every draw lies in the part of [0, 1) that belongs to its id."""
    z, options = logits(1, 2000, dtype).expand(300, -1), {"temperature": 1.0, **options}
    given = keys(300)
    ids = ops.sample(z, **options, **given)
    shares = reference._kept_shares(
        z[0].to(reference.wide(dtype)) / options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0)
    )
    assert (shares[ids] > 0).all()
    u = torch.tensor([reference._uniform(int(s), int(t)) for s, t in zip(*given.values(), strict=True)]).double()
    reached = shares.cumsum(0)
    assert (u >= reached[ids] - shares[ids] - SHARE[dtype]).all()
    assert (u <= reached[ids] + SHARE[dtype]).all()


def test_float64_equals_the_reference_token_for_token():
    z = logits(64, 300, torch.float64)
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3, **keys(64)}
    options["previous"] = torch.randint(-1, 300, (64, 20))
    assert torch.equal(ops.sample(z, **options), reference.sample(z, **options))


@pytest.mark.parametrize(
    "temperature, top_k, top_p, penalty, least",
    [(1.0, 0, 1.0, 1.0, 0), (0.7, 20, 1.0, 1.0, 0), (1.3, 0, 0.85, 1.0, 4), (0.8, 12, 0.7, 1.4, 4)],
)
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, penalty, least):
    torch.manual_seed(1)
    draws, vocab, eos = 40_000, 40, 3
    z = torch.randn(1, vocab) * 2
    z[0, eos] = 3.0
    prompt = torch.tensor([[1, 2, 2, 5]])
    previous = torch.tensor([[1, 2, 2, 5, 7, 1]])  # two new tokens
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if least:
        processors.append(MinNewTokensLengthLogitsProcessor(prompt.shape[1], least, [eos]))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    want = processors(previous, z.clone()).softmax(-1)[0].double()
    ids = ops.sample(
        z.expand(draws, -1),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=penalty,
        previous=previous.expand(draws, -1),
        min_new_tokens=least,
        stop_ids=torch.tensor([eos]),
        seeds=torch.arange(draws),
        steps=torch.full((draws,), 2),
    )
    got = torch.bincount(ids, minlength=vocab).double() / draws
    assert ((got > 0) <= (want > 0)).all()
    assert ((got - want).abs() <= 5 * (want * (1 - want) / draws).sqrt() + 1e-9).all()


def test_a_draw_does_not_depend_on_the_batch():
    z, given = logits(12, 500), keys(12)
    options = {"temperature": 1.0, "top_p": 0.95}
    together = ops.sample(z, **options, **given)
    alone = [ops.sample(z[i : i + 1], **options, **{n: t[i : i + 1] for n, t in given.items()}) for i in range(12)]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, ops.sample(z, **options, **given))
    finally:
        torch.set_num_threads(threads)


def test_seed_and_step_change_the_draw():
    z = torch.zeros(200, 1000)
    first = {"seeds": torch.arange(200), "steps": torch.zeros(200, dtype=torch.int64)}
    base = ops.sample(z, temperature=1.0, **first)
    assert torch.equal(base, ops.sample(z, temperature=1.0, **first))
    for changed in ({"steps": first["steps"] + 1}, {"seeds": first["seeds"] + 2**33}):
        assert (base == ops.sample(z, temperature=1.0, **first | changed)).sum() < 10


def test_nan_and_infinity():
    nan, inf = float("nan"), float("inf")
    z = torch.tensor([[nan, 1, nan, 0], [nan, -inf, nan, -inf], [nan] * 4, [nan, inf, 3, inf]])
    assert ops.sample(z).tolist() == [1, 1, 0, 1]
    for seed in range(20):
        given = {"seeds": torch.full((4,), seed), "steps": torch.zeros(4, dtype=torch.int64)}
        got = ops.sample(z, temperature=0.01, **given).tolist()
        assert got[:3] == [1, 1, 0]
        assert got[3] in (1, 3)
        assert got == reference.sample(z, temperature=0.01, **given).tolist()


def test_strides_empty_batches_and_wanted_gradients():
    z = logits(6, 50)
    assert torch.equal(ops.sample(z.t().contiguous().t()), ops.sample(z))
    assert ops.sample(z[:0]).shape == (0,)
    assert not ops.sample(z.requires_grad_()).requires_grad


def test_opcheck():
    z, given = logits(3, 20), keys(3)
    torch.library.opcheck(torch.ops.micro.sample.default, (z,))
    options = {"temperature": 0.7, "top_k": 3, "top_p": 0.9, **given}
    torch.library.opcheck(torch.ops.micro.sample.default, (z.requires_grad_(),), options, test_utils=OPCHECKS)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[B, V\], got \[3\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"V in 1 \.\. 2\^31 - 1"),
        ({"logits": torch.zeros(2, 3).half()}, TypeError, "expected float32, float64 or bfloat16"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0"),
        ({"temperature": 1e-9}, ValueError, "temperature must be 0"),
        ({"temperature": 1.0}, ValueError, "needs seeds and steps"),
        ({"top_k": -1}, ValueError, "top_k must be 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must lie in \[0, 1\], got 1\.5"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be a positive number"),
        ({"repetition_penalty": 2.0}, ValueError, "needs previous ids"),
        ({"min_new_tokens": -1}, ValueError, "must not be negative"),
        ({"min_new_tokens": 1}, ValueError, "min_new_tokens needs stop_ids"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds must be Long, got Float"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds must be \[2\], got \[3\]"),
        ({"steps": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"steps must be \[2\]"),
        ({"previous": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"previous must be \[2, 1\], got \[3, 1\]"),
        ({"previous": torch.zeros(2, dtype=torch.int64)}, ValueError, r"previous must be \[B, P\]"),
        ({"stop_ids": torch.zeros(1, 1, dtype=torch.int64)}, ValueError, r"stop_ids must be \[n\]"),
    ],
)
def test_a_wrong_argument_is_named(change, error, words):
    arguments = {"logits": torch.zeros(2, 3)}
    with pytest.raises(error, match=words):
        ops.sample(**arguments | change)
