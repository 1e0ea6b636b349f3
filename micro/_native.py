"""Loads the compiled core: torch, then libmicro, then the module ``micro._C``. Importing this module does it once.

libmicro registers the operators of ``torch.ops.micro``. Its C++ interface is that of the torch it was built against; a
binary for another torch does not load, so the versions are compared first and a mismatch is one sentence.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Container
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "lib" / "libmicro.so"


def rebuild_command(info: dict[str, Any]) -> str:
    """The command that builds micro against the torch that is installed now."""
    if info.get("in_source_tree") == "ON":
        return f"make -C {LIBRARY.parents[2]} build"
    return (
        "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir --no-binary :all: micro-reasoners"
    )


def read_build_info() -> dict[str, Any]:
    """What the build wrote beside libmicro: version, torch, compiler, CUDA.

    Raises:
        ImportError: the core has not been built.
    """
    try:
        info: dict[str, Any] = json.loads(LIBRARY.with_name("build_info.json").read_text())
    except FileNotFoundError:
        raise ImportError(
            f"the compiled core of micro is missing ({LIBRARY}): in a checkout run `make build`, else reinstall with "
            "`pip install --no-build-isolation --force-reinstall --no-deps micro-reasoners`"
        ) from None
    return info


def mismatch(built: str, found: str) -> bool:
    """Whether a core built against torch ``built`` cannot run with torch ``found`` (local parts like +cpu apart)."""
    return built.split("+")[0] != found.split("+")[0]


def _load() -> ModuleType:
    info = read_build_info()
    built, found = info["torch"], str(torch.__version__)
    sentence = f"micro was built against torch {built} but torch {found} is installed: run `{rebuild_command(info)}`"
    if mismatch(built, found):
        raise ImportError(sentence)
    try:
        torch.ops.load_library(str(LIBRARY))
        return importlib.import_module("micro._C")
    except (OSError, ImportError) as error:
        if built != found and "undefined symbol" in str(error):
            raise ImportError(sentence) from error
        raise ImportError(f"{LIBRARY} does not load: {error}") from error


core = _load()

# Operators whose work is done by another one's kernel.
_HOME = {"moments_": "moments", "stacked_linear": "expert_linear"}


def operators() -> list[str]:
    """The public operators of ``torch.ops.micro``: those that are no half of another one."""
    names = {
        name.removeprefix("micro::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("micro::")
    }
    halves = {name + half for name in names for half in ("_forward", "_backward")}
    return sorted(names - halves)


def build_info() -> dict[str, Any]:
    """What :func:`micro.build_info` returns: the build's record, the instruction set, and the path of each operator."""
    info = read_build_info()
    cpu_kernels, cuda_kernels = info.pop("kernels"), info.pop("cuda_kernels")
    info |= core.build_info()
    info["ops"] = {
        name: {
            "cpu": _cpu_path(name, cpu_kernels, info["isa"]),
            "cuda": _cuda_path(name, cpu_kernels, cuda_kernels, info),
        }
        for name in operators()
    }
    return info | {"library": str(LIBRARY), "torch_found": str(torch.__version__)}


def _cpu_path(operator: str, kernels: dict[str, list[str]], isa: str) -> str:
    """What runs on the CPU: the best kernel that this instruction set allows."""
    written = kernels.get(_HOME.get(operator, operator))
    if written is None:
        return "torch functions"
    levels = ["plain", "avx2", "avx512", "avx512_bf16"]
    best = [level for level in levels[: levels.index(isa) + 1] if level in written][-1]
    return f"micro kernel ({best})"


def _cuda_path(operator: str, cpu_kernels: Container[str], cuda_kernels: Container[str], info: dict[str, Any]) -> str:
    """What runs on a CUDA device: the machine code and PTX that this build has, or why there is none."""
    home = _HOME.get(operator, operator)
    if home not in cpu_kernels:
        return "torch functions"
    if not info["cuda_archs"]:
        return f"none ({info['cuda']})"
    if home not in cuda_kernels:
        return "none (no kernel)"
    return f"micro kernel ({', '.join(info['cuda_archs'])})"
