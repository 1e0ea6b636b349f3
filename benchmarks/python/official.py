"""The official classes as a side: a resident worker process in the user's own environment, commanded over a pipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from micro.convert.official import CLASSES, convert

WORKER = Path(__file__).with_name("worker.py")


class WorkerError(RuntimeError):
    """The worker could not do what it was told."""


class Official:
    """A user's copy of the official repository, run by an interpreter that has the transformers it needs."""

    name = "official"

    def __init__(self, root: Path, python: str, revision: str, threads: int) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"--official {root}: there is no such folder")
        self.revision, self.numbers = revision, 0
        self.scratch = Path(tempfile.mkdtemp(prefix="micro-bench-"))
        self.process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.scratch
        )
        self.about = self.tell(do="hello", root=str(root.resolve()), threads=threads)

    def tell(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"the worker ended during {command['do']!r}; its messages stand above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"worker, {command['do']!r}: {answer['error']}")
        return answer

    def load(
        self, ours: Any, experts_per_token: int = 1, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> None:
        """The weights of a mixture, through an official checkpoint folder. dtype None: the mixture's."""
        config = ours.config
        folder = self.scratch / "model"
        k, config.num_experts_per_tok = config.num_experts_per_tok, experts_per_token
        try:
            if self.revision == "r1":  # its constructor loads a tokenizer
                _add_tokenizer(ours)
            convert(ours, folder, to="official", revision=self.revision, overwrite=True)  # type: ignore[arg-type]
        finally:
            config.num_experts_per_tok = k
        class_name = CLASSES[self.revision, config.block_type, config.backbone][0]
        name = str(dtype or ours.dtype).removeprefix("torch.")
        self.tell(do="load", folder=str(folder), class_name=class_name, dtype=name, device=device)
        shutil.rmtree(folder)

    def job(self, kind: str, ids: Tensor, **arguments: Any) -> RemoteJob:
        self.numbers += 1
        name = f"{kind}{self.numbers}"
        self.tell(do="job", name=name, kind=kind, arguments={"ids": ids.tolist(), **arguments})
        return RemoteJob(self, name)

    def close(self) -> None:
        self.process.communicate()
        shutil.rmtree(self.scratch, ignore_errors=True)


class RemoteJob:
    """A job of jobs.py in the worker."""

    def __init__(self, worker: Official, name: str) -> None:
        self.worker, self.name = worker, name

    def seconds(self) -> float:
        return float(self.worker.tell(do="time", name=self.name)["seconds"])

    def outputs(self) -> dict[str, Tensor]:
        path = self.worker.scratch / "outputs.pt"
        self.worker.tell(do="outputs", name=self.name, path=str(path))
        found: dict[str, Tensor] = torch.load(path, map_location="cpu")
        return found

    def peak_bytes(self) -> int:
        return int(self.worker.tell(do="memory", name=self.name)["bytes"])


def _add_tokenizer(ours: Any) -> None:
    from micro.modeling.companions import read_companions
    from micro.testing.tokenizers import tiny_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        ours.companions = {**ours.companions, **read_companions(folder)}
