"""`make gpu-check` on a machine without a device: it says what it would run, and its comparisons work on the CPU."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "python" / "gpu_check.py"


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MICRO_PRETEND_CUDA", None)
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=environment
    )


def test_the_list_names_every_test_and_comparison() -> None:
    done = gpu_check("--list")
    assert done.returncode == 0, done.stderr
    for what in (
        "ctest",
        "-m gpu",
        "FlexAttention",
        "SDPA with mask",
        "grouped_mm",
        "dense transformers",
        "all experts",
    ):
        assert what in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a device")
def test_without_a_device_it_says_so_and_fails() -> None:
    done = gpu_check()
    assert done.returncode == 2
    assert "gpu-check: " in done.stderr
    assert "would run" in done.stdout
    assert "Traceback" not in done.stderr


def test_every_comparison_works() -> None:
    done = gpu_check("--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    for goal in ("G1", "G2", "G3", "G3b", "G6", "G7", "G8", "G9a", "G9b", "G9c", "G9d", "G11"):
        assert any(line.startswith(f"{goal} ") for line in done.stdout.splitlines()), goal


def test_a_comparison_that_fails_costs_the_exit_status_and_not_the_others() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gpu_rows, gpu_check, dataclasses\n"
        "def broken(bench):\n    raise ValueError('outputs differ')\n    yield\n"
        "gpu_rows.ROWS[0] = dataclasses.replace(gpu_rows.ROWS[0], run=broken)\n"
        "sys.exit(gpu_check.main(['--device', 'cpu', '--quick', '--rows', 'grouped,optimizer']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "grouped: ValueError: outputs differ" in done.stdout
    assert "G11 AdamW over fused" in done.stdout


def test_what_has_not_begun_in_time_is_named() -> None:
    done = gpu_check("--device", "cpu", "--quick", "--rows", "optimizer", "--minutes", "-1")
    assert done.returncode == 1
    assert "optimizer: left out" in done.stdout


def test_the_model_of_a_layer_has_the_launches_that_a_layer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """9, and 10 where a few queries split many keys: kernels/README.md, block_forward_test."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    model = importlib.import_module("gpu_model")
    try:
        shape = model.SHAPES[0]
        assert [len(model.layer(shape, *at)) for at in ((512, 512), (1, 100), (1, 512), (4, 300), (5, 300))] == [
            9, 9, 10, 10, 9,
        ]  # fmt: skip
    finally:
        for name in ("gpu_model", "shapes"):
            sys.modules.pop(name, None)
