"""Training: recipes, the curriculum, MiCRoTrainer, exact resume (interface.md 6, model.md 6).

Names are loaded on first use: reading a recipe needs neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import CheckpointError as CheckpointError
    from .curriculum import Curriculum as Curriculum
    from .curriculum import FreezeRule as FreezeRule
    from .order import Rows as Rows
    from .recipe import Encoding as Encoding
    from .recipe import Generate as Generate
    from .recipe import Recipe as Recipe
    from .recipe import Source as Source
    from .recipe import Stage as Stage
    from .runner import RunResult as RunResult
    from .runner import run as run
    from .schema import RecipeError as RecipeError
    from .trainer import MiCRoTrainer as MiCRoTrainer

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
