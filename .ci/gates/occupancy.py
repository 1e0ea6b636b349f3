"""How many blocks of a kernel fit on a multiprocessor, what sets the limit, and how near the next step is."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 64 * 1024  # of a multiprocessor, on every architecture here
REGISTER_UNIT = 256  # registers are given to a warp in these units
SHARED_UNIT = 128
RESERVED_SHARED = 1024  # bytes that the system keeps per block


@dataclass(frozen=True)
class Limits:
    """Per multiprocessor; CUDA programming guide, table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024),
    "sm_89": Limits(48, 24, 100 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    share: float  # of the warps that the multiprocessor holds
    limiter: str  # registers, shared memory, warps or blocks
    cliff: str  # the nearest step down, in words


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _by_limit(limits: Limits, threads: int, registers: int, shared: int) -> dict[str, int]:
    warps = -(-threads // WARP)
    per_warp = _up(max(registers, 1) * WARP, REGISTER_UNIT)
    return {
        "registers": REGISTERS // per_warp // warps,
        "shared memory": limits.shared // (_up(shared, SHARED_UNIT) + RESERVED_SHARED),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }


def occupancy(arch: str, threads: int, registers: int, shared: int) -> Occupancy:
    """Of a kernel with `threads` per block, `registers` per thread and `shared` bytes per block."""
    limits = LIMITS[arch]
    by_limit = _by_limit(limits, threads, registers, shared)
    blocks = min(by_limit.values())
    limiter = min(by_limit, key=lambda name: by_limit[name])
    warps = blocks * -(-threads // WARP)
    return Occupancy(blocks, warps, warps / limits.warps, limiter, _cliff(limits, threads, registers, shared, blocks))


def _cliff(limits: Limits, threads: int, registers: int, shared: int, blocks: int) -> str:
    more_registers = next(
        r - registers
        for r in range(registers + 1, 513)
        if r > 255 or min(_by_limit(limits, threads, r, shared).values()) < blocks
    )
    more_shared = next(
        s - shared
        for s in range(_up(shared + 1, SHARED_UNIT), limits.shared + SHARED_UNIT, SHARED_UNIT)
        if min(_by_limit(limits, threads, registers, s).values()) < blocks
    )
    if more_registers * 1024 <= more_shared * 8:  # 8 registers, their unit, weigh as much as a kilobyte
        return f"{more_registers} more registers"
    return f"{more_shared} more bytes of shared memory"
