"""The parts of libmicro that are not functions on tensors. tests/policy compares this page with the module."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

def build_info() -> dict[str, Any]:
    """What libmicro is and which instruction set it chose."""

# ---- csrc/include/micro/checkpoint.h --------------------------------------------------------------------------------

class Checkpoint:
    """A model folder as C++ programs read it, for inspection. Read-only."""

    @staticmethod
    def open(folder: str | PathLike[str]) -> Checkpoint:
        """Map a folder that save_pretrained wrote; ValueError names file, tensor and what was expected."""

    @property
    def folder(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def bytes(self) -> int: ...
    def names(self) -> list[str]:
        """The official names of all tensors, sorted."""

    def contains(self, name: str) -> bool: ...
    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, by its official name."""

    def embed_tokens(self) -> Tensor: ...
    def final_norm(self) -> Tensor: ...
    def lm_head(self) -> Tensor:
        """The embedding where the head is tied."""

    def layer(self, index: int) -> dict[str, Any]:
        """Copies of one layer's tensors, by their names in memory."""

# ---- csrc/include/micro/curriculum.h --------------------------------------------------------------------------------

class FreezeRule(Enum):
    """The two published readings of a run file's trainable list."""

    R1 = ...
    R2 = ...

class Stage:
    """One stage of a curriculum: what learns, who routes, how fast (model.md 6.1, 6.2). Read-only."""

    def __init__(
        self,
        *,
        name: str = "",
        experts_per_token: int = 1,
        route_by: str = "router",
        trainable: Sequence[str] = ("model", "experts", "experts-router"),
        freeze: FreezeRule | str = "r2",
        kind: str = "block",
        learning_rate: float = 2e-5,
        warmup_ratio: float = ...,
        schedule: str = ...,
        min_ratio: float = ...,
        weight_decay: float = ...,
        betas: tuple[float, float] = ...,
        eps: float = ...,
        max_grad_norm: float = ...,
        loss_coefficients: dict[str, float] = ...,
        aux_window: str = ...,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def route_by(self) -> str: ...
    @property
    def trainable(self) -> list[str]: ...
    @property
    def freeze(self) -> FreezeRule: ...
    @property
    def kind(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_ratio(self) -> float: ...
    @property
    def schedule(self) -> str: ...
    @property
    def min_ratio(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def loss_coefficients(self) -> dict[str, float]: ...
    @property
    def aux_window(self) -> str: ...
    def learning_rate_at(self, step: int, steps: int) -> float:
        """The rate of one step of so many; from `steps` on, the rate at the end."""

    def trains(self, parameter_name: str) -> bool:
        """Whether a parameter learns, by its in-memory name."""

    def as_dict(self) -> dict[str, Any]:
        """The arguments of Stage, JSON-able: Stage(**stage.as_dict()) is the same stage."""

class Curriculum:
    """Stages, one after the other; the same object that C++ trainers use."""

    def __init__(self, stages: Sequence[Stage], steps: Sequence[int]) -> None: ...
    @staticmethod
    def published(
        steps: Sequence[int], *, freeze: FreezeRule | str = "r2", kind: str = "block", experts_per_token: int = 1
    ) -> Curriculum:
        """The published three stages: experts by labels, routers, everything (model.md 6.1)."""

    @staticmethod
    def version_3(steps: Sequence[int], *, kind: str = "block", experts_per_token: int = 4) -> Curriculum:
        """Experts alone by labels, then everything (model.md 6.5)."""

    @property
    def stages(self) -> list[Stage]: ...
    @property
    def steps(self) -> list[int]: ...
    @property
    def stage(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def current(self) -> Stage: ...
    def learning_rate(self) -> float: ...
    def experts_per_token(self) -> int: ...
    def route_by(self) -> str: ...
    def trainable(self, parameter_name: str) -> bool: ...
    def loss_coefficients(self) -> dict[str, float]: ...
    def advance(self) -> None:
        """One optimizer step."""

    def check(self, parameter_names: Sequence[str]) -> None:
        """ValueError for the first stage that would train none of these parameters."""

    def state_dict(self) -> dict[str, Any]:
        """The place in the curriculum, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

# ---- csrc/include/micro/engine.h ------------------------------------------------------------------------------------

class Engine:
    """Generation on the CPU: packed weights, a cache of its own. micro.engine.Engine is the class to use."""

    def __init__(
        self,
        config: dict[str, Any],
        parameters: Mapping[str, Tensor],
        *,
        dtype: str | None = None,
        numerics: str | None = None,
        weights: str = "packed",
        keys_values: str = "lazy",
        max_length: int = 0,
    ) -> None: ...
    @staticmethod
    def open(
        folder: str,
        *,
        dtype: str | None = None,
        numerics: str | None = None,
        weights: str = "packed",
        keys_values: str = "lazy",
        max_length: int = 0,
    ) -> Engine:
        """From a model folder by memory map."""

    def prefill(
        self,
        rows: Sequence[Sequence[int]],
        controls: Mapping[str, Tensor],
        *,
        experts_per_token: int = 0,
        chunk: int = 0,
        all_logits: bool = False,
        trace: bool = False,
        interventions: Interventions | None = None,
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Append tokens to the rows: (logits, trace or None)."""

    def decode(
        self,
        tokens: Tensor,
        controls: Mapping[str, Tensor],
        *,
        experts_per_token: int = 0,
        trace: bool = False,
        interventions: Interventions | None = None,
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Append one token to each row: (logits, trace or None)."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sequence[tuple[float, int, float, float, int]],
        stop_ids: Sequence[int] | None,
        prompt: Mapping[str, Tensor],
        answer: Mapping[str, Tensor],
        *,
        answer_at: Callable[[int], Mapping[str, Tensor]] | None = None,
        min_new_tokens: int = 0,
        experts_per_token: int = 0,
        chunk: int = 0,
        trace: bool = False,
        on_token: Callable[[int, int], object] | None = None,
        interventions: Interventions | None = None,
        shared_prefix: int = 0,
    ) -> dict[str, Any]:
        """Read prompts and write answers: tokens, finish, trace."""

    def cancel(self) -> None:
        """End the running generate() after its present step, from any thread."""

    @property
    def rows(self) -> int: ...
    @property
    def lengths(self) -> list[int]: ...
    def truncate(self, length: int) -> None:
        """Cut every row."""

    def truncate_row(self, row: int, length: int) -> None:
        """Cut one row."""

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what rows[i] was."""

    def reset(self) -> None:
        """Forget all rows."""

    def cache_bytes(self) -> dict[str, int]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def numerics(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def quantization_errors(self) -> dict[str, tuple[float, float]]: ...

# ---- csrc/include/micro/interventions.h -----------------------------------------------------------------------------

class Interventions:
    """Actions for calls of the engine. micro.engine makes them of micro.interventions."""

    def __init__(self, engine: Engine, actions: Sequence[dict[str, Any]], *, all_experts: bool = False) -> None: ...
    def reading(self, action: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of a read: values, layer, expert, row, slot, chosen."""

    def moments(self, action: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of moments: count, mean, m2, scatter or None."""

# ---- csrc/include/micro/spans.h -------------------------------------------------------------------------------------

def token_pieces(text: NDArray[np.uint32], tokens: NDArray[np.int64], cuts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Piece of each token, int64 [T]: text uint32 [N] code points, tokens int64 [T,2], cuts int64 [n]."""

def tokens_in_regions(tokens: NDArray[np.int64], regions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each token (int64 [T,2]) shares a character with a region (int64 [n,2]), bool [T]."""
