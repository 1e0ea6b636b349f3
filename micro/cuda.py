"""What CUDA finds on this machine. Asked of the driver itself: a torch that was built for the CPU cannot tell."""

from __future__ import annotations

import ctypes
import re
from typing import Any

_MAJOR, _MINOR = 75, 76  # numbers of the driver's attributes: compute capability


class _NoDeviceError(Exception):
    pass


def examine(library: str = "libcuda.so.1") -> dict[str, Any]:
    """The driver's version and its devices, as ``{"driver", "devices", "why_none"}``; starts no context.

    Returns:
        ``driver`` is a version or ``None``; ``devices`` a list of ``{"name", "arch"}``; ``why_none`` says why there
        is none, or is ``None``.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return {"driver": None, "devices": [], "why_none": f"no driver ({library} was not found)"}
    version: str | None = None
    try:
        number = ctypes.c_int()
        _call(driver, "cuDriverGetVersion", ctypes.byref(number))
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
        _call(driver, "cuInit", 0)
        _call(driver, "cuDeviceGetCount", ctypes.byref(number))
        devices = [_device(driver, index) for index in range(number.value)]
    except _NoDeviceError as error:
        return {"driver": version, "devices": [], "why_none": str(error)}
    return {"driver": version, "devices": devices, "why_none": None if devices else "the driver sees no device"}


def _call(driver: Any, function: str, *arguments: Any) -> None:
    status = getattr(driver, function)(*arguments)
    if status != 0:
        raise _NoDeviceError(f"the driver's {function} failed with error {status}")


def _device(driver: Any, index: int) -> dict[str, str]:
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), index)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(number), attribute, index)
        capability.append(number.value)
    return {"name": name.value.decode(), "arch": f"sm_{capability[0]}{capability[1]}"}


def code_for(arch: str, built: list[str]) -> str | None:
    """Which entry of ``built`` a device ``arch`` (such as ``"sm_86"``) runs; ``None``: nothing fits.

    Machine code runs on its own major version from its own minor version on, PTX on every later device. Code with a
    suffix (``sm_90a``) runs on exactly its own device.
    """
    code = [name for name in built if name.startswith("sm_") and _runs(name, arch)]
    ptx = [name for name in built if name.startswith("compute_") and _capability(name) <= _capability(arch)]
    found = sorted(code or ptx, key=_capability)
    return found[-1] if found else None


def _runs(code: str, arch: str) -> bool:
    if code[-1] in "af":
        return code[:-1] == arch
    return _capability(code)[0] == _capability(arch)[0] and _capability(code) <= _capability(arch)


def _capability(arch: str) -> tuple[int, int]:
    match = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[af]?", arch)
    if match is None:
        raise ValueError(f"{arch!r} is no CUDA architecture: expected sm_<number> or compute_<number>")
    return int(match[1]), int(match[2])
