"""The replication's own backbone: a small dense Llama, pretrained once on the text at hand and kept as a folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.replication import corpus
from benchmarks.replication.plan import Pretraining
from micro.data import Collator
from micro.files import replace_folder, write_text
from micro.progress import Progress
from micro.testing import tiny_tokenizer
from micro.training import MiCRoTrainer, Rows
from micro.training.backbone import quiet_transformers
from micro.training.callbacks import SaveCallback, Stopper

SAVE_SECONDS = 60.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came, and the place is saved."""


def ready(folder: Path, settings: Pretraining) -> bool:
    """Whether the folder holds this backbone. Errors: ValueError where it holds another one."""
    note = folder / "pretraining.json"
    if not note.is_file():
        return False
    if json.loads(note.read_text())["settings"] != json.loads(json.dumps(asdict(settings))):
        raise ValueError(f"{folder}: holds a backbone of other settings; remove it or choose another --work")
    return True


def packed(settings: Pretraining, tokenizer: Any, documents: list[str]) -> Rows:
    """All documents one after the other, an end-of-text token between them, cut into rows of one length. Every token is
    a target.
    """
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    needed = settings.tokens + settings.length
    parts: list[list[int]] = []
    found = 0
    for at in range(0, len(documents), 1000):
        for ids in tokenizer(documents[at : at + 1000], add_special_tokens=False).input_ids:
            parts.append([*ids, end])
            found += len(ids) + 1
        if found >= needed:
            break
    ids = np.concatenate([np.array(part, dtype=np.int32) for part in parts])
    rows = min(len(ids), needed) // settings.length
    ids = ids[: rows * settings.length]
    starts = np.arange(rows + 1, dtype=np.int64) * settings.length
    return Rows(ids, np.ones(len(ids), np.bool_), np.full(len(ids), -1, np.int8), starts, labelled=False)


def fresh(settings: Pretraining, tokenizer: Any) -> Any:
    """The untrained model, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings.shape,
    )
    return LlamaForCausalLM(config)


def steps_of(settings: Pretraining) -> int:
    """Optimizer steps of the pretraining."""
    return math.ceil(settings.tokens / (settings.rows * settings.length))


def prepare(settings: Pretraining, folder: Path, *, precision: str, steps: int | None = None) -> tuple[Any, Any, Rows]:
    """(model, tokenizer, rows) before the first step; the tokenizer is learnt from the same text, once.

    steps: only so many are planned (the probe of the cost).
    """
    from transformers import AutoTokenizer

    characters = 8 * (steps or steps_of(settings)) * settings.rows * settings.length  # more than enough
    text = corpus.collect(share=min(1.0, max(0.02, characters / corpus.CHARACTERS)), seed=settings.seed)
    place = _tokenizer_folder(folder, steps)
    if not place.is_dir():
        made = tiny_tokenizer(text.documents, vocab_size=settings.vocabulary)
        with replace_folder(place) as beside:
            made.save_pretrained(beside)
            write_text(beside / "corpus.json", json.dumps(text.receipt, indent=1) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = fresh(settings, tokenizer).to(DTYPES[precision])
    return model, tokenizer, packed(settings, tokenizer, text.documents)


def _tokenizer_folder(folder: Path, steps: int | None) -> Path:
    return folder.with_name(f"{folder.name}-tokenizer{'-probe' if steps else ''}")


def train(settings: Pretraining, folder: Path, *, precision: str, steps: int | None = None) -> list[dict[str, float]]:
    """Pretrain into `folder`; an interrupted pretraining goes on where it was. Returns loss and rate by step.

    Raises:
        Interrupted: Ctrl-C; the same call goes on.
    """
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from micro.training import checkpoints

    model, tokenizer, rows = prepare(settings, folder, precision=precision, steps=steps)
    planned = steps or steps_of(settings)
    running = folder.with_name(f"{folder.name}-training")
    stopper = Stopper()
    arguments = TrainingArguments(
        output_dir=str(running),
        per_device_train_batch_size=settings.rows,
        max_steps=planned,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(settings.warmup * planned),
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        seed=settings.seed,
        save_strategy="no",
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=max(1, planned // 20),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = MiCRoTrainer(
        model=model, args=arguments, tokenizer=tokenizer, train_dataset=rows, data_collator=Collator(tokenizer)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SaveCallback(("seconds", SAVE_SECONDS), running / "CHECKPOINT", stopper))
    start = checkpoints.latest(running) if running.is_dir() else None
    with Progress("pretraining", planned) as bar, quiet_transformers(), stopper.listening():
        trainer.add_callback(_bar_callback(bar))
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if int(trainer.state.global_step) < planned:
        raise Interrupted(f"pretraining stopped at step {trainer.state.global_step} of {planned}")
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    with replace_folder(folder) as beside, quiet_transformers():
        model.eval().save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        receipt = json.loads((_tokenizer_folder(folder, steps) / "corpus.json").read_text())
        note = {"settings": asdict(settings), "corpus": receipt, "different_tokens": rows.tokens, "log": log}
        note["parameters"] = sum(p.numel() for p in model.parameters())
        write_text(beside / "pretraining.json", json.dumps(note, indent=1) + "\n")
    shutil.rmtree(running, ignore_errors=True)
    return log


def speed(settings: Pretraining, folder: Path, *, precision: str, steps: int = 6) -> float:
    """Tokens per second of the pretraining, over a few steps; leaves a backbone that was trained for as long."""
    begin = time.monotonic()
    train(settings, folder, precision=precision, steps=1)
    start = time.monotonic() - begin
    shutil.rmtree(folder)
    begin = time.monotonic()
    train(settings, folder, precision=precision, steps=steps)
    return (steps - 1) * settings.rows * settings.length / max(1e-3, time.monotonic() - begin - start)


def _bar_callback(bar: Progress) -> Any:
    from transformers import TrainerCallback

    class Show(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.note = f"loss {logs['loss']:.2f}" if logs and "loss" in logs else None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(state.global_step, note=getattr(self, "note", None))

    return Show()
