"""What the machine code of a kernel must look like: for all kernels, and by kernels/gates.toml."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass

from gates.loops import hottest, innermost_loops
from gates.sass import Function, Mix, mix


@dataclass(frozen=True)
class Rule:
    """One [[rule]] of kernels/gates.toml: what kernels whose name matches must have."""

    kernels: str  # regular expression over the whole name
    reason: str
    tensor_core: float = 0.0  # least share of the hottest loop's instructions
    per_matrix_load: float = 0.0  # least tensor-core instructions per LDSM of that loop
    wide_loads: float = 0.0  # least share of global loads with 128 bits, in the whole kernel
    wide_stores: float = 0.0
    narrow_shared_loads: int | None = None  # most LDS of at most 32 bits in the hottest loop
    divisions: bool = False  # integer division is allowed in innermost loops

    def applies(self, kernel: str) -> bool:
        return re.fullmatch(self.kernels, kernel) is not None


def read_rules(text: str) -> list[Rule]:
    """The rules of kernels/gates.toml; an unknown key is an error."""
    return [Rule(**entry) for entry in tomllib.loads(text).get("rule", [])]


def unused(rules: list[Rule], kernels: list[str]) -> list[str]:
    """A rule that applies to no kernel checks nothing."""
    return [
        f"gates.toml: no kernel is called {rule.kernels!r}" for rule in rules if not any(map(rule.applies, kernels))
    ]


def check(kernel: str, function: Function, rules: list[Rule]) -> list[str]:
    """What is wrong with one kernel's machine code."""
    found = []
    whole, loop = mix(function.code), mix(hottest(function))
    mine = [rule for rule in rules if rule.applies(kernel)]
    if whole.local:
        found.append(f"{whole.local} accesses to local memory")
    divisions = sum(mix(code).divisions for code in innermost_loops(function))
    if divisions and not any(rule.divisions for rule in mine):
        found.append(f"{divisions} integer divisions in innermost loops")
    for rule in mine:
        found += _check_rule(rule, whole, loop)
    return [f"{kernel}: {fault}" for fault in found]


def _check_rule(rule: Rule, whole: Mix, loop: Mix) -> list[str]:
    found = []
    shares = (
        ("tensor-core instructions in the hottest loop", loop.tensor_core, loop.instructions, rule.tensor_core),
        ("tensor-core instructions per LDSM", loop.tensor_core, loop.matrix_loads, rule.per_matrix_load),
        ("128-bit global loads", whole.wide_loads, whole.loads, rule.wide_loads),
        ("128-bit global stores", whole.wide_stores, whole.stores, rule.wide_stores),
    )
    for what, part, of, least in shares:
        if part < least * max(of, 1):
            found.append(f"{what}: {part} of {of}, expected a ratio of at least {least}")
    if rule.narrow_shared_loads is not None and loop.narrow_shared_loads > rule.narrow_shared_loads:
        found.append(f"{loop.narrow_shared_loads} narrow LDS in the hottest loop, expected {rule.narrow_shared_loads}")
    return found


COLUMNS = (
    "kernel",
    "instructions",
    "global loads",
    "of 128 bits",
    "global stores",
    "of 128 bits",
    "loop",
    "tensor core",
    "LDSM",
    "LDS",
)


def to_csv(table: dict[str, Function], arch: str, version: str) -> str:
    """The committed form of the mixes: a line on its making, a header, one line per kernel."""
    lines = [f"# made by `make gates UPDATE=1` with nvcc {version} for {arch}; from 'loop' on: its hottest loop"]
    lines.append(";".join(COLUMNS))
    for kernel, function in sorted(table.items()):
        whole, loop = mix(function.code), mix(hottest(function))
        memory = (whole.loads, whole.wide_loads, whole.stores, whole.wide_stores)
        inner = (loop.instructions, loop.tensor_core, loop.matrix_loads, loop.shared_loads)
        lines.append(";".join([kernel, *map(str, (whole.instructions, *memory, *inner))]))
    return "\n".join(lines) + "\n"
