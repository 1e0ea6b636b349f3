"""Machine code as nvdisasm prints it: functions, and what a run of instructions is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

GLOBAL_LOADS = ("LDG", "LDGSTS")
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "DMMA")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128
    operands: str
    guarded: bool = False  # by a predicate in front of it

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def is_tensor_core(self) -> bool:
        return self.base in TENSOR_CORE

    @property
    def conditional(self) -> bool:
        """Of a branch: it may fall through. Its condition stands in front of it, in its name or among its operands."""
        return self.guarded or self.opcode in ("BRA.DIV", "BRA.CONV") or re.match(r"!?U?P\w", self.operands) is not None

    @property
    def bits(self) -> int:
        """Width of a memory access, per lane."""
        for width in ("128", "64"):
            if width in self.opcode.split("."):
                return int(width)
        return 32


@dataclass(eq=False)
class Function:
    name: str  # mangled
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of the instruction that follows it


_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_x?_?\w+|\$\S+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def parse(text: str) -> dict[str, Function]:
    """Mangled name -> function."""
    found: dict[str, Function] = {}
    current: Function | None = None
    for line in text.splitlines():
        if start := _FUNCTION.match(line):
            current = found.setdefault(start[1], Function(start[1]))
        elif current is None:
            continue
        elif label := _LABEL.match(line):
            current.labels[label[1]] = len(current.code)
        elif instruction := _INSTRUCTION.match(line):
            current.code.append(Instruction(instruction[2], instruction[3], instruction[1] is not None))
    return found


@dataclass(frozen=True)
class Mix:
    """What a run of instructions is made of."""

    instructions: int
    tensor_core: int
    matrix_loads: int  # LDSM
    shared_loads: int  # LDS
    narrow_shared_loads: int  # LDS of at most 32 bits
    loads: int  # LDG, LDGSTS
    wide_loads: int  # of them 128 bits
    stores: int  # STG
    wide_stores: int
    local: int  # LDL, STL
    divisions: int


def mix(code: Sequence[Instruction]) -> Mix:
    """Counts."""
    loads = [i for i in code if i.base in GLOBAL_LOADS]
    stores = [i for i in code if i.base == "STG"]
    shared = [i for i in code if i.base == "LDS"]
    return Mix(
        instructions=len(code),
        tensor_core=sum(i.is_tensor_core for i in code),
        matrix_loads=sum(i.base == "LDSM" for i in code),
        shared_loads=len(shared),
        narrow_shared_loads=sum(i.bits == 32 for i in shared),
        loads=len(loads),
        wide_loads=sum(i.bits == 128 for i in loads),
        stores=len(stores),
        wide_stores=sum(i.bits == 128 for i in stores),
        local=sum(i.base in ("LDL", "STL") for i in code),
        divisions=sum(_divides(i) for i in code),
    )


def _divides(instruction: Instruction) -> bool:
    """Integer division: a call of the compiler's routine, or its inline form, which starts with a reciprocal."""
    if instruction.base == "CALL":
        return re.search(r"_(?:div|rem)_[us]\d", instruction.operands) is not None
    return instruction.base == "I2F" and "RP" in instruction.opcode.split(".")
