"""Saving, stopping and reporting during a run: callbacks for ``MiCRoTrainer`` (ecosystem.md 11.4, 11.5)."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from micro.progress import Progress
from micro.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from micro.training.trainer import MiCRoTrainer

INTERRUPTED = 130
TRIGGER = "CHECKPOINT"


class Stopper:
    """Ctrl-C and SIGTERM: the first asks for a save at the end of the step, the same again ends the process at once.

    A launcher of several processes answers Ctrl-C with a SIGTERM of its own: that one must not cut the save short.
    """

    def __init__(self) -> None:
        self.requested = False
        self._seen: set[int] = set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            os._exit(INTERRUPTED)
        self._seen.add(number)
        if self.requested:
            return
        self.requested = True
        message = "micro: stopping: a checkpoint is saved at the end of this step; once more quits at once\n"
        os.write(2, message.encode())

    @contextmanager
    def listening(self) -> Iterator[Stopper]:
        """Handle the signals inside the block; elsewhere, and outside the main thread, they keep their meaning."""
        previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: signals stay with whoever owns it
            previous.clear()
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class SaveCallback(TrainerCallback):
    """Checkpoints by time, share, steps or epoch, on `touch RUN/CHECKPOINT`, and when a signal asks to stop."""

    def __init__(self, every: tuple[str, float] | None, trigger: Path, stopper: Stopper) -> None:
        self.every, self.trigger, self.stopper = every, trigger, stopper
        self._saved_at = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = time.monotonic()
        # A stored control may still hold the stop of the run that was interrupted.
        control.should_training_stop = control.should_epoch_stop = control.should_save = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        touched = state.is_world_process_zero and self.trigger.exists()
        stop, touched, due = _agreed(self.stopper.requested, touched, self._is_due(state))
        if touched and state.is_world_process_zero:
            self.trigger.unlink(missing_ok=True)
        if stop or touched or due:
            control.should_save = True
        if stop:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        last = state.global_step >= state.max_steps
        if self.every and self.every[0] == "epoch" and not last and not control.should_training_stop:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()

    def _is_due(self, state: TrainerState) -> bool:
        if self.every is None or state.global_step >= state.max_steps:
            return False  # the stage's model is written at its end
        kind, amount = self.every
        if kind == "seconds":
            return time.monotonic() - self._saved_at >= amount
        if kind == "epoch":
            return False
        steps = amount if kind == "steps" else max(1, math.ceil(amount * state.max_steps))
        return state.global_step % int(steps) == 0


def _agreed(*flags: bool) -> tuple[bool, ...]:
    """Each flag, true if it is true in any process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return flags
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    together = torch.tensor([float(flag) for flag in flags], device=device)
    distributed.all_reduce(together, op=distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in together)


@dataclass(frozen=True)
class StageLabel:
    """What a line of the log says about its stage."""

    index: int
    name: str
    count: int
    steps: int
    expert_names: list[str]


class ReportCallback(TrainerCallback):
    """One record per step to the metrics files, and a bar or lines on standard error; first process only."""

    def __init__(
        self, trainer: MiCRoTrainer, stage: StageLabel, writer: MetricsWriter, *, log_every: int, quiet: bool
    ) -> None:
        self.trainer, self.stage, self.writer = trainer, stage, writer
        self.log_every, self.quiet = log_every, quiet
        self._tokens, self._seconds = 0, 0.0
        self._started = 0.0
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.quiet:
            title = f"stage {self.stage.index + 1}/{self.stage.count} {self.stage.name}"
            self._bar = Progress(title, self.stage.steps).__enter__()
            self._bar.update(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._seconds += time.perf_counter() - self._started
        self._tokens += self.trainer.window_tokens * max(1, args.world_size)
        if state.global_step % self.log_every and state.global_step < state.max_steps:
            return
        record = self._record(state)
        self._tokens, self._seconds = 0, 0.0
        self.writer.write(record)
        if self._bar is not None:
            self._bar.update(state.global_step, note=describe(record))

    def close(self) -> None:
        """End the bar, also after an error."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def _record(self, state: TrainerState) -> dict[str, Any]:
        parts, routing = self.trainer.step_summary()
        record: dict[str, Any] = {
            "stage": self.stage.name,
            "stage_index": self.stage.index,
            "step": state.global_step,
            "epoch": state.epoch,
            **parts,
            "learning_rate": self.trainer.learning_rate,
            "gradient_norm": self.trainer.gradient_norm,
            "skipped_steps": self.trainer.skipped_steps,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
            "memory_bytes": peak_memory(),
        }
        if routing is not None:
            record |= {
                "decision_entropy": routing.decision_entropy,
                "usage_entropy": routing.usage_entropy,
                "label_accuracy": routing.label_accuracy,
                "label_accuracy_by_layer": routing.label_accuracy_by_layer,
                "load": dict(zip(self.stage.expert_names, routing.mean_load, strict=True)),
                "load_by_layer": routing.load,
            }
        return record


def describe(record: dict[str, Any]) -> str:
    """A record in one line: loss and its parts, rate, norm, entropies, accuracy, load, speed."""
    words = [f"loss {record['loss']:.3f}"] if "loss" in record else []
    words += [
        f"{name} {record[name]:.3f}"
        for name in ("load_balancing_loss", "z_loss", "label_loss", "entropy")
        if name in record
    ]
    words += [f"lr {record['learning_rate']:.1e}", f"norm {record['gradient_norm']:.2f}"]
    if record["skipped_steps"]:
        words.append(f"{record['skipped_steps']} steps skipped (gradient not finite)")
    if "load" in record:
        words.append(f"H {record['decision_entropy']:.2f}/{record['usage_entropy']:.2f}")
        if record["label_accuracy"] is not None:
            words.append(f"acc {record['label_accuracy']:.2f}")
        words.append("load " + " ".join(f"{name[:2]}{share * 100:.0f}" for name, share in record["load"].items()))
    if record["tokens_per_second"]:
        words.append(f"{record['tokens_per_second']:.0f} tok/s")
    return " ".join(words)


def peak_memory() -> int:
    """Peak bytes of this process, device memory where a GPU trains."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
