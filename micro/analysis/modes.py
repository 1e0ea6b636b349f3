"""How a model is held while it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradient and no noise inside the block; behind it the model's mode is what it was.

    What is no module (a stand-in of a test, say) has no mode. A generator that yields inside the block needs
    ``@torch.no_grad()`` itself: else its caller would be without gradients between two items.
    """
    module = model if isinstance(model, torch.nn.Module) else torch.nn.Module()
    was_training = module.training
    module.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
