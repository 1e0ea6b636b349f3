"""The C++ curriculum, and how a recipe becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from micro.curriculum import Curriculum, FreezeRule, Stage

if TYPE_CHECKING:
    from micro.training.recipe import Recipe, ResolvedStage

__all__ = ["Curriculum", "FreezeRule", "Stage", "build_curriculum"]

# A recipe's word in the words of the published run files, by freeze rule (model.md 6.1).
_WORDS = {
    "r1": {
        "experts": ["experts"],
        "routers": ["experts-router"],
        "but_routers": ["model", "experts"],
        "everything": ["model", "experts", "experts-router"],
    }
}
_WORDS["r2"] = {**_WORDS["r1"], "experts": ["model", "experts"]}


def build_curriculum(
    recipe: Recipe, stages: Sequence[ResolvedStage], steps: Sequence[int], *, start: int = 0
) -> Curriculum:
    """The curriculum of a recipe, standing at the first step of stage `start`. steps: optimizer steps of each stage."""
    from micro.training.recipe import aux_window

    made = [
        Stage(
            name=stage.name,
            experts_per_token=stage.experts_per_token,
            route_by=stage.route_by,
            trainable=_WORDS[recipe.freeze][stage.trainable],
            freeze=recipe.freeze,
            kind="ffn" if recipe.kind == "ffn" else "block",
            learning_rate=stage.learning_rate,
            warmup_ratio=stage.warmup,
            schedule=recipe.schedule,
            weight_decay=recipe.weight_decay,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            max_grad_norm=recipe.max_grad_norm,
            loss_coefficients=stage.losses,
            aux_window=aux_window(recipe),
        )
        for stage in stages
    ]
    curriculum = Curriculum(made, list(steps))
    for _ in range(sum(steps[:start])):
        curriculum.advance()
    return curriculum
