"""The natural loops of a function: a branch back to a block that every way into the loop passes through. A branch back
alone is not enough, for compilers put rare code at the end and jump back from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from gates.sass import Function, Instruction

_TARGET = re.compile(r"`\(([^)]+)\)")


@dataclass
class Block:
    """Instructions [start, end) that run one after the other."""

    start: int
    end: int
    next: list[int]  # indices of blocks


def blocks_of(function: Function) -> list[Block]:
    """The flow of a function, in the order of addresses."""
    code = function.code
    ends = {i + 1 for i, instruction in enumerate(code) if _leaves(instruction)}
    starts = sorted(({0} | set(function.labels.values()) | ends) - {len(code)})
    index = {start: i for i, start in enumerate(starts)}
    blocks = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(code)
        last = code[end - 1]
        following = [index[t] for t in _targets(function, end - 1) if t in index]
        if not _always_leaves(last) and i + 1 < len(starts):
            following.append(i + 1)
        blocks.append(Block(start, end, following))
    return blocks


def _leaves(instruction: Instruction) -> bool:
    """Ends a block. A call of a label of the function itself is the compiler's way to leave a loop: a jump."""
    if instruction.base == "CALL":
        return "`(.L" in instruction.operands
    return instruction.base in ("BRA", "BRX", "EXIT", "RET", "BSYNC")


def _always_leaves(instruction: Instruction) -> bool:
    return _leaves(instruction) and not instruction.conditional


def _targets(function: Function, i: int) -> list[int]:
    """Where the instruction may jump to. BSYNC goes on where the BSSY before it says."""
    instruction = function.code[i]
    if instruction.base == "BSYNC":
        barrier = instruction.operands.split(",")[0]
        before = (each for each in reversed(function.code[:i]) if each.base == "BSSY")
        instruction = next((each for each in before if each.operands.split(",")[0] == barrier), instruction)
    elif instruction.base not in ("BRA", "CALL"):
        return []
    target = _TARGET.search(instruction.operands)
    return [function.labels[target[1]]] if target and target[1] in function.labels else []


def dominators(blocks: list[Block]) -> list[int]:
    """For each block the blocks that every way from the start to it passes, as bits; all for a block without a way."""
    everything = (1 << len(blocks)) - 1
    found = [1] + [everything] * (len(blocks) - 1)
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for following in block.next:
            before[following].append(i)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            passed = everything
            for b in before[i]:
                passed &= found[b]
            if passed | 1 << i != found[i]:
                found[i], changed = passed | 1 << i, True
    return found


@lru_cache(maxsize=1)
def loops(function: Function) -> list[set[int]]:
    """The blocks of each loop, by their indices; loops with one head are one loop."""
    blocks = blocks_of(function)
    dominated_by, reached = dominators(blocks), _reached(blocks)
    bodies: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in block.next:
            if i in reached and dominated_by[i] >> head & 1:
                bodies.setdefault(head, {head}).update(_body(blocks, head, i))
    return [bodies[head] for head in sorted(bodies)]


def _reached(blocks: list[Block]) -> set[int]:
    """What the start leads to; the padding after a function's end does not belong to it."""
    found: set[int] = set()
    waiting = [0]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            waiting += blocks[here].next
    return found


def _body(blocks: list[Block], head: int, last: int) -> set[int]:
    """Every block from which `last` is reached without passing the head."""
    before: dict[int, list[int]] = {}
    for i, block in enumerate(blocks):
        for following in block.next:
            before.setdefault(following, []).append(i)
    found, waiting = {head}, [last]
    while waiting:
        here = waiting.pop()
        if here not in found:
            found.add(here)
            waiting += before.get(here, [])
    return found


def _without_inner(bodies: list[set[int]]) -> list[set[int]]:
    return [body for body in bodies if not any(other < body for other in bodies)]


def _code(function: Function, blocks: list[Block], body: set[int]) -> list[Instruction]:
    return [each for i in sorted(body) for each in function.code[blocks[i].start : blocks[i].end]]


def innermost_loops(function: Function) -> list[list[Instruction]]:
    """The code of each loop that holds no other loop."""
    blocks = blocks_of(function)
    return [_code(function, blocks, body) for body in _without_inner(loops(function))]


def hottest(function: Function) -> list[Instruction]:
    """The loop that does most. Where there are tensor-core instructions, the innermost loop around most of them, with
    all that is in it; else the longest innermost loop; without loops, everything.
    """
    blocks = blocks_of(function)
    bodies = loops(function)
    codes = {frozenset(body): _code(function, blocks, body) for body in bodies}
    around = [body for body in bodies if any(each.is_tensor_core for each in codes[frozenset(body)])]
    chosen = [codes[frozenset(body)] for body in _without_inner(around or bodies)]
    return max(chosen, key=lambda code: (sum(i.is_tensor_core for i in code), len(code)), default=function.code)
