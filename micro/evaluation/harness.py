"""Tasks of lm-evaluation-harness for a MiCRo model: its own, where their data are at hand, and those of a folder.

result = harness.run(model, tokenizer, tasks=["arc_easy"], controls={"ablate": "social"})
result = harness.run(model, tokenizer, tasks=["mine"], include_path="my_tasks")
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from micro.analysis.result import Result
from micro.errors import RunError, require
from micro.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PATIENCE = 5.0  # seconds for the hub's first answer
NOT_CACHED = "Couldn't find cache for"  # how `datasets` begins where another part of a data set is cached
HALF_WIDTH = 1.96  # of a 95 % normal interval, in standard errors


@dataclass
class HarnessResult(Result):
    """What the harness found. ``rows``: task, metric, filter, value, stderr, low and high (95 %, normal; None where
    there is no standard error), items, shots, version; ``samples``: task -> the harness' log of its
    items, saved in ``harness_samples.jsonl``.
    """

    name: ClassVar[str] = "harness"
    apart: ClassVar[tuple[str, ...]] = ("samples",)

    rows: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False, compare=False)

    def table(self) -> pd.DataFrame:
        return require("pandas", "eval", "HarnessResult.table").DataFrame(self.rows)

    def save(self, folder: str | Path) -> None:
        """Write ``harness.json``, ``harness.csv`` and, where samples were kept, ``harness_samples.jsonl``."""
        super().save(folder)
        lines = [json.dumps({"task": task, **sample}) for task, some in self.samples.items() for sample in some]
        if lines:
            write_text(Path(folder) / f"{self.name}_samples.jsonl", "".join(f"{line}\n" for line in lines))

    def plot(self) -> Figure:
        from micro.evaluation.suites.figure import harness_figure

        return harness_figure(self)


def run(
    model: Any,
    tokenizer: Any = None,
    *,
    tasks: str | Sequence[str],
    include_path: str | Path | None = None,
    controls: Mapping[str, Any] | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    bootstrap_iters: int = 10_000,
    log_samples: bool = False,
    seed: int = 1234,
    progress: bool = False,
    **model_args: Any,
) -> HarnessResult:
    """Evaluate a model on tasks of lm-evaluation-harness.

    Args:
        model: a MiCRo model, its folder, or any ``lm_eval.api.model.LM``.
        tokenizer: of a loaded model.
        tasks: names of tasks or groups.
        include_path: a folder with task files (YAML) of your own.
        controls: steering arguments: ablate, keep, bias, force, experts_per_token.
        num_fewshot: worked examples per prompt; default that of the task.
        limit: first items of each task (a share where it is below 1).
        apply_chat_template: prompts as conversations.
        system_instruction: a system message before each prompt.
        bootstrap_iters: resamples for standard errors that have no formula.
        log_samples: keep what the harness logs of each item.
        seed: of the harness (few-shot examples, its own bootstrap) and of sampling.
        progress: show bars on stderr.
        model_args: further arguments of :class:`MiCRoLM`: batch_size, max_length, engine, ...

    Raises:
        ValueError: an unknown task.
        RunError: the data of a task are not on this machine and cannot be had.
        MissingExtraError: lm-eval is not installed.
    """
    lm_eval = require("lm_eval", "eval", "micro.evaluation.harness")
    require("lm_eval.tasks", "eval", "micro.evaluation.harness")
    from lm_eval.api.model import LM

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    manager = _manager(lm_eval.tasks.TaskManager, names, include_path)
    if isinstance(model, LM):
        if controls or model_args:
            raise ValueError("harness: an LM is steered by its own arguments; give controls to MiCRoLM")
        lm = model
    else:
        from micro.evaluation.micro_lm import MiCRoLM

        lm = MiCRoLM(model, tokenizer, seed=seed, progress=progress, **{**(controls or {}), **model_args})
    options = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "system_instruction": system_instruction,
        "bootstrap_iters": bootstrap_iters,
    }
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        with _cache_alone_if_no_hub():
            found = lm_eval.simple_evaluate(
                model=lm, tasks=names, task_manager=manager, log_samples=log_samples, **options, **seeds
            )
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and not str(error).startswith(NOT_CACHED):
            raise
        raise RunError(
            f"harness: data of {', '.join(names)} are not on this machine: {error}; run "
            "this once with network (the data then stay in the cache of `datasets`, which may be copied), or write a "
            "task file over local data (include_path)"
        ) from error
    assert found is not None
    return HarnessResult(
        rows=_rows(found),
        settings={
            "lm_eval": _version(),
            "tasks": names,
            **options,
            "seed": seed,
            "controls": {n: str(v) for n, v in getattr(lm, "controls", {}).items()},
            "truncated_prompts": getattr(lm, "truncated", 0),
            "interval": "95 %, normal, from the harness' standard error",
        },
        samples=_samples(found) if log_samples else {},
    )


@contextmanager
def _cache_alone_if_no_hub() -> Iterator[None]:
    """Without network data come from the cache of `datasets` or not at all: the hub's client would try again five times
    for each of two files of a data set, most of a minute, and then say less.
    """
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not any(before) and not _hub_answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _hub_answers(address: str) -> bool:
    """Whether anything answers there, through the hub's own client: it knows about proxies and certificates."""
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=PATIENCE)
    except Exception:  # of requests or httpx, by the version of the client
        return False
    return True


def _manager(make: Any, names: Sequence[str], include_path: str | Path | None) -> Any:
    """The harness' index of tasks. Its own tasks are thousands of files: they are read only where they are needed."""
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise FileNotFoundError(f"{include_path}: no such folder of task files")
        manager = make(include_path=str(include_path), include_defaults=False)
        if names and set(names) <= set(manager.all_tasks):
            return manager
    manager = make(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        where = f" or in {include_path}" if include_path else "; a folder with your own is given by include_path"
        raise ValueError(f"harness: no task {', '.join(map(repr, unknown))} in lm-eval {_version()}{where}")
    return manager


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task, metric and filter; groups behind the tasks."""
    rows = []
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, rest = key.partition(",")
            if not rest or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{rest}")
            known = isinstance(error, int | float) and math.isfinite(error)
            half = HALF_WIDTH * error if known else None
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": rest,
                    "value": float(value),
                    "stderr": float(error) if known else None,
                    "low": None if half is None else float(value) - half,
                    "high": None if half is None else float(value) + half,
                    "items": found.get("n-samples", {}).get(task, {}).get("effective"),
                    "shots": found.get("n-shot", {}).get(task),
                    "version": found.get("versions", {}).get(task),
                }
            )
    return rows


def _samples(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The harness' log of each item, as JSON types."""
    return {
        task: [json.loads(json.dumps(sample, default=str)) for sample in samples]
        for task, samples in found.get("samples", {}).items()
    }
