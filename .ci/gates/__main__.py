"""The static gates of the CUDA kernels: ``make gates``, or ``make gates UPDATE=1`` to write the tables anew.

Without nvcc one line says what was not looked at; where MICRO_REQUIRE_NVCC=1 or CI is set, that is a failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from gates import build, kernels, occupancy, resources, rules, sass, sources

ROOT = kernels.ROOT
RESOURCES = ROOT / "kernels" / "resources.csv"
INSTRUCTIONS = ROOT / "kernels" / "instructions.csv"
MIX_ARCHS = ("sm_80", "sm_90")  # whose machine code is looked at; the first one's is in the committed table


@contextmanager
def gate(name: str) -> Iterator[None]:
    """Prints the name of a gate, and the time it took."""
    print(f"== {name}", flush=True)
    start = time.monotonic()
    yield
    print(f"   {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    """Runs every gate, prints all findings, returns 1 if there are any."""
    parser = argparse.ArgumentParser(prog="make gates")
    parser.add_argument("--update", action="store_true", help="write the committed tables anew")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with gate("no host synchronisation in the sources"):
        faults = sources.search(sources.device_sources(ROOT))
    nvcc, nvdisasm = _nvcc(), _nvdisasm()
    if nvcc is None:
        print("nvcc was not found: architectures, resources, occupancy and machine code were NOT looked at")
        if os.environ.get("MICRO_REQUIRE_NVCC") == "1" or os.environ.get("CI"):
            faults.append("nvcc is required here (MICRO_REQUIRE_NVCC or CI is set)")
    elif nvdisasm is None:
        faults.append("nvdisasm was not found; it is among the packages for development: nvidia-cuda-nvdisasm")
    else:
        faults += compiled_gates(nvcc, nvdisasm, options.jobs, options.update)
    with gate("emulator under AddressSanitizer: tests, bytes, sectors, bank conflicts, launches"):
        faults += emulator(options.jobs)
    for fault in faults:
        print(f"FAILED: {fault}")
    passed = "gates: all passed" if nvcc else "gates: passed as far as they run without nvcc"
    print(f"gates: {len(faults)} findings" if faults else passed)
    return 1 if faults else 0


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _nvdisasm() -> str | None:
    installed = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvdisasm"))
    return str(installed[-1]) if installed else shutil.which("nvdisasm")


def compiled_gates(nvcc: str, nvdisasm: str, jobs: int, update: bool) -> list[str]:
    """C1 to C4 of the kernels that kernels/CMakeLists.txt lists."""
    archs = kernels.architectures((ROOT / "kernels/cmake/MicroCuda.cmake").read_text())
    listed = kernels.cuda_sources((ROOT / "kernels/CMakeLists.txt").read_text())
    version = build.nvcc_version(nvcc)
    with gate(f"nvcc {version}, warnings as errors: {', '.join(archs)}, {kernels.PTX}"):
        compiled = build.compile_all(nvcc, listed, archs, ROOT / "build" / "gates", jobs)
    failed = [each.error for each in compiled if each.error]
    if failed:
        return failed
    with gate("registers, spills, stack, shared memory"):
        usages = {key: usage for each in compiled for key, usage in resources.parse_ptxas(each.log).items()}
        launches = {name: launch for each in compiled for name, launch in resources.parse_ptx(each.ptx).items()}
        names = kernels.demangle(sorted({name for name, _ in usages}))
        table = resources.rows(usages, launches, names)
        faults = resources.faults(usages, table, names)
        faults += _committed(RESOURCES, resources.to_csv(table, archs, version), update)
    with gate("occupancy"):
        _write_occupancy(table, ROOT / "build" / "gates" / "occupancy.txt")
    with gate(f"machine code of {', '.join(MIX_ARCHS)}"):
        faults += _machine_code(nvdisasm, compiled, names, version, jobs, update)
    return faults


def _committed(path: Path, made: str, update: bool) -> list[str]:
    """Compares a table with the committed one, or writes it."""
    if update:
        path.write_text(made)
        return []
    name = str(path.relative_to(ROOT))
    if not path.is_file():
        return [f"{name} is missing: make gates UPDATE=1"]
    old = path.read_text()
    if old.splitlines()[:1] != made.splitlines()[:1]:
        print(f"   {name} was made by another nvcc: not compared")
    found = resources.differences(old, made, name)
    return [*found, f"{name}: if this is meant, make gates UPDATE=1 and commit"] if found else []


def _write_occupancy(table: list[resources.Row], path: Path) -> None:
    """Blocks and warps per multiprocessor, the limiter and the nearest cliff, of each kernel on each architecture."""
    lines = []
    for row in table:
        for arch, registers in row.registers.items():
            found = occupancy.occupancy(arch, row.threads, registers, row.shared)
            lines.append(
                f"{row.kernel} {arch}: {found.blocks} blocks, {found.warps} warps ({found.share:.0%}), "
                f"limited by {found.limiter}; one block less at {found.cliff}"
            )
    path.write_text("\n".join(lines) + "\n")
    print(f"   {len(lines)} lines in {path.relative_to(ROOT)}")


def _machine_code(
    nvdisasm: str, compiled: list[build.Compiled], names: dict[str, str], version: str, jobs: int, update: bool
) -> list[str]:
    rule_list = rules.read_rules((ROOT / "kernels" / "gates.toml").read_text())
    faults = rules.unused(rule_list, list(names.values()))
    table: dict[str, sass.Function] = {}
    for arch in MIX_ARCHS:
        with ThreadPoolExecutor(jobs) as pool:
            texts = pool.map(lambda each: _disassembled(nvdisasm, each.cubins[arch]), compiled)  # noqa: B023
        for mangled, function in chain.from_iterable(sass.parse(text).items() for text in texts):
            if mangled in names:
                faults += [f"{arch}: {fault}" for fault in rules.check(names[mangled], function, rule_list)]
                if arch == MIX_ARCHS[0]:
                    table[names[mangled]] = function
    return faults + _committed(INSTRUCTIONS, rules.to_csv(table, MIX_ARCHS[0], version), update)


def _disassembled(nvdisasm: str, cubin: Path) -> str:
    return subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def emulator(jobs: int) -> list[str]:
    """Builds the emulated kernels with the sanitizers and runs their tests and gates."""
    folder = str(ROOT / "build" / "sanitize")
    switches = ["KERNELS_ONLY=ON", "TESTS=ON", "SANITIZE=ON", "WERROR=ON", "CUDA=OFF"]
    steps = [
        ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", *(f"-DMICRO_{switch}" for switch in switches)],
        ["ninja", "-C", folder, "-j", str(jobs), "emulator_tests"],
        ["ctest", "--test-dir", folder, "--parallel", str(jobs), "-L", "emulator", "--output-on-failure"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return [f"{' '.join(step)}\n{(done.stdout + done.stderr)[-6000:]}"]
    print("   " + next((line for line in done.stdout.splitlines() if "tests passed" in line), "no test ran"))
    return []


if __name__ == "__main__":
    sys.exit(main())
