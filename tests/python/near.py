"""One comparison for all operators: relative to the largest value, by the tolerances of tolerances.py."""

import torch
from tolerances import RELATIVE_ON_CUDA
from torch import Tensor


def assert_near(got: Tensor, want: Tensor, *, dtype: torch.dtype | None = None, factor: float = 4) -> None:
    """`dtype`: the dtype of the inputs, where it is lower than that of the result."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=factor * RELATIVE_ON_CUDA[dtype or want.dtype])
