"""``run``: all stages of a recipe in one process, resumable at any moment (interface.md 6, model.md 6.7).

Layout of a run's folder::

    run.json                       resolved recipe, versions, seeds, hashes of the data, state of each stage
    metrics.jsonl                  one record per step (and metrics.csv, tensorboard/ on request)
    1-induce/checkpoint-50/        model, optimizer, schedule, generators, place in the data
    1-induce/model/                what the stage made; removed once the next stage's stands, if the recipe says so
    model/                         what the last stage made: micro.load reads it
"""

from __future__ import annotations

import gc
import json
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from micro.errors import RunError
from micro.files import write_text
from micro.training import backbone, checkpoints
from micro.training.callbacks import TRIGGER, ReportCallback, SaveCallback, StageLabel, Stopper
from micro.training.curriculum import build_curriculum
from micro.training.metrics import MetricsWriter
from micro.training.plan import Plan, check_disk, make_plan
from micro.training.recipe import (
    FREE_ON_RESUME,
    Recipe,
    ResolvedStage,
    aux_window,
    freeze_pad_row,
    load,
    parse_save_every,
)
from micro.training.sources import StageData, load_stage_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainerCallback, TrainingArguments

    from micro.training.trainer import MiCRoTrainer

RUN_FILE = "run.json"
MODEL = "model"


@dataclass
class RunResult:
    """What a run came to.

    status: "done", "interrupted" (resume with ``resume=True``) or "dry run". model_dir: the final model's folder, when
    done. model, tokenizer: the trained model in memory, when done. seconds: training time per stage, of this process.
    """

    status: str
    output_dir: Path
    plan: Plan
    model_dir: Path | None = None
    model: Any = None
    tokenizer: Any = None
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    recipe: Recipe | str | Path,
    *,
    output_dir: str | Path,
    resume: bool | str | Path | None = None,
    dry_run: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    quiet: bool = False,
) -> RunResult:
    """Execute a recipe: all stages, one after the other, with their checkpoints in `output_dir`.

    recipe: a Recipe, a YAML file, or the name of a bundled one. resume: True goes on from the newest state in
    `output_dir` (from the start where there is none yet); a path names one checkpoint of the run. dry_run: build
    everything, print the plan, write nothing. callbacks: transformers callbacks, added to every stage. quiet: no
    tables, no progress.

    On CPU a resumed run ends with the same bits as an uninterrupted one. Errors: ValueError for a recipe, data or
    folder that cannot be used, CheckpointError for an incomplete checkpoint, RunError for a run that failed on its way.
    """
    resolved = recipe if isinstance(recipe, Recipe) else load(recipe)
    return _Run(resolved, Path(output_dir), callbacks, quiet).execute(resume, dry_run)


@dataclass
class _Place:
    """Where a run goes on: at the start of a stage, or inside it. model: what to load first; None = the backbone."""

    stage: int
    model: Path | None = None
    checkpoint: Path | None = None


