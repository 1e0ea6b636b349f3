"""What stands beside every figure: the machine, its probes in this run, versions, and the state of the sources."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "build" / "dev" / "benchmarks" / "cpp"
MEASURED = ("micro", "csrc", "kernels", "benchmarks/python", "benchmarks/cpp", "constraints.txt")
PACKAGES = ("transformers", "numpy", "llama_cpp_python", "zentorch")


def program(name: str) -> Path:
    """A compiled benchmark program."""
    path = PROGRAMS / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not built: `make build` does it; older build folders need -DMICRO_BENCHMARKS=ON"
        )
    return path


def probes(threads: int, times: int) -> dict[str, Any]:
    """Peaks of both dtypes, stream read and memcpy, best of several, measured by a program that does nothing else."""
    command = [str(program("probe")), str(threads), str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name: round(value, 1) for name, value in json.loads(done.stdout).items()}


class StreamProbe:
    """A resident process that reads or copies memory once per call: a side of a round, timed per gigabyte."""

    def __init__(self, threads: int, what: Literal["read", "copy"] = "read") -> None:
        self.what = what
        self.process = subprocess.Popen(
            [program("probe"), "serve", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(self.what, file=self.process.stdin, flush=True)
        return 1 / float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def environment(threads: int, times: int = 5) -> dict[str, Any]:
    import micro

    info = micro.build_info()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "threads": threads,
        "instruction_set": info["isa"],
        "torch": torch.__version__,
        "micro": micro.__version__,
        "versions": versions,
        "compiler": info["compiler"],
        "commit": commit(),
        "clock": f"perf_counter, resolution {time.get_clock_info('perf_counter').resolution:g} s",
        "paths": {op: paths["cpu"] for op, paths in info["ops"].items()},
        "probes": probes(threads, times),
    }


def cpu() -> str:
    """Model name, family and model number: some virtual machines hide the name."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor()
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit() -> str:
    """The commit, and whether sources differ from it."""
    return _git("rev-parse", "--short", "HEAD") + (
        "+changes" if _git("diff", "HEAD", "--stat", "--", *MEASURED) else ""
    )


def sources() -> str:
    """A digest of what is measured and how, uncommitted changes included: equal sources, equal digest."""
    content = _git("ls-tree", "HEAD", *MEASURED) + _git("diff", "HEAD", "--", *MEASURED)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
