"""Fixtures that several files of unit tests share."""

import pytest
import torch


@pytest.fixture
def short(monkeypatch):
    """CogBench with short versions of its long experiments."""
    from micro.evaluation.cogbench import balloon, instrumental, restless_bandit, two_step

    monkeypatch.setattr(restless_bandit, "BLOCKS", (3, 2, 2, 2))
    monkeypatch.setattr(instrumental, "VISITS", 3)
    monkeypatch.setattr(two_step, "DAYS", 4)
    monkeypatch.setattr(balloon, "EACH", 1)
    monkeypatch.setattr(balloon, "LIMITS", (5, 4, 3))


@pytest.fixture(scope="module")
def player():
    """A model that plays CogBench, and its tokenizer."""
    from small_models import small_model

    from micro.testing.tokenizers import tiny_tokenizer

    model = small_model(dtype=torch.float32, vocab_size=512, max_position_embeddings=4096)
    return model, tiny_tokenizer()
