"""The first call on a cuda tensor where there is no driver: a clear error, and the process goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import micro

PRETENDED = Path(__file__).parents[3] / "build" / "dev" / "tests" / "libpretend_cuda.so"

CODE = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
import torch
torch.cuda._lazy_init = lambda: None
from micro import ops
x, gain = torch.ones(2, 8), torch.ones(1, 8)
for _ in range(2):
    try:
        ops.rms_norm(x.to("cuda"), gain.to("cuda"), eps=1e-5)
        print("no error")
    except RuntimeError as error:
        print(str(error).splitlines()[0])
ops.rms_norm(x, gain, eps=1e-5)
print("the CPU still works")
"""


@pytest.mark.skipif(not PRETENDED.is_file(), reason="needs build/dev, and a torch without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_call_without_a_driver_is_an_error_and_no_crash() -> None:
    built = bool(micro.build_info()["cuda_archs"])
    why = (
        "no CUDA driver or device was found on this machine"
        if built
        else "this build of micro has no CUDA kernels (see micro doctor)"
    )
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(PRETENDED)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"micro::rms_norm: {why}"] * 2 + ["the CPU still works"]
