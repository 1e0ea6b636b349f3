"""``micro doctor``: what is installed, what was built, and which path each operator takes."""

from __future__ import annotations

import importlib.metadata
import json as format_json
import os
import platform
from typing import Annotated, Any

import typer

from micro import cuda

EXTRAS = {
    "hf": ("transformers", "tokenizers", "datasets", "accelerate", "safetensors", "pydantic", "pyarrow", "jinja2"),
    "eval": ("scipy", "statsmodels", "pandas", "lm-eval"),
    "viz": ("matplotlib", "pandas"),
    "gguf": ("gguf",),
}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Versions, compiled core, instruction set, the path each operator takes, and installed extras."""
    report = examine()
    typer.echo(format_json.dumps(report, indent=2) if json else as_text(report))
    if "error" in report["core"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything the command prints; ``["core"]["error"]`` is the loader's sentence where the core does not load."""
    return {
        "micro": _version("micro-reasoners"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "packages": {name: _version(name) for name in ("torch", "numpy", "typer", "rich", "pyyaml")},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "core": _core(),
        "device": _device(),
        "cuda": cuda.examine(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _core() -> dict[str, Any]:
    try:
        import micro

        return micro.build_info()
    except (ImportError, OSError) as error:
        return {"error": str(error)}


def _device() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"error": str(error)}
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"micro      {report['micro']}",
        f"Python     {report['python']} on {report['platform']}, {report['cpus']} CPUs",
    ]
    lines += _core_lines(report["core"], report["device"], report["cuda"])
    lines.append("packages   " + ", ".join(_with_version(n, v) for n, v in report["packages"].items()))
    for extra, packages in report["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        state = "complete" if not missing else f"missing {', '.join(missing)}: pip install 'micro-reasoners[{extra}]'"
        lines.append(f"extra      {extra}: {state}")
    return "\n".join(lines)


def _cuda_lines(core: dict[str, Any], device: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What was built, what the machine has, and whether torch can bring the two together."""
    built = ", ".join(core["cuda_archs"])
    lines = [f"CUDA       kernels {f'for {built}' if built else 'off'} ({core['cuda']})"]
    if not found["devices"]:
        return [*lines, f"devices    none: {found['why_none']}"]
    for each in found["devices"]:
        code = cuda.code_for(each["arch"], core["cuda_archs"])
        runs = f"runs the {code} kernels" if code else "no kernel of this build fits"
        lines.append(f"device     {each['name']} ({each['arch']}), driver for CUDA {found['driver']}: {runs}")
    if not device["cuda"]:
        lines.append(f"           but torch {device['torch']} cannot use it: install a torch for CUDA and build again")
    return lines


def _with_version(name: str, version: str | None) -> str:
    return f"{name} {version}" if version else f"{name} MISSING"


def _core_lines(core: dict[str, Any], device: dict[str, Any], found: dict[str, Any]) -> list[str]:
    if "error" in core:
        return [f"core       NOT LOADED: {core['error']}"]
    isa = core["isa"]
    if core["isa_requested"] and not core["isa_honoured"]:
        isa += f" (MICRO_ISA={core['isa_requested']} is unknown or above what this CPU has)"
    elif core["isa"] != core["isa_best"]:
        isa += f" (MICRO_ISA; this CPU has {core['isa_best']})"
    lines = [
        f"core       {core['version']}, {core['compiler']}, {core['build_type']}, {core['library']}",
        f"torch      built against {core['torch']}, found {device['torch']}, {device['threads']} threads",
        f"ISA        {isa}",
        *_cuda_lines(core, device, found),
        "operators",
    ]
    width = max(len(name) for name in core["ops"])
    lines += [f"  {name:<{width}}  cpu: {path['cpu']}; cuda: {path['cuda']}" for name, path in core["ops"].items()]
    return lines
