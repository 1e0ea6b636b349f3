"""Folders are whole or not there, and incomplete ones are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from micro.training import checkpoints
from micro.training.checkpoints import CheckpointError

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def make(folder: Path, step: int, text: str = "x") -> Path:
    path = folder / f"checkpoint-{step}"
    with checkpoints.writing(path) as beside:
        for name in FILES:
            (beside / name).write_text(text * step)
    return path


def test_a_written_folder_is_complete_and_the_newest(tmp_path: Path) -> None:
    make(tmp_path, 3)
    make(tmp_path, 20)
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [3, 20]
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoint-20"
    assert checkpoints.problems(tmp_path / "checkpoint-20") == []
    assert not list(tmp_path.glob(".*"))


def test_an_error_while_writing_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), checkpoints.writing(tmp_path / "checkpoint-1") as beside:
        (beside / "model.safetensors").write_text("half")
        raise OSError("disk full")
    assert checkpoints.latest(tmp_path) is None
    checkpoints.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*FILES, checkpoints.MANIFEST])
def test_every_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, 4)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoints.latest(tmp_path)


def test_a_cut_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = make(tmp_path, 4)
    (path / "optimizer.pt").write_text("xx")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt has 2 bytes, expected 4"):
        checkpoints.check(path)


def test_a_checkpoint_without_training_state_is_a_model_only(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-1"
    with checkpoints.writing(path) as beside:
        (beside / "model.safetensors").write_text("x")
    assert checkpoints.problems(path, training=False) == []
    with pytest.raises(CheckpointError, match="never written"):
        checkpoints.check(path)


def test_rotation_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, 2, protect=tmp_path / "checkpoint-1")
    assert [checkpoints.step_of(path) for path in checkpoints.listed(tmp_path)] == [1, 3, 10]


def test_writing_again_replaces_and_a_kill_between_loses_nothing(tmp_path: Path) -> None:
    make(tmp_path, 5, "a")
    path = make(tmp_path, 5, "b")
    assert (path / "optimizer.pt").read_text() == "bbbbb"
    path.rename(tmp_path / f"{checkpoints.REPLACED}checkpoint-5")  # where a kill between the two renames leaves it
    checkpoints.sweep(tmp_path)
    assert (path / "optimizer.pt").read_text() == "bbbbb"


def test_a_kill_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    """A process writes checkpoints without pause and is killed, several times: what bears a name is always whole."""
    code = (
        "import sys; from pathlib import Path; from micro.training import checkpoints as c; step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    with c.writing(Path(sys.argv[1]) / f'checkpoint-{step % 3 + 1}') as beside:\n"
        f"        [(beside / name).write_bytes(b'x' * 100000) for name in {FILES!r}]\n"
    )
    for wait in (0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        limit = time.monotonic() + 20
        while len(checkpoints.listed(tmp_path)) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        checkpoints.sweep(tmp_path)
        found = checkpoints.listed(tmp_path)
        assert found
        assert [checkpoints.problems(path) for path in found] == [[]] * len(found)
        assert not list(tmp_path.glob(".*"))
