"""Runs tests on a CUDA device that is this process's own memory (tests/pretend_cuda): micro's kernels in the emulator,
torch's operators on the host. ``MICRO_PRETEND_CUDA=<library> pytest -m gpu`` with a torch for the CPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Before torch asks for the first time whether there is CUDA: it remembers the answer.
LIBRARY = os.environ.get("MICRO_PRETEND_CUDA")
_loaded = ctypes.CDLL(LIBRARY) if LIBRARY else None

import torch  # noqa: E402


def install() -> bool:
    """Before anything imports micro: its operators come from the library, whose CUDA kernels are emulated ones."""
    if not LIBRARY:
        return False
    if torch.backends.cuda.is_built():
        raise RuntimeError("MICRO_PRETEND_CUDA needs a torch without CUDA: this one has the real device")
    load = torch.ops.load_library
    if hasattr(torch.ops.micro, "plan"):
        torch.ops.load_library = lambda path: None if path.endswith("libmicro.so") else load(path)
    torch.cuda._lazy_init = lambda: None
    return True


def knows_cuda() -> bool:
    """Whether this torch can differentiate tensors that say "cuda", real or not."""
    return bool(LIBRARY) or torch.backends.cuda.is_built()


@contextmanager
def no_waits() -> Iterator[None]:
    """Fails if the host waits for the device inside; on a real device torch itself raises."""
    if LIBRARY:
        torch.ops.pretend_cuda.take_waits()
        yield
        waits = torch.ops.pretend_cuda.take_waits()
        assert waits == [], f"the host waited for the device: {waits}"
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
