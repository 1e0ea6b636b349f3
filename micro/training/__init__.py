"""Training: recipes, the curriculum, MiCRoTrainer, exact resume (interface.md 6, model.md 6).

Names are loaded on first use: reading a recipe needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro.training.checkpoints import CheckpointError as CheckpointError
    from micro.training.curriculum import Curriculum as Curriculum
    from micro.training.curriculum import FreezeRule as FreezeRule
    from micro.training.order import Rows as Rows
    from micro.training.recipe import Encoding as Encoding
    from micro.training.recipe import Generate as Generate
    from micro.training.recipe import Recipe as Recipe
    from micro.training.recipe import Source as Source
    from micro.training.recipe import Stage as Stage
    from micro.training.runner import RunResult as RunResult
    from micro.training.runner import run as run
    from micro.training.schema import RecipeError as RecipeError
    from micro.training.trainer import MiCRoTrainer as MiCRoTrainer

_HOMES = {
    "checkpoints": ("CheckpointError",),
    "curriculum": ("Curriculum", "FreezeRule"),
    "order": ("Rows",),
    "recipe": ("Encoding", "Generate", "Recipe", "Source", "Stage"),
    "runner": ("RunResult", "run"),
    "schema": ("RecipeError",),
    "trainer": ("MiCRoTrainer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'micro.training' has no attribute {name!r}")
    value = getattr(import_module(f"micro.training.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
