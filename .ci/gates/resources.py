"""Registers, spills, stack and shared memory of each kernel, from what ptxas printed and from the PTX."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass
class Usage:
    """Of one function on one architecture."""

    registers: int = 0
    stack: int = 0
    spills: int = 0
    static_shared: int = 0


_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_ptxas(log: str) -> dict[tuple[str, str], Usage]:
    """(mangled name, architecture) -> usage. What a kernel's functions spill counts as the kernel's."""
    found: dict[tuple[str, str], Usage] = {}
    current: Usage | None = None
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            current = found.setdefault((entry[1], entry[2]), Usage())
        elif current is None:
            continue
        elif frame := _FRAME.search(line):
            current.stack += int(frame[1])
            current.spills += int(frame[2]) + int(frame[3])
        elif used := _USED.search(line):
            current.registers = int(used[1])
            current.static_shared = int(used[2] or 0)
    return found


@dataclass
class Launch:
    """What a kernel says of its launches."""

    threads: int  # of a block, at most (launch bounds)
    dynamic_shared: int  # bytes: the struct of shared_memory<>(), or 0


_PTX_ENTRY = re.compile(r"\.entry\s+(\S+?)\s*\(")
_BOUNDS = re.compile(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_SHARED = re.compile(r"micro_shared_bytes (\d+)")


def parse_ptx(ptx: str) -> dict[str, Launch]:
    """Mangled name -> launch. `threads` is 0 where the kernel has no launch bounds."""
    entries = list(_PTX_ENTRY.finditer(ptx))
    found = {}
    ends = [entry.start() for entry in entries[1:]] + [len(ptx)]
    for entry, end in zip(entries, ends, strict=False):  # a source may have launchers only
        text = ptx[entry.end() : end]
        bounds = _BOUNDS.search(text)
        threads = 0
        if bounds:
            threads = int(bounds[1]) * int(bounds[2] or 1) * int(bounds[3] or 1)
        found[entry[1]] = Launch(threads, max((int(n) for n in _SHARED.findall(text)), default=0))
    return found


@dataclass
class Row:
    """One line of kernels/resources.csv."""

    kernel: str
    threads: int
    shared: int  # bytes per block, static and dynamic
    registers: dict[str, int] = field(default_factory=dict)  # by architecture


def rows(usages: dict[tuple[str, str], Usage], launches: dict[str, Launch], names: dict[str, str]) -> list[Row]:
    """The table, sorted by name."""
    table: dict[str, Row] = {}
    for (mangled, arch), usage in usages.items():
        launch = launches[mangled]
        row = table.setdefault(
            mangled, Row(names[mangled], launch.threads, usage.static_shared + launch.dynamic_shared)
        )
        row.registers[arch] = usage.registers
    return sorted(table.values(), key=lambda row: row.kernel)


MOST_SHARED = 99 * 1024  # bytes that a block may have on sm_86, sm_89 and sm_120


def faults(usages: dict[tuple[str, str], Usage], table: list[Row], names: dict[str, str]) -> list[str]:
    """What no table may excuse: spills, a stack, too much shared memory, a kernel without launch bounds."""
    found = []
    for (mangled, arch), usage in usages.items():
        if usage.spills or usage.stack:
            found.append(f"{names[mangled]} on {arch}: {usage.stack} bytes of stack, {usage.spills} bytes of spills")
    for row in table:
        if row.shared > MOST_SHARED:
            found.append(f"{row.kernel}: {row.shared} bytes of shared memory, some devices have {MOST_SHARED}")
        if row.threads == 0:
            found.append(f"{row.kernel} has no __launch_bounds__")
    return found


def to_csv(table: list[Row], archs: list[str], version: str) -> str:
    """The committed form: a line on its making, a header, one line per kernel."""
    lines = [f"# made by `make gates UPDATE=1` with nvcc {version}; spills and stack are 0 everywhere"]
    lines.append(";".join(["kernel", "threads", "shared", *(f"registers {arch}" for arch in archs)]))
    for row in table:
        registers = [str(row.registers.get(arch, "")) for arch in archs]
        lines.append(";".join([row.kernel, str(row.threads), str(row.shared), *registers]))
    return "\n".join(lines) + "\n"


def differences(committed: str, made: str, path: str) -> list[str]:
    """How the table that was made differs from the committed one. Another nvcc may choose other registers: no fault."""
    old, new = committed.splitlines(), made.splitlines()
    if old[:1] != new[:1]:
        return []
    gone = [f"{path}: was  {line}" for line in old if line not in new]
    return gone + [f"{path}: now  {line}" for line in new if line not in old]
