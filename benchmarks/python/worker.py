"""A resident process with another side of a comparison: the official classes, or a model whose memory is measured.

Commands are lines of JSON on standard input, answers lines of JSON on standard output; while no command comes the
process is blocked in a read and takes no time. It times itself. Imports torch, transformers and jobs.py only, for it
runs in whatever environment the official classes need.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch
from jobs import JOBS, Job

FLASH = b"flash_attention_2"


class _Loader(SourceFileLoader):
    """Reads the user's own files as they are, except that the attention is sdpa where they force flash attention."""

    def get_data(self, path: str) -> bytes:
        return super().get_data(path).replace(FLASH, b"sdpa")

    def path_stats(self, path: str) -> Any:
        raise OSError("compiled files are neither read nor written")


class _Finder:
    """Finds modules below the user's folder, by that loader."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        base = self.root.joinpath(*name.split("."))
        for file, package in ((base.with_suffix(".py"), False), (base / "__init__.py", True)):
            if file.is_file():
                search = [str(base)] if package else None
                loader = _Loader(name, str(file))
                return importlib.util.spec_from_file_location(
                    name, file, loader=loader, submodule_search_locations=search
                )
        return None


def find_class(root: Path, name: str) -> Any:
    """The class ``name``, from the one file below ``root`` that defines it."""
    pattern = re.compile(rf"^class {name}\(", re.MULTILINE)
    files = [f for f in sorted(root.rglob("*.py")) if pattern.search(f.read_text(errors="replace"))]
    if not files:
        raise ValueError(f"no file below {root} defines a class {name}")
    sys.meta_path.insert(0, _Finder(root))
    sys.path.append(str(root))
    module = ".".join(files[0].relative_to(root).with_suffix("").parts)
    return getattr(importlib.import_module(module), name)


class Worker:
    def __init__(self) -> None:
        self.model: Any = None
        self.jobs: dict[str, Job] = {}

    def hello(self, root: str, threads: int) -> dict[str, Any]:
        import transformers

        self.root = Path(root)
        torch.set_num_threads(threads)
        return {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}

    def load(self, folder: str, class_name: str, dtype: str, device: str = "cpu") -> dict[str, Any]:
        """An official checkpoint folder through the class that its config names."""
        self.model, self.jobs = None, {}
        cls = find_class(self.root, class_name)
        self.model = cls.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).eval().to(device)
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def job(self, name: str, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.jobs[name] = JOBS[kind](self.model, **arguments)
        return {}

    def outputs(self, name: str, path: str) -> dict[str, Any]:
        torch.save(self.jobs[name].outputs(), path)
        return {}

    def time(self, name: str) -> dict[str, Any]:
        return {"seconds": self.jobs[name].seconds()}

    def drop(self, name: str) -> dict[str, Any]:
        self.jobs.pop(name, None)
        return {}

    def memory(self, name: str) -> dict[str, Any]:
        """Peak resident bytes of a run above what is resident before it; the job has run before, at a small size."""
        from resident import peak_above

        return {"bytes": peak_above(self.jobs[name].run)}


def main() -> None:
    """Answers go to the real standard output; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
