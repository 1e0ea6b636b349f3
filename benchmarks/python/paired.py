"""Interleaved pairs: the one way in which this project takes a ratio.

Both sides run in one process, warm, turn by turn (A B A B ...); each pair gives one ratio; the median of the ratios is
the result, with their spread and the ratio of the minima beside it. Outputs are compared before anything is timed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PAIRS = 11


@dataclass
class Ratio:
    """Time of ``ours`` over time of ``theirs``: below 1 is faster. Times are medians in milliseconds."""

    name: str
    ours_ms: float
    theirs_ms: float
    median: float
    low: float
    high: float
    of_minima: float

    def __str__(self) -> str:
        return (
            f"{self.name:<44} {self.ours_ms:9.2f} ms {self.theirs_ms:9.2f} ms   ratio {self.median:5.2f} "
            f"[{self.low:.2f}, {self.high:.2f}], of minima {self.of_minima:.2f}"
        )


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Mean time of one call, over a loop so that a region lasts at least a millisecond."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int = PAIRS) -> Ratio:
    """Warm both sides up, then take interleaved pairs."""
    repeats = max(1, int(1e-3 / max(min(seconds(ours, 1), seconds(theirs, 1)), 1e-7)))
    seconds(ours, repeats)
    seconds(theirs, repeats)
    times = [(seconds(ours, repeats), seconds(theirs, repeats)) for _ in range(pairs)]
    ratios = sorted(a / b for a, b in times)
    mine, other = [a for a, _ in times], [b for _, b in times]
    return Ratio(
        name,
        statistics.median(mine) * 1e3,
        statistics.median(other) * 1e3,
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
        min(mine) / min(other),
    )


def probes() -> dict[str, Any]:
    """What the machine gives in this run: peaks by torch's own GEMM, and a stream read."""
    n = 1536
    out: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        best = min(seconds(lambda a=a, b=b: a @ b, 3) for _ in range(3))
        out[f"gemm_gflops_{str(dtype).removeprefix('torch.')}"] = round(2 * n**3 / best / 1e9, 1)
    big = torch.ones(64 << 20)
    out["stream_read_gb_per_s"] = round(big.numel() * 4 / min(seconds(big.sum, 1) for _ in range(5)) / 1e9, 1)
    return out


def print_header() -> None:
    """What must stand beside every figure, on one line."""
    import micro

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.2f}, "
        f"instruction set {micro.build_info()['isa']}; {probes()}",
        flush=True,
    )


def environment() -> dict[str, Any]:
    """Everything that a figure needs beside it."""
    import micro

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "micro": micro.__version__,
        "build": micro.build_info(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "probes": probes(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(name: str, ratios: list[Ratio], folder: Path) -> None:
    """All ratios with the environment as JSON, beside the printed lines."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "ratios": [asdict(r) for r in ratios]}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
