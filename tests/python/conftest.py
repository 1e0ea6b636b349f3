"""What every Python test runs under: one thread, fixed seeds, no network, no GPU unless a test asks for one."""

import os
import random
import socket

import numpy as np
import pretend_cuda  # before torch
import pytest
import torch

HAS_CUDA = pretend_cuda.install() or torch.cuda.is_available()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_connect = socket.socket.connect


def _local_only(self: socket.socket, address: object) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and str(address[0]) not in ("127.0.0.1", "::1", "localhost"):  # type: ignore[index]
        raise RuntimeError(f"a test tried to reach {address}: tests run without a network")
    _connect(self, address)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers whatever ran before, and no way out to the network."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setattr(socket.socket, "connect", _local_only)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test computes."""
    return torch.device(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m gpu`` tests are skipped where there is no device; MICRO_REQUIRE_CUDA=1 lets them run and fail instead."""
    if HAS_CUDA or os.environ.get("MICRO_REQUIRE_CUDA") == "1":
        return
    skip = pytest.mark.skip(reason="no CUDA device (MICRO_REQUIRE_CUDA=1 turns this into a failure)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
