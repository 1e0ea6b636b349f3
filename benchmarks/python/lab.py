"""Where measurements are taken: the models of one shape and dtype, the sides made of them, and the clock."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import all_experts
import torch
from jobs import JOBS
from official import Official
from paired import Rounds, Timed, rounds
from shapes import EXPERTS, REAL_VOCABULARY, Shape, fill, small
from torch import Tensor
from transformers import LlamaForCausalLM, Olmo2ForCausalLM
from transformers.initialization import no_init_weights

from micro.modeling import MiCRoConfig, MiCRoForCausalLM
from micro.modeling.keys import official_map


class Side(Protocol):
    """One side of a comparison."""

    def seconds(self) -> float: ...
    def outputs(self) -> dict[str, Tensor]: ...


@dataclass
class Options:
    """What was asked for on the command line."""

    rounds: int
    threads: int
    quick: bool = False
    official: Path | None = None
    official_python: str = sys.executable
    official_revision: str = "r2"
    llama_python: str = sys.executable
    wanted: set[str] = field(default_factory=set)  # goals, such as G2


class Models:
    """A mixture, and other models with its weights, made when they are asked for."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        with no_init_weights():
            config = MiCRoConfig(backbone=shape.backbone, num_experts=EXPERTS, **shape.fields())
            self.ours: Any = _from_config(MiCRoForCausalLM, config, dtype)
        fill(self.ours, shape)
        self._dense: Any = None
        self._fast: Any = None

    @property
    def fast(self) -> Any:
        """The same parameters under ``numerics="fast"``."""
        if self._fast is None:
            config = MiCRoConfig(**{**self.ours.config.to_diff_dict(), "numerics": "fast"})
            with no_init_weights(), torch.device("meta"):
                self._fast = _from_config(MiCRoForCausalLM, config, self.dtype)
            self._fast.load_state_dict(self.ours.state_dict(), assign=True)
        return self._fast

    @property
    def dense(self) -> Any:
        """The Hugging Face model made of the blocks of expert 0, which share their memory with ours."""
        if self._dense is None:
            cls = Olmo2ForCausalLM if self.shape.backbone == "olmo2" else LlamaForCausalLM
            config = all_experts.dense_config(self.shape)
            with no_init_weights(), torch.device("meta"):
                model = _from_config(cls, config, self.dtype)
            model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
            model.load_state_dict(self._dense_state(), assign=True)
            self._dense = model
        return self._dense

    def _dense_state(self) -> dict[str, Tensor]:
        parameters, state = dict(self.ours.named_parameters()), {}
        for name, target in official_map(self.ours.config).items():
            if "gate.0" in name or "gate.1" in name or target.expert not in (None, 0):
                continue
            tensor = parameters[target.name].detach()
            key = name.replace("experts.0.", "").replace("final_norm", "norm")
            state[key if key.startswith("lm_head") else f"model.{key}"] = tensor if target.expert is None else tensor[0]
        return state

    def all_experts(self, experts_per_token: int = 1, *, share: bool = True, dtype: torch.dtype | None = None) -> Any:
        model = all_experts.build(self.ours, self.shape, experts_per_token, share=share)
        return model if dtype is None else model.to(dtype=dtype)  # type: ignore[call-arg]


def _from_config(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    return cls._from_config(config, dtype=dtype).eval()


class Lab:
    """Keeps the models of one shape and dtype at a time, and the official worker for the whole run."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._models: Models | None = None
        self._reference: tuple[Any, ...] = ()
        self.official: Official | None = None
        if options.official is not None:
            self.official = Official(
                options.official, options.official_python, options.official_revision, options.threads
            )
        self.experiment, self._began = "", time.monotonic()
        self.recorded: list[dict[str, list[float]]] = []  # every time of the experiment, for its file
        torch.set_num_threads(options.threads)

    @property
    def reference_name(self) -> str:
        if self.official is None:
            return "all-expert stand-in"
        about = self.official.about
        return f"official classes ({self.official.revision}, transformers {about['transformers']})"

    def shape(self, shape: Shape) -> Shape:
        if self.official is not None and shape.name in REAL_VOCABULARY:  # its padding index needs the real one
            shape = replace(shape, vocabulary=REAL_VOCABULARY[shape.name])
        return small(shape) if self.options.quick else shape

    def size(self, tokens: int) -> int:
        return max(8, tokens // 16) if self.options.quick else tokens

    def models(self, shape: Shape, dtype: torch.dtype) -> Models:
        shape = self.shape(shape)
        if self._models is None or (self._models.shape, self._models.dtype) != (shape, dtype):
            self.release()
            self.say(f"drawing the weights of {shape.name}, {str(dtype).removeprefix('torch.')}")
            self._models = Models(shape, dtype)
        return self._models

    def release(self) -> None:
        """Let go of all models."""
        self._models, self._reference = None, ()
        gc.collect()

    def reference(
        self, models: Models, kind: str, ids: Tensor, *, experts_per_token: int = 1, **arguments: Any
    ) -> Side:
        """A job of the official classes, or of the stand-in where there is no copy of them."""
        key = (id(models), experts_per_token)
        if self._reference[:2] != key:
            self._reference = ()
            if self.official is not None:
                self.say("loading the weights into the official classes")
                self.official.load(models.ours, experts_per_token)
            stand_in = None if self.official is not None else models.all_experts(experts_per_token)
            self._reference = (*key, stand_in)
        if self.official is not None:
            return self.official.job(kind, ids, **arguments)
        return JOBS[kind](self._reference[2], ids, **arguments)

    def rounds(self, sides: dict[str, Timed]) -> Rounds:
        taken = rounds(sides, self.options.rounds, self.say)
        self.recorded.append(taken.seconds)
        return taken

    def say(self, text: str) -> None:
        """Progress, on standard error; one line that is written over where it is a terminal."""
        line = f"  {self.experiment}: {text} ({time.monotonic() - self._began:.0f} s)"
        if sys.stderr.isatty():
            print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def start(self, experiment: str) -> None:
        self.experiment, self._began = experiment, time.monotonic()

    def close(self) -> None:
        if self.official is not None:
            self.official.close()
