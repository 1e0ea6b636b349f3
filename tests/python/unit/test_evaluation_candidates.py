import random

import pytest
import torch
from small_models import ALL_FOUR, small_model

from micro import interventions
from micro.evaluation import candidates
from micro.evaluation.candidates import CandidateScorer, encode_pair
from micro.steering import Phases


@torch.no_grad()
def one_by_one(model, pairs, **controls):
    """Each pair in a call of its own, all logits: what the scorer must equal."""
    found = []
    for prompt, candidate in pairs:
        ids = torch.tensor([[*prompt, *candidate]])
        logits = model(input_ids=ids, use_cache=False, **controls).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(candidate)
        logprobs = logits.log_softmax(-1)[torch.arange(len(candidate)), targets]
        found.append((float(logprobs.double().sum()), bool((logits.argmax(-1) == targets).all())))
    return found


def some_pairs(seed=0, preambles=3):
    """Prompts of many lengths, some with a long common beginning, with one to five candidates of one to four tokens."""
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(3, 61) for _ in range(n)]

    heads = [ids(40) for _ in range(preambles)]
    pairs = []
    for i in range(24):
        prompt = (heads[i % len(heads)] if i % 2 else []) + ids(rng.randint(1, 12))
        pairs += [(prompt, ids(rng.randint(1, 4))) for _ in range(rng.randint(1, 5))]
    rng.shuffle(pairs)
    return [*pairs, pairs[0]]


@pytest.mark.parametrize("backbone, kind", ALL_FOUR)
@pytest.mark.parametrize("max_tokens", [1, 120, 4096])
def test_scores_equal_those_computed_one_by_one(backbone, kind, max_tokens):
    model, pairs = small_model(backbone, kind), some_pairs()
    scores = CandidateScorer(model, max_tokens=max_tokens).score_ids(pairs)
    want = one_by_one(model, pairs)
    assert [s.logprob for s in scores] == pytest.approx([w for w, _ in want], abs=1e-11)
    assert [s.greedy for s in scores] == [g for _, g in want]
    assert [s.tokens for s in scores] == [len(candidate) for _, candidate in pairs]


def test_what_stands_beside_a_candidate_changes_its_score_by_rounding_at_most():
    model, pairs = small_model(dtype=torch.float32), some_pairs(1)
    scores = [[s.logprob for s in CandidateScorer(model, max_tokens=n).score_ids(pairs)] for n in (1, 300, 4096)]
    assert scores[1] == pytest.approx(scores[0], abs=2e-5)
    assert scores[2] == pytest.approx(scores[0], abs=2e-5)


@pytest.mark.parametrize(
    "controls",
    [
        {"ablate": "social"},
        {"ablate": {0: ["logic", "world"]}},
        {"keep": ["language", "logic"]},
        {"bias": {"logic": 3.0}},
        {"force": "world"},
        {"experts_per_token": 3},
        {"experts_per_token": 2, "ablate": "language"},
    ],
)
def test_steering_reaches_prompt_and_candidate(controls):
    model, pairs = small_model(seed=3), some_pairs(2)
    scores = [s.logprob for s in CandidateScorer(model, controls=controls, max_tokens=200).score_ids(pairs)]
    assert scores == pytest.approx([w for w, _ in one_by_one(model, pairs, **controls)], abs=1e-11)
    assert scores != pytest.approx([w for w, _ in one_by_one(model, pairs)], abs=1e-3)


@torch.no_grad()
def test_phases_steer_prompt_and_candidate_apart():
    model, pairs = small_model(seed=3), [([5, 6, 7], [8, 9, 10])]
    prompt = model(input_ids=torch.tensor([[5, 6, 7]]), force="logic", use_cache=True)
    answer = model(input_ids=torch.tensor([[8, 9]]), past_key_values=prompt.past_key_values, force="social")
    logits = torch.cat([prompt.logits[0, -1:], answer.logits[0]]).log_softmax(-1)
    want = float(logits[torch.arange(3), torch.tensor([8, 9, 10])].sum())
    scorer = CandidateScorer(model, controls={"force": Phases(prompt="logic", answer="social")})
    assert scorer.score_ids(pairs)[0].logprob == pytest.approx(want, abs=1e-11)


def test_a_model_that_trains_is_left_training():
    model = small_model().train()
    CandidateScorer(model).score_ids([([5], [6])])
    assert model.training


def test_prompts_are_read_once_and_what_they_share_too(monkeypatch):
    model, tokens = small_model(), []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **given: tokens.append(given["input_ids"].numel()) or forward(**given)
    )
    head = list(range(3, 53))
    pairs = [([*head, a], [b, 5]) for a in (7, 8, 9) for b in (10, 11, 12, 13)]
    CandidateScorer(model).score_ids(pairs)
    assert tokens == [50, 3, 12]


