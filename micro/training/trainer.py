"""MiCRoTrainer: transformers' Trainer with what a mixture of reasoners needs and nothing else changed.

- routing items of an accumulation window are counted, so that auxiliary losses are means over the window (model.md
  7.2);
- with a ``micro.Curriculum`` the stage decides who routes, what trains, K, the loss coefficients and the learning rate;
- AdamW is ours (one pass, clipping fused, float32 masters for bfloat16 parameters);
- checkpoints appear only when they are complete, and incomplete ones are refused (``micro.training.checkpoints``);
- rows of one step are grouped by length; their order depends on (seed, epoch) alone, so that resuming is exact.

Without a curriculum it is a Trainer for MiCRo models as they are: schedule and frozen parameters are the caller's.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from micro.training import checkpoints
from micro.training.order import Rows, WindowSampler
from micro.training.statistics import RoutingStatistics, RoutingSummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    import micro

TRAINER_STATE = "trainer_state.json"


class CurriculumSchedule:
    """The learning rate of a curriculum in the shape of a torch scheduler: ``step()`` advances the curriculum."""

    def __init__(self, optimizer: torch.optim.Optimizer, curriculum: micro.Curriculum) -> None:
        self.optimizer, self.curriculum = optimizer, curriculum
        self._apply()

    def _apply(self) -> None:
        self._rate = float(self.curriculum.learning_rate())
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def step(self) -> None:
        """One optimizer step is done. After the last one of a stage the rate is the next stage's, which has its own
        optimizer.
        """
        self.curriculum.advance()
        if not self.curriculum.done:
            self._apply()

    def get_last_lr(self) -> list[float]:
        """The rate of each parameter group."""
        return [self._rate for _ in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The curriculum's place."""
        return {"curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the curriculum to a stored place. Errors: ValueError where the curricula differ."""
        self.curriculum.load_state_dict(state["curriculum"])
        self._apply()


class MiCRoTrainer(Trainer):
    """``transformers.Trainer`` for MiCRo and dense models.

    curriculum: a ``micro.Curriculum`` standing in the stage to train, or None. tokenizer: is written beside the weights
    of every checkpoint; unlike `processing_class` it changes no token of the model's config. Other arguments are the
    Trainer's. A data set of class ``Rows`` is visited in the order of ``WindowSampler``. How auxiliary losses of a
    window add up is the config's `aux_window`.
    """

    # What the Trainer leaves open, this class knows.
    model: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        curriculum: micro.Curriculum | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self.curriculum, self.tokenizer = curriculum, tokenizer
        self.use_cache = bool(getattr(getattr(model, "config", None), "use_cache", True))
        super().__init__(model=model, args=args, **kwargs)
        if self.args.label_names is None:
            self.label_names = ["labels"]
        # N counts labels before the shift, as the official trainer does (model.md 7.1).
        self._loss_shifts_labels = False
        config = self.model.config
        self.routed = getattr(config, "model_type", "") == "micro"
        names = list(getattr(config, "expert_names", None) or [])
        language = names.index("language") if "language" in names else -1
        self.statistics = RoutingStatistics(config.num_hidden_layers, len(names), language)
        self._own_optimizer = False
        self.learning_rate = self._norm = math.nan
        self._window_tokens = torch.zeros((), dtype=torch.int64)
        self.loaded_from: Path | None = None
        self._parts: dict[str, Tensor] = {}
        self._routing_items: Tensor | None = None
        self._active_parameters = 0
        self._sampler: WindowSampler | None = None
        self._stage: micro.Stage | None = None
        if curriculum is not None:
            self._enter_stage(curriculum)

    # ---- the stage --------------------------------------------------------------------------------------------------

    def _enter_stage(self, curriculum: micro.Curriculum) -> None:
        """Freeze what the stage does not train. Errors: ValueError where nothing is left."""
        trainable = 0
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(bool(curriculum.trainable(name)))
            trainable += parameter.requires_grad
        self._stage = curriculum.current  # the curriculum itself moves on with the last step
        if not trainable:
            raise ValueError(f"stage {curriculum.stage}: no parameter is trainable, so nothing would be learnt")
        if self.routed:
            self.model.config.loss_coefficients = dict(curriculum.loss_coefficients())

    def _controls(self, inputs: dict[str, Any], *, training: bool) -> dict[str, Any]:
        """The arguments of forward that the stage decides. Rows without labels are evaluated by the router."""
        controls: dict[str, Any] = {}
        if self._stage is not None:
            controls["experts_per_token"] = self._stage.experts_per_token
            if training or not inputs.keys().isdisjoint(("routing_labels", "routing_weights")):
                controls["route_by"] = self._stage.route_by
        if training and self._routing_items is not None and self.model.config.aux_window == "mean":
            controls["num_routing_items_in_batch"] = self._routing_items
        return controls

    # ---- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Rows):
            return super()._get_train_sampler(train_dataset)
        window = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        self._sampler = WindowSampler(dataset.lengths, window, self.args.seed)
        return self._sampler

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        # The loader that resuming wraps around our sampler does not always pass the epoch on.
        if self._sampler is not None:
            self._sampler.set_epoch(kwargs["epoch"])
            self.train_dataset.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)  # type: ignore[no-untyped-call]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro batches of one optimizer step, with the number of targets; routing items are counted on the way."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.statistics.reset()
        self._parts = {}
        masks = [batch["attention_mask"] for batch in samples if "attention_mask" in batch]
        tokens = sum((mask.sum() for mask in masks), torch.zeros((), dtype=torch.int64))
        self._window_tokens = tokens
        self._routing_items = tokens.to(device) if masks else None
        return samples, items

    # ---- one step ---------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss, with the stage's controls; records loss parts and routing while training."""
        if not self.routed:
            inputs = {name: value for name, value in inputs.items() if not name.startswith("routing_")}
        else:
            inputs = {**inputs, **self._controls(inputs, training=model.training)}
            if model.training:
                # Where labels route, the load is theirs: no trace is asked for, so that the routers need not run.
                inputs["output_routing"] = not _routed_by_labels(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._record(inputs, outputs, loss)
        return (loss, outputs) if return_outputs else loss

    def _record(self, inputs: dict[str, Any], outputs: Any, loss: Tensor) -> None:
        parts = {"loss": loss}
        if self.routed:
            parts |= {"lm_loss": outputs.lm_loss, **(outputs.aux_losses or {})}
            if outputs.routing is None:
                self.statistics.add_labels(inputs["routing_labels"], inputs["attention_mask"])
            else:
                self.statistics.add(outputs.routing, inputs.get("labels"), inputs.get("routing_labels"))
        for name, value in parts.items():
            if value is not None:
                value = value.detach()
                self._parts[name] = self._parts[name] + value if name in self._parts else value

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Our optimizer measures and clips in its own pass; gradients are not rewritten."""
        return None if self._own_optimizer else super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """None with our optimizer, which knows the norm once it has stepped: see ``gradient_norm``."""
        self.learning_rate = float(self._get_learning_rate())
        if self._own_optimizer:
            return None
        self._norm = float(super()._get_grad_norm(model, grad_norm))  # type: ignore[no-untyped-call]
        return self._norm

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping."""
        return float(self._adamw.grad_norm) if self._own_optimizer else self._norm

    @property
    def window_tokens(self) -> int:
        """Real tokens of the last step. Counted on the device that the batches come to, and read here."""
        return int(self._window_tokens)

    @property
    def skipped_steps(self) -> int:
        """Steps that were not made because their gradient was not finite."""
        return int(self._adamw.skipped_steps) if self._own_optimizer else 0

    def step_summary(self) -> tuple[dict[str, float], RoutingSummary | None]:
        """Loss parts (sums over the window, as they were differentiated) and routing of the step that was just made."""
        return {name: float(value) for name, value in self._parts.items()}, self.statistics.summary()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with loss parts, load per expert, entropies and label accuracy of the last step."""
        parts, routing = self.step_summary()
        if "learning_rate" in logs and routing is not None:
            logs |= {name: value for name, value in parts.items() if name != "loss"} | {"grad_norm": self.gradient_norm}
            names = self.model.config.expert_names
            logs |= {f"load/{name}": share for name, share in zip(names, routing.mean_load, strict=True)}
            logs |= {"decision_entropy": routing.decision_entropy, "usage_entropy": routing.usage_entropy}
            if routing.label_accuracy is not None:
                logs["label_accuracy"] = routing.label_accuracy
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per token and active parameter; the parameters are counted once, not at every micro batch."""
        if not self._active_parameters:
            from micro import estimate

            self._active_parameters = estimate.parameters(estimate.shape_of(self.model)).active
        return 6 * self._active_parameters * int(inputs["input_ids"].numel())

    # ---- optimizer and schedule -------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """``micro.optim.AdamW`` over what trains: decay for matrices, none for norm gains (model.md 6.2).

        DeepSpeed and FSDP bring or shard their own optimizer state: there it is the Trainer's.
        """
        self._own_optimizer = False
        if self.optimizer is not None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super().create_optimizer(model)
        from micro.optim import AdamW, parameter_groups

        args = self.args
        self._adamw = AdamW(
            parameter_groups(self.model if model is None else model, args.weight_decay),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm,
        )
        self._own_optimizer = True
        self.optimizer = self._adamw
        return self._adamw

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The curriculum's schedule; without a curriculum the Trainer's."""
        if self.curriculum is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = CurriculumSchedule(optimizer or self.optimizer, self.curriculum)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def release(self) -> None:
        """Let go of the optimizer and all that wraps it; the model stays. The trainer cannot train afterwards."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.model_wrapped = self.model
        if self._own_optimizer:
            del self._adamw
        self.accelerator.free_memory()  # also collects garbage

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything beside and rename. All processes write their generators' state, the first one the rest."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        partial = checkpoints.partial_path(folder)
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.store_flos()
        self.save_model(str(partial), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._note_best(folder)
            self._store_callbacks()
            self.state.save_to_json(str(partial / TRAINER_STATE))
            checkpoints.finish(partial, folder)
            if self.args.save_total_limit:
                best = self.state.best_model_checkpoint
                checkpoints.rotate(folder.parent, self.args.save_total_limit, protect=Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def _note_best(self, folder: Path) -> None:
        if self.state.best_global_step:
            best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _store_callbacks(self) -> None:
        from transformers.trainer_callback import ExportableState

        stored: dict[str, list[Any]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                stored.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = stored  # type: ignore[assignment]  # the state's own form, once it is made

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; the stored config keeps the model's own `use_cache`, which training turns off."""
        config = self.model.config
        while_training, config.use_cache = config.use_cache, self.use_cache
        try:
            super().save_model(output_dir, _internal_call)
            if self.tokenizer is not None and self.args.should_save:
                self.tokenizer.save_pretrained(output_dir or self.args.output_dir)
        finally:
            config.use_cache = while_training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. resume_from_checkpoint: a folder, or True for the newest in `output_dir`.

        Errors: CheckpointError where the folder is incomplete: training never goes on from a part of a state.
        """
        if resume_from_checkpoint is True:
            found = checkpoints.latest(Path(str(self.args.output_dir)))
            if found is None:
                raise checkpoints.CheckpointError(f"{self.args.output_dir}: there is no checkpoint to resume from")
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            checkpoints.check(Path(str(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.loaded_from is None or self.loaded_from.resolve() != Path(resume_from_checkpoint).resolve():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A weight that finds no place is an error: going on would train fresh ones in its stead."""
        if load_result.missing_keys or load_result.unexpected_keys:
            raise checkpoints.CheckpointError(
                f"the checkpoint's weights do not fit the model: missing {sorted(load_result.missing_keys)}, "
                f"unexpected {sorted(load_result.unexpected_keys)}"
            )


def _routed_by_labels(inputs: dict[str, Any]) -> bool:
    """Whether the labels of each token decide in this call, and nothing else does."""
    labels = inputs.get("routing_labels")
    given = labels is not None and labels.dim() == 2 and "attention_mask" in inputs
    return given and inputs.get("route_by") in (None, "labels") and inputs.get("routing_weights") is None
