"""Names: of the sources, of their kernels, and of the architectures that they are compiled for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
PTX = "compute_80"


def cuda_sources(text: str) -> list[str]:
    """The .cu files that kernels/CMakeLists.txt lists."""
    block = re.search(r"set\(MICRO_CUDA_SOURCES\n(.*?)\)", text, re.DOTALL)
    if block is None:
        raise ValueError("kernels/CMakeLists.txt sets no MICRO_CUDA_SOURCES")
    return block[1].split()


def architectures(text: str) -> list[str]:
    """The architectures of machine code that kernels/cmake/MicroCuda.cmake names by default, as 'sm_80'."""
    found = re.search(r"set\(MICRO_CUDA_ARCHITECTURES ([\d ]+[af]?) CACHE", text)
    if found is None:
        raise ValueError("kernels/cmake/MicroCuda.cmake sets no MICRO_CUDA_ARCHITECTURES")
    return [f"sm_{number}" for number in found[1].split()]


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled name -> readable name, by the c++filt that comes with g++."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: short_name(line) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


def short_name(demangled: str) -> str:
    """'void a::rms_norm_kernel<a::BFloat16>(a::Params)' -> 'rms_norm_kernel<BFloat16>'."""
    name = demangled.replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = i
            break
    name = name[:end].removeprefix("void ")
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # the type of a constant
    return re.sub(r"\b(?:\w+::)+", "", name)
