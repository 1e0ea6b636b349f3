"""Compiles each .cu for every architecture, once per state of the sources; keeps code, PTX and what ptxas said."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gates.kernels import KERNELS, PTX

FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "--Werror=all-warnings", "-Xptxas=-v", f"-I{KERNELS}", f"-I{KERNELS}/include"]


@dataclass(frozen=True)
class Compiled:
    """One source for all architectures."""

    source: str
    log: str  # of nvcc and ptxas
    ptx: str
    cubins: dict[str, Path]  # by architecture
    error: str  # empty: compiled without a warning


def nvcc_version(nvcc: str) -> str:
    """Such as '13.0'."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise ValueError(f"{nvcc} --version names no release")
    return found[1]


def compile_all(nvcc: str, sources: list[str], archs: list[str], folder: Path, jobs: int) -> list[Compiled]:
    """All sources, `jobs` at a time."""
    version = nvcc_version(nvcc)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda source: _compile(nvcc, version, source, archs, folder), sources))


def _compile(nvcc: str, version: str, source: str, archs: list[str], folder: Path) -> Compiled:
    stem = Path(source).stem
    home = folder / stem
    stamp, log, dependencies = home / "stamp", home / "log", home / "dependencies"
    options = [*FLAGS, _target(archs)]
    if not (stamp.is_file() and stamp.read_text() == _key(version, options, dependencies)):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        command = [nvcc, *options, "-fatbin", "--keep", f"--keep-dir={home}", "-o", str(home / f"{stem}.fatbin")]
        command += ["-MD", "-MF", str(dependencies), str(KERNELS / source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        log.write_text(done.stdout + done.stderr)
        if done.returncode != 0:
            return Compiled(source, log.read_text(), "", {}, f"nvcc failed on {source}:\n{log.read_text()[-3000:]}")
        stamp.write_text(_key(version, options, dependencies))
    cubins = {arch: home / f"{stem}.{arch}.cubin" for arch in archs}
    return Compiled(source, log.read_text(), (home / f"{stem}.ptx").read_text(), cubins, "")


def _target(archs: list[str]) -> str:
    """One PTX, and machine code for each architecture from it: as the build does."""
    return f"--generate-code=arch={PTX},code=[{','.join([*archs, PTX])}]"


def _key(version: str, options: list[str], dependencies: Path) -> str:
    digest = hashlib.sha256(" ".join([version, *options]).encode())
    if dependencies.is_file():
        for name in re.findall(r"(?<=\s)(/[^\s\\]+)", dependencies.read_text().replace("\\\n", " ")):
            if Path(name).is_relative_to(KERNELS):
                digest.update(Path(name).read_bytes() if Path(name).is_file() else b"gone")
    return digest.hexdigest()
