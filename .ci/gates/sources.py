"""Host synchronisation that can be read off the sources: in launchers, kernels and operators there must be none."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

FORBIDDEN = {
    "a copy that the host waits for": re.compile(r"\bcudaMemcpy(?!Async)\w*\s*\("),
    "memory that CUDA gives or takes": re.compile(r"\bcuda(?:Malloc|Free|HostAlloc)\w*\s*\("),
    "a wait for the device": re.compile(r"\bcuda(?:Device|Stream|Event)Synchronize\s*\("),
    "an element on the host": re.compile(r"\.item(?:<[^>]*>)?\(\)"),
    "a copy to the host": re.compile(r"\.cpu\(\)|\.to\((?:at::)?kCPU|\.to\(at::Device\(at::kCPU"),
    "a shape that depends on data": re.compile(r"\bat::(?:nonzero|masked_select|unique\w*)\s*\(|\.nonzero\(\)"),
}


ONLY_ON_CPU = re.compile(r"^\w.*\b\w+_cpu\(")  # the head of a function that is for the CPU alone


def search(files: Iterable[tuple[str, str]]) -> list[str]:
    """Findings in (name, text), as 'file:line: what'; comments and functions called *_cpu do not count."""
    found = []
    for name, text in files:
        on_cpu = False
        for number, line in enumerate(text.splitlines(), 1):
            on_cpu = line != "}" and (on_cpu or ONLY_ON_CPU.match(line) is not None)
            code = "" if on_cpu else line.split("//")[0]
            found += [f"{name}:{number}: {what}" for what, pattern in FORBIDDEN.items() if pattern.search(code)]
    return found


def device_sources(root: Path) -> list[tuple[str, str]]:
    """Everything that runs in a step on a device: kernels with their launchers, and the operators."""
    paths = [*root.glob("kernels/**/*.cu"), *root.glob("kernels/**/*.cuh"), *root.glob("csrc/ops/*")]
    return [(str(path.relative_to(root)), path.read_text()) for path in sorted(paths)]
