"""The one command for a machine with a CUDA device (`make gpu-check`): every kernel's test on the device, the Python
tests of the device, and then our speed against FlexAttention, SDPA with a mask, grouped products, the all-expert way
and dense transformers. Outputs are compared before anything is timed.

    python benchmarks/python/gpu_check.py [--list] [--rows attention,decode] [--minutes 10] [--official FOLDER]

Exit status: 0 all is well, 1 something failed, 2 this machine cannot run it (and what would have run is printed).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import gpu_rows
import torch
from official import Official

ROOT = Path(__file__).resolve().parents[2]
HEAD = (
    "ratio: theirs over ours; <=: ours over theirs, small is good. differs: largest relative difference of outputs\n"
    f"{'comparison':<37}{'ratio [extremes]':<24}{'ours / theirs':<22}{'differs':<9}against"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in gpu_rows.ROWS]
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument("--rows", default="", help=f"comparisons to make, comma-separated, of {', '.join(names)}")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "dev", help="build folder (default build/dev)")
    parser.add_argument("--device", default="cuda", help="cpu: only the comparisons, to show that they work")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: measures nothing")
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="for the comparisons, after the tests; what has not begun by then is left out, which counts as failed",
    )
    parser.add_argument("--official", type=Path, help="your copy of the official repository: the all-expert side")
    parser.add_argument("--official-python", default=sys.executable, help="interpreter with the transformers it needs")
    parser.add_argument("--official-revision", default="r2", choices=["r1", "r2"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes")
    options = parser.parse_args(arguments)
    options.wanted = [name for name in options.rows.split(",") if name] or names
    if unknown := set(options.wanted) - set(names):
        parser.error(f"--rows: unknown {sorted(unknown)}; known are {', '.join(names)}")
    return options


# ---- what would run --------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[str]:
    lines = ["tests:"]
    lines += [f"  {' '.join(map(str, command))}" for command in test_commands(options)]
    lines.append("comparisons:")
    for row in gpu_rows.ROWS:
        if row.name in options.wanted:
            lines.append(f"  {row.name:<18}{row.what}; against {row.against}")
    return lines


def test_commands(options: argparse.Namespace) -> list[list[str]]:
    """Build the kernels' tests for a device, run them, run the Python tests of the device."""
    build, jobs = str(options.build), str(options.jobs)
    switches = [*(f"-DMICRO_{name}=ON" for name in ("DEV", "TESTS", "CUDA", "GPU_TESTS")), *_machine_code()]
    return [
        ["cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja", *switches, f"-DPython_EXECUTABLE={sys.executable}"],
        ["ninja", "-C", build, "-k", "0", "-j", jobs],
        ["ctest", "--test-dir", build, "--label-regex", "gpu", "--no-tests=error", "--output-on-failure"],
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests" / "python")],
    ]


def _machine_code() -> list[str]:
    """For the device that is there: what is tested is what would run."""
    if not torch.cuda.is_available():
        return []
    return ["-DMICRO_CUDA_ARCHITECTURES={}{}".format(*torch.cuda.get_device_capability())]


def obstacle(device: str) -> str | None:
    """Why nothing can run here, and what to do about it; None: it can."""
    if device == "cpu":
        return None
    if not torch.backends.cuda.is_built():
        return (
            f"torch {torch.__version__} is a build for the CPU: install a build for CUDA into this environment, "
            "then `make build`"
        )
    if not torch.cuda.is_available():
        return "no CUDA device or driver was found on this machine"
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file()):
        return "nvcc was not found: install the CUDA toolkit, or name it in CUDACXX"
    return None


# ---- running ---------------------------------------------------------------------------------------------------------


def run_tests(options: argparse.Namespace) -> list[str]:
    """The commands that failed. A build that failed makes the rest meaningless."""
    failed = []
    for command in test_commands(options):
        print(f"\n$ {' '.join(command)}", flush=True)
        done = subprocess.run(command, check=False, cwd=ROOT, env={**os.environ, "MICRO_REQUIRE_CUDA": "1"})
        if done.returncode:
            failed.append(" ".join(command))
            if command[0] in ("cmake", "ninja"):
                break
    return failed


def run_rows(options: argparse.Namespace, deadline: float) -> list[str]:
    """The comparisons that failed or were left out."""
    bench = gpu_rows.Bench(torch.device(options.device), options.quick)
    if options.official is not None:
        bench.official = Official(options.official, options.official_python, options.official_revision, threads=1)
    try:
        return _run_rows(bench, options, deadline)
    finally:
        if bench.official is not None:
            bench.official.close()


def _run_rows(bench: gpu_rows.Bench, options: argparse.Namespace, deadline: float) -> list[str]:
    failed = []
    print(f"\n{HEAD}", flush=True)
    for row in gpu_rows.ROWS:
        if row.name not in options.wanted:
            continue
        if time.monotonic() > deadline:
            failed.append(f"{row.name}: left out, the time is up")
            continue
        try:
            for result in row.run(bench):
                print(result, flush=True)
        except Exception as error:  # one comparison must not cost the others
            traceback.print_exc()
            failed.append(f"{row.name}: {type(error).__name__}: {error}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(plan(options)))
        return 0
    if (why := obstacle(options.device)) is not None:
        print(f"gpu-check: {why}", file=sys.stderr)
        print("\nOn a machine with a device this would run:", *plan(options), sep="\n")
        return 2
    begin = time.monotonic()
    on_cpu = options.device == "cpu"
    device = "the CPU: shows that the comparisons work" if on_cpu else torch.cuda.get_device_name()
    print(f"micro on {device}; torch {torch.__version__}")
    failed = [] if on_cpu else run_tests(options)
    failed += run_rows(options, time.monotonic() + 60 * options.minutes)
    print(f"\n{(time.monotonic() - begin) / 60:.1f} minutes; " + (f"{len(failed)} failed" if failed else "all is well"))
    print(*(f"  {what}" for what in failed), sep="\n", end="\n" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