def test_only_the_last_slot_of_a_prompt_meets_the_vocabulary(monkeypatch):
    model, rows = small_model(), []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: rows.append(x.shape[0]) or head(x))
    CandidateScorer(model).score_ids([([5] * 30, [6, 7, 8]), ([9] * 20, [6])])
    assert rows == [2, 2]


def test_logits_are_formed_a_few_slots_at_a_time(monkeypatch):
    model, pairs = small_model(), [([5, 6], list(range(3, 60)))]
    want = CandidateScorer(model).score_ids(pairs)
    monkeypatch.setattr(candidates, "CHUNK_BYTES", 4 * 61 * 5)
    assert CandidateScorer(model).score_ids(pairs) == want


class Letters:
    """A tokenizer of single letters, in which "th" is one token."""

    def __call__(self, text):
        ids, i = [], 0
        while i < len(text):
            step = 2 if text[i : i + 2] == "th" else 1
            ids.append(2 if step == 2 else 3 + ord(text[i]) % 50)
            i += step
        return {"input_ids": ids}


def encode(text):
    return Letters()(text)["input_ids"]


def test_a_pair_is_tokenised_as_one_text():
    assert encode_pair(encode, "a b", " c") == (tuple(encode("a b")), tuple(encode(" c")))
    assert encode_pair(encode, "a b ", "c") == (tuple(encode("a b")), tuple(encode(" c")))
    # The token "th" reaches from the prompt into the candidate, and is the candidate's.
    assert encode_pair(encode, "at", "h") == (tuple(encode("a")), (2,))
    with pytest.raises(ValueError, match="is empty"):
        encode_pair(encode, "a", "")


def test_texts_are_scored_and_normalised():
    model = small_model()
    scorer = CandidateScorer(model, Letters())
    (first, second), (third,) = scorer.score(["a b", "c"], [[" d", " é"], [" that"]])
    want = one_by_one(model, [encode_pair(encode, "c", " that")])[0][0]
    assert third.logprob == pytest.approx(want, abs=1e-11)
    assert (third.tokens, third.text_bytes) == (4, 5)
    assert third.value("tokens") == third.logprob / 4
    assert third.value("bytes") == third.logprob / 5
    assert second.text_bytes == 3
    assert first.value() == first.logprob
    with pytest.raises(ValueError, match="normalization must be one of sum, tokens, bytes, got 'letters'"):
        first.value("letters")


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([([], [3])], "pair 0: the prompt has no tokens"),
        ([([3], [4]), ([3], [])], "pair 1: the candidate has no tokens"),
        ([([3] * 250, [4] * 8)], r"250 \+ 8 tokens, the model reads 256"),
    ],
)
def test_pairs_that_cannot_be_scored_are_named(pairs, message):
    with pytest.raises(ValueError, match=message):
        CandidateScorer(small_model()).score_ids(pairs)


def test_what_fits_exactly_is_scored():
    assert CandidateScorer(small_model()).score_ids([([3] * 250, [4] * 7)])[0].tokens == 7


@pytest.mark.parametrize(
    "controls, message",
    [
        ({"ablate": [["social"], ["logic"]]}, "row by row"),
        ({"bias": torch.zeros(1, 1, 5, 4)}, "slot by slot"),
        ({"force": lambda row, step: "logic"}, "step by step"),
        ({"ablate": "socal"}, "unknown expert"),
        ({"ablated": "social"}, "did you mean 'ablate'"),
    ],
)
def test_controls_that_count_rows_or_slots_are_refused(controls, message):
    with pytest.raises(ValueError, match=message):
        CandidateScorer(small_model(), controls=controls)


def test_a_dense_model_is_refused():
    with pytest.raises(TypeError, match="expected a MiCRo model, got Linear"):
        CandidateScorer(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_interventions_on_the_model_reach_prompts_and_candidates(kind):
    model, pairs = small_model(kind=kind), some_pairs(4)
    actions = [interventions.zero("units", experts="logic" if kind == "block" else None, units=[1, 2, 3, 4, 5, 6, 7])]
    free = CandidateScorer(model).score_ids(pairs)
    with model.intervene(*actions):
        scores = CandidateScorer(model, max_tokens=150).score_ids(pairs)
        want = one_by_one(model, pairs)
    assert [s.logprob for s in scores] == pytest.approx([w for w, _ in want], abs=1e-11)
    assert scores != free
    assert CandidateScorer(model).score_ids(pairs) == free


def test_texts_need_a_tokenizer_and_candidates_for_each_prompt():
    with pytest.raises(ValueError, match="texts need a tokenizer"):
        CandidateScorer(small_model()).score(["a"], [["b"]])
    with pytest.raises(ValueError, match="1 prompts but candidates for 2"):
        CandidateScorer(small_model(), Letters()).score(["a"], [["b"], ["c"]])