class _Run:
    """One execution of a recipe."""

    def __init__(self, recipe: Recipe, folder: Path, callbacks: Sequence[TrainerCallback], quiet: bool) -> None:
        self.recipe, self.folder, self.callbacks, self.quiet = recipe, folder, callbacks, quiet
        self.stages = [recipe.stage(index) for index in range(len(recipe.stages))]
        self.processes = processes()
        self.main = self.processes.is_main_process
        self.stopper = Stopper()
        self.record: dict[str, Any] = {}
        self.model: Any = None
        self.tokenizer: Any = None

    # ---- from start to end ------------------------------------------------------------------------------------------

    def execute(self, resume: bool | str | Path | None, dry_run: bool) -> RunResult:
        """Run, or plan only; see ``run``."""
        # Every stage ends with a collection, so that nothing of its optimizer stays; what stands already need not be
        # looked through each time.
        gc.freeze()
        try:
            return self._execute(resume, dry_run)
        finally:
            gc.unfreeze()

    def _execute(self, resume: bool | str | Path | None, dry_run: bool) -> RunResult:
        stored = None if dry_run else self._stored(resume)
        place = self._place(resume) if stored else _Place(0)
        self._open_model(place)
        data = [
            load_stage_data(stage, self.tokenizer, experts=self.recipe.num_experts, seed=self.recipe.seed)
            for stage in self.stages
        ]
        plan = self._plan(data)
        if self.main and not self.quiet:
            show(plan, to_stdout=dry_run)
        result = RunResult("dry run", self.folder, plan, tokenizer=self.tokenizer)
        if dry_run:
            return result
        if stored:
            self._compare(stored, data)
        check_disk(plan, self.folder)
        self._begin(plan, data, stored, place)
        return self._train_all(place, data, plan, result)

    def _train_all(self, place: _Place, data: list[StageData], plan: Plan, result: RunResult) -> RunResult:
        writer = MetricsWriter(self.folder, self.recipe.report_to if self.main else ())
        if self.main:
            writer.trim(place.stage, checkpoints.step_of(place.checkpoint) if place.checkpoint else 0)
        try:
            for index in range(place.stage, len(self.stages)):
                began = time.monotonic()
                checkpoint = place.checkpoint if index == place.stage else None
                with self.stopper.listening():
                    finished = self._train_stage(index, data[index], plan, writer, checkpoint)
                    if finished:
                        self._finish_stage(index)
                result.seconds[self.stages[index].name] = time.monotonic() - began
                if self.stopper.requested and not (finished and index == len(self.stages) - 1):
                    result.status = "interrupted"
                    return result
        finally:
            writer.close()
        result.status, result.model_dir, result.model = "done", self.folder / MODEL, self.model
        return result

    # ---- before the first step --------------------------------------------------------------------------------------

    def _stored(self, resume: bool | str | Path | None) -> dict[str, Any] | None:
        """run.json of the run that is resumed. Errors: ValueError for a folder that is in use and not to be resumed."""
        path = self.folder / RUN_FILE
        if resume:
            if self.main:
                for folder in (self.folder, *(self.folder / stage.folder for stage in self.stages)):
                    checkpoints.sweep(folder)
            self.processes.wait_for_everyone()
            if not path.is_file():
                # run.json comes first, so a run that was killed before it has left nothing visible.
                if isinstance(resume, bool) and not list(self.folder.glob("[!.]*")):
                    return None
                raise ValueError(f"{self.folder}: there is no {RUN_FILE}: this is no run that could be resumed")
            try:
                return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
            except ValueError as error:
                raise ValueError(f"{path}: not valid JSON: {error}") from None
        if path.exists() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise ValueError(f"{self.folder}: is not empty; choose another output folder, or resume the run in it")
        return None

    def _place(self, resume: bool | str | Path | None) -> _Place:
        """Where to go on: behind the last finished stage, or at the newest checkpoint of the stage after it."""
        if resume is not None and not isinstance(resume, bool):
            return self._named_place(Path(resume))
        for index in reversed(range(len(self.stages))):
            model = self._model_folder(index)
            if model.is_dir() and not checkpoints.problems(model, training=False):
                return _Place(index + 1, model=model)
            if checkpoint := checkpoints.latest(self.folder / self.stages[index].folder):
                return _Place(index, model=checkpoint, checkpoint=checkpoint)
        return _Place(0)

    def _named_place(self, checkpoint: Path) -> _Place:
        for index, stage in enumerate(self.stages):
            if checkpoint.resolve().parent == (self.folder / stage.folder).resolve():
                checkpoints.check(checkpoint)
                return _Place(index, model=checkpoint, checkpoint=checkpoint)
        folders = ", ".join(stage.folder for stage in self.stages)
        raise ValueError(f"{checkpoint}: is no checkpoint of this run; they stand in {self.folder}/: {folders}")

    def _model_folder(self, index: int) -> Path:
        last = index == len(self.stages) - 1
        return self.folder / MODEL if last else self.folder / self.stages[index].folder / MODEL

    def _open_model(self, place: _Place) -> None:
        with backbone.quiet_transformers():
            self.model, self.tokenizer = (
                backbone.start(self.recipe) if place.model is None else backbone.reopen(place.model, self.recipe)
            )
        config = self.model.config
        if self.recipe.kind != "dense":
            config.aux_window, config.aux_pooling = aux_window(self.recipe), self.recipe.aux_pooling
            config.freeze_pad_row = freeze_pad_row(self.recipe)
            # An embedding reads its padding row when it is made, which was before the recipe had a say.
            self.model.get_input_embeddings().padding_idx = config.pad_token_id if config.freeze_pad_row else None
            config.num_experts_per_tok = self.stages[-1].experts_per_token
            config.loss_coefficients = {}
        config.use_cache = True
        if self.recipe.gradient_checkpointing:
            # The old name of the method, for transformers before 5.2x; the new one warns about it.
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    def _plan(self, data: list[StageData]) -> Plan:
        trains = []
        for index in range(len(self.stages)):
            curriculum = build_curriculum(self.recipe, self.stages, [1] * len(self.stages), start=index)
            trains.append(curriculum.trainable)
        return make_plan(self.recipe, self.model, self.stages, data, trains, self.processes.num_processes)

    def _compare(self, stored: dict[str, Any], data: list[StageData]) -> None:
        """A run is resumed with the recipe and the data that it was started with."""
        old, new = stored["recipe"], json.loads(json.dumps(self.recipe.to_dict()))
        changed = [name for name in new if name not in FREE_ON_RESUME and old.get(name) != new[name]]
        if changed:
            raise ValueError(
                f"{self.folder}: cannot resume: the recipe has changed in {', '.join(changed)}; resume with the "
                f"recipe in {RUN_FILE}, or start a new run"
            )
        for stage, rows, held in zip(self.stages, data, stored["data"], strict=True):
            if held["tokens_sha256"] != rows.rows.digest():
                raise ValueError(
                    f"{self.folder}: cannot resume: the rows of stage {stage.name!r} differ from those that the run "
                    "was started with (changed files, tokenizer or micro version)"
                )
        if stored["processes"] != self.processes.num_processes:
            raise ValueError(
                f"{self.folder}: cannot resume with {self.processes.num_processes} processes a run that was started "
                f"with {stored['processes']}"
            )

    def _begin(self, plan: Plan, data: list[StageData], stored: dict[str, Any] | None, place: _Place) -> None:
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.record = {
                "recipe": self.recipe.to_dict(),
                "command": sys.argv,
                "versions": versions(),
                "seed": self.recipe.seed,
                "processes": self.processes.num_processes,
                "threads": torch.get_num_threads(),
                "receipt": dict(getattr(self.model, "upcycle_receipt", None) or {}),
                "plan": plan.to_dict(),
                "data": [rows.to_dict() for rows in data],
                "stages": stored["stages"] if stored else [{"name": s.name, "status": "waiting"} for s in self.stages],
            }
            for index in range(place.stage):  # a kill may have come before the end of a stage was written down
                self._note_done(index)
            self._write_record()
        self.processes.wait_for_everyone()

    def _write_record(self) -> None:
        write_text(self.folder / RUN_FILE, json.dumps(self.record, indent=1, default=str) + "\n")

    # ---- one stage --------------------------------------------------------------------------------------------------

    def _train_stage(
        self, index: int, data: StageData, plan: Plan, writer: MetricsWriter, checkpoint: Path | None
    ) -> bool:
        """Train stage `index`; True when it came to its end. The optimizer's state is gone when this returns."""
        stage, steps = self.stages[index], [p.steps for p in plan.stages]
        if checkpoint is not None and checkpoints.step_of(checkpoint) >= steps[index]:
            return True  # killed between the last step's checkpoint and the stage's model
        curriculum = build_curriculum(self.recipe, self.stages, steps, start=index)
        trainer = self._trainer(stage, data, steps[index], curriculum)
        names = list(getattr(self.model.config, "expert_names", None) or [])
        label = StageLabel(index, stage.name, len(self.stages), steps[index], names)
        report = ReportCallback(
            trainer, label, writer, log_every=self.recipe.log_every, quiet=self.quiet or not self.main
        )
        for callback in self.callbacks:  # before ours, so that what they ask for happens at the end of the same step
            trainer.add_callback(callback)
        trainer.add_callback(
            SaveCallback(parse_save_every(self.recipe.save_every), self.folder / TRIGGER, self.stopper)
        )
        trainer.add_callback(report)
        trainer.loaded_from = checkpoint
        try:
            with backbone.quiet_transformers():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            raise RunError(f"{self.folder}: stage {stage.name!r} failed: {error}") from error
        finally:
            report.close()
        done = int(trainer.state.global_step)
        self._release(trainer)
        return done >= steps[index]

    def _trainer(self, stage: ResolvedStage, data: StageData, steps: int, curriculum: Any) -> MiCRoTrainer:
        from transformers.trainer_callback import PrinterCallback

        from micro.data import Collator
        from micro.training.trainer import MiCRoTrainer

        trainer = MiCRoTrainer(
            model=self.model,
            args=self._arguments(stage, steps),
            curriculum=curriculum,
            tokenizer=self.tokenizer,
            train_dataset=data.rows,
            data_collator=Collator(self.tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, stage: ResolvedStage, steps: int) -> TrainingArguments:
        from transformers import TrainingArguments

        recipe, processes = self.recipe, self.processes.num_processes
        return TrainingArguments(
            output_dir=str(self.folder / stage.folder),
            per_device_train_batch_size=stage.micro_batch_size,
            gradient_accumulation_steps=stage.batch_size // (stage.micro_batch_size * processes),
            max_steps=steps,
            learning_rate=stage.learning_rate,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.beta1,
            adam_beta2=recipe.beta2,
            adam_epsilon=recipe.eps,
            max_grad_norm=recipe.max_grad_norm,
            seed=recipe.seed + stage.index,
            bf16=recipe.precision == "autocast",
            save_strategy="no",
            save_total_limit=recipe.keep_last,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            average_tokens_across_devices=False,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )

    def _release(self, trainer: MiCRoTrainer) -> None:
        """Free the optimizer's state and gradients before the next stage makes its own."""
        trainer.release()
        self.model.zero_grad(set_to_none=True)
        self.model.config.use_cache = trainer.use_cache
        if self.recipe.kind != "dense":
            self.model.config.loss_coefficients = {}

    def _note_done(self, index: int) -> None:
        model = str(self._model_folder(index).relative_to(self.folder))
        self.record["stages"][index] = {"name": self.stages[index].name, "status": "done", "model": model}

    def _finish_stage(self, index: int) -> None:
        """Write the stage's model; the one before it goes, if the recipe says so."""
        if self.main:
            folder = self._model_folder(index)
            backbone.write(self.model.eval(), self.tokenizer, folder)
            self._note_done(index)
            self._write_record()
            if not self.recipe.keep_stage_checkpoints:
                for checkpoint in checkpoints.listed(self.folder / self.stages[index].folder):
                    checkpoints.discard(checkpoint)
            if index and not self.recipe.keep_stage_models and self._model_folder(index - 1).is_dir():
                checkpoints.discard(self._model_folder(index - 1))
        self.processes.wait_for_everyone()


def processes() -> Any:
    """Accelerate's view of the processes that a launcher started; one process without a launcher."""
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=".", report_to="none", use_cpu=not torch.cuda.is_available()).distributed_state


def show(plan: Plan, *, to_stdout: bool) -> None:
    """Print the plan's tables: to standard error before a run, to standard output where they are the result."""
    from rich.console import Console

    console = Console(stderr=not to_stdout)
    for table in plan.tables():
        console.print(table)


def versions() -> dict[str, Any]:
    """What could change a result: packages, Python, machine, the build of micro, its commit where it is a checkout."""
    from importlib import metadata

    import micro

    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("micro-reasoners", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["build"] = micro.build_info()
    found["commit"] = _commit()
    return found


def _commit() -> str | None:
    """The commit of the checkout that micro runs from; None for an installed package."""
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    out = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or None
