"""The engine: fast generation on the CPU from packed weights, without gradients (performance.md 9.4, 9.5, 9.14).

    engine = model.engine()                      # over the parameters of a model
    engine = micro.Engine.open("micro-135m")     # over a folder, mapped into memory
    answer = engine.generate("Tom thinks that", max_new_tokens=40, ablate="social")

Same routes, logits and greedy tokens as the model, bit for bit, unless ``numerics="fast"`` or ``weights="int8"`` is
asked for. Rows are computed as if they were alone: batches, chunks and numbers of threads change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micro._native import core

if TYPE_CHECKING:
    from micro._C import Engine as NativeEngine
    from micro._C import Interventions as NativeActions
    from micro.interventions import Action, Findings
    from micro.interventions.engine_actions import EngineActions
    from micro.modeling import MiCRoConfig, MiCRoForCausalLM, RoutingTrace, Steering

Ids = Sequence[int]
Prompts = str | Sequence[str] | Ids | Sequence[Ids] | Tensor

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


@dataclass
class EngineOutput:
    """Of one call. logits: float32 (float64 for float64) [B,V] of each row's last token, or with ``all_logits``
    [B,S,V], 0 behind short rows; routing: rows begin in the first slot; findings: what ``interventions`` read.
    """

    logits: Tensor
    routing: RoutingTrace | None = None
    findings: Findings | None = None


@dataclass
class EngineGeneration:
    """Answers. prompts, tokens: ids of each row (a stop token included); finish: "stop", "length", "callback" or
    "cancelled"; texts: the answers, where the engine has a tokenizer; routing: prompt + new tokens - 1 slots, prompts
    end in the same slot; findings: what ``interventions`` read.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    finish: list[str]
    texts: list[str] | None = None
    routing: RoutingTrace | None = None
    findings: Findings | None = None


class Engine:
    """A model that answers, in C++ (``micro/engine.h``). It holds the rows that it has read: :meth:`prefill` and
    :meth:`decode` append to them, :meth:`generate` starts anew. One thread at a time; :meth:`cancel` from any.
    """

    def __init__(self, native: NativeEngine, config: MiCRoConfig, tokenizer: Any = None) -> None:
        self._native, self.config, self.tokenizer = native, config, tokenizer

    # ------------------------------------------------------------------ making
    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        numerics: str | None = None,
        weights: str = "packed",
        keys_values: str = "lazy",
        max_length: int | None = None,
        tokenizer: Any = None,
    ) -> Engine:
        """Of a folder that ``save_pretrained`` or ``micro.upcycle`` wrote. The files are mapped, packed and let go;
        those of the embedding stay mapped and must not change.

        dtype: of weights and arithmetic, default that of the file; numerics: "reference" or "fast", default the
        config's; weights: "packed" or "int8"; keys_values: "lazy" or "eager"; max_length: tokens per row, default
        ``max_position_embeddings``; tokenizer: default that of the folder, if there is one.
        """
        from micro.modeling import MiCRoConfig

        folder = Path(folder).expanduser()
        native = core.Engine.open(str(folder), **_options(dtype, numerics, weights, keys_values, max_length))
        if tokenizer is None and (folder / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(native, MiCRoConfig.from_pretrained(folder), tokenizer)

    @classmethod
    def from_model(
        cls,
        model: MiCRoForCausalLM,
        *,
        dtype: torch.dtype | str | None = None,
        numerics: str | None = None,
        weights: str = "packed",
        keys_values: str = "lazy",
        max_length: int | None = None,
        tokenizer: Any = None,
    ) -> Engine:
        """Of a model's parameters as they are now; the model may be changed or dropped afterwards. Options: as in
        :meth:`open`. Raises ``ValueError`` for a model on another device: the engine computes on the CPU.
        """
        config = model.config
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        elsewhere = {str(p.device) for p in parameters.values() if p.device.type != "cpu"}
        if elsewhere:
            raise ValueError(
                f"Engine.from_model: the engine computes on the CPU, this model is on {', '.join(sorted(elsewhere))}: "
                'pass model.to("cpu"), or generate with the model itself'
            )
        options = _options(dtype, numerics or config.numerics, weights, keys_values, max_length)
        return cls(core.Engine(_fields(config, model.generation_config), parameters, **options), config, tokenizer)

    # ------------------------------------------------------------------ calls
    def prefill(
        self,
        tokens: Ids | Sequence[Ids] | Tensor,
        *,
        chunk: int = 0,
        all_logits: bool = False,
        output_routing: bool = False,
        interventions: Sequence[Action] = (),
        all_experts: bool = False,
        **controls: Any,
    ) -> EngineOutput:
        """Append tokens to the rows; the first call makes the rows. Rows may have different lengths.

        chunk: tokens per row that are worked off at a time, 0 = as many as are fast. interventions: actions on
        activations, as in ``model.intervene``; slots count each row's own tokens. all_experts: in the layers whose
        routed rows an action meets, every expert runs on every token, and ``Reading.chosen`` tells the routed ones;
        the results stay those of the usual routing, bit for bit. Controls: those of the model's ``forward``; an S axis
        counts each row's new tokens.
        """
        rows = _rows(tokens)
        given, k = self._controls(controls, len(rows), max(map(len, rows), default=0))
        actions = self._actions(interventions, all_experts)
        logits, trace = self._native.prefill(
            rows,
            given,
            experts_per_token=k,
            chunk=chunk,
            all_logits=all_logits,
            trace=output_routing,
            interventions=_table(actions),
        )
        return EngineOutput(logits, self._trace(trace), _findings(actions))

    def decode(
        self,
        tokens: Tensor | Ids,
        *,
        output_routing: bool = False,
        interventions: Sequence[Action] = (),
        all_experts: bool = False,
        **controls: Any,
    ) -> EngineOutput:
        """Append one token to each row: tokens [B]. interventions, all_experts: as in :meth:`prefill`."""
        tokens = torch.as_tensor(tokens)
        given, k = self._controls(controls, self.rows, 1)
        actions = self._actions(interventions, all_experts)
        logits, trace = self._native.decode(
            tokens, given, experts_per_token=k, trace=output_routing, interventions=_table(actions)
        )
        return EngineOutput(logits, self._trace(trace), _findings(actions))

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], object] | None = None,
        chunk: int = 0,
        output_routing: bool = False,
        interventions: Sequence[Action] = (),
        all_experts: bool = False,
        shared_prefix: int = 0,
        **controls: Any,
    ) -> EngineGeneration:
        """Read prompts (texts or ids) and write answers; rows that ended cost nothing more.

        temperature 0 takes the most probable token; sampling options may be lists, one entry per row; row r of one
        ``seed`` draws with seed + r. stop_ids: default the model's end-of-sequence ids, none of which is drawn before
        ``min_new_tokens``. on_token(row, token) sees every new token; what it returns, if true, ends the row.
        interventions, all_experts: as in :meth:`prefill`, in prompts and answers. Controls: those of the model's
        ``generate``; an S axis counts each row's own prompt tokens, prompts need no padding.

        shared_prefix: number of tokens with which all prompts begin. They are read once instead of once per row, and
        their keys and values copied to the rows. The call's interventions and controls act behind them alone, and an S
        axis counts the prompt's tokens from there; of the arguments only ``experts_per_token`` holds in the prefix,
        which the router steers freely. So the answers are those without ``shared_prefix`` where nothing would have
        acted on the first tokens. ``interventions.side_by_side`` makes K lists of actions one table for K rows.

        Raises:
            ValueError: with ``shared_prefix``, inside a ``micro.steering`` block, which holds for whole prompts, or
                with an action whose positions all lie in the prefix: it would do nothing.
        """
        from micro.modeling import engine_controls

        ids = self._ids(prompts)
        shared = index(shared_prefix)
        _check_prefix(shared, interventions)
        rows, slots = len(ids), max(max(map(len, ids), default=0) - shared, 1)
        steering = self._steering(controls)
        answer = engine_controls.answer_controls(steering, rows, slots, 1)
        by_step = engine_controls.changes_by_step(steering)
        actions = self._actions(interventions, all_experts)
        found = self._native.generate(
            ids,
            max_new_tokens,
            _sampling(rows, temperature, top_k, top_p, repetition_penalty, seed),
            None if stop_ids is None else list(stop_ids),
            engine_controls.prompt_controls(steering, rows, slots),
            answer,
            answer_at=(
                (lambda step: engine_controls.answer_controls(steering, rows, slots, step)) if by_step else None
            ),
            min_new_tokens=min_new_tokens,
            experts_per_token=steering.experts_per_token or 0,
            chunk=chunk,
            trace=output_routing,
            on_token=on_token,
            interventions=_table(actions),
            shared_prefix=shared,
        )
        texts = None
        if self.tokenizer is not None:
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in found["tokens"]]
        trace, findings = self._trace(found["trace"]), _findings(actions)
        return EngineGeneration(ids, found["tokens"], found["finish"], texts, trace, findings)

    def cancel(self) -> None:
        """End the running :meth:`generate` after its present step; it returns what it has."""
        self._native.cancel()

    # ------------------------------------------------------------------ the rows that were read
    @property
    def rows(self) -> int:
        """Number of rows."""
        return self._native.rows

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return self._native.lengths

    def truncate(self, length: int, row: int | None = None) -> None:
        """Keep the first ``length`` tokens of one row, or at most so many of every row."""
        if row is None:
            self._native.truncate(length)
        else:
            self._native.truncate_row(row, length)

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what ``rows[i]`` was: choose, reorder, repeat."""
        self._native.select(list(rows))

    def repeat(self, count: int) -> None:
        """Every row ``count`` times, side by side."""
        self.select([row for row in range(self.rows) for _ in range(count)])

    def reset(self) -> None:
        """Forget all rows and give their memory back."""
        self._native.reset()

    # ------------------------------------------------------------------ facts
    @property
    def dtype(self) -> torch.dtype:
        """Of weights and arithmetic."""
        return getattr(torch, self._native.dtype)  # type: ignore[no-any-return]

    @property
    def numerics(self) -> str:
        """Either "reference" or "fast"."""
        return self._native.numerics

    @property
    def max_length(self) -> int:
        """Tokens that a row may hold."""
        return self._native.max_length

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, embedding and gains included."""
        return self._native.weight_bytes

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Memory of the rows: "keys_values" made, "inputs" kept, and "resident" pages that hold them."""
        return self._native.cache_bytes()

    @property
    def quantization_errors(self) -> dict[str, tuple[float, float]]:
        """Of int8 weights, by kind of matrix: error of the largest element and root mean square, both relative."""
        return self._native.quantization_errors

    def __repr__(self) -> str:
        """Size, format and what is held."""
        return (
            f"Engine({self.config.num_hidden_layers} layers, {self.config.num_experts} experts, {self._native.dtype}, "
            f"{self.weight_bytes / 1e6:.0f} MB of weights, numerics {self.numerics!r}, {self.rows} rows)"
        )

    # ------------------------------------------------------------------ helpers
    def _steering(self, controls: dict[str, Any]) -> Steering:
        from micro.modeling import engine_controls
        from micro.modeling.steer import Steering

        if "routing_labels" in controls:
            controls["routing_labels"] = engine_controls.padded_labels(controls["routing_labels"])
        return Steering.make(self.config, **controls)

    def _controls(self, controls: dict[str, Any], rows: int, slots: int) -> tuple[dict[str, Tensor], int]:
        from micro.modeling import engine_controls

        steering = self._steering(controls)
        return engine_controls.call_controls(steering, rows, slots), steering.experts_per_token or 0

    def _actions(self, interventions: Sequence[Action], all_experts: bool) -> EngineActions | None:
        if not interventions:
            return None
        from micro.interventions.engine_actions import EngineActions

        return EngineActions(self._native, self.config, interventions, all_experts=all_experts)

    def _ids(self, prompts: Prompts) -> list[list[int]]:
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Tensor) and len(texts) and isinstance(texts[0], str):
            if self.tokenizer is None:
                raise ValueError("the prompts are texts, but the engine has no tokenizer: pass tokenizer=... or ids")
            return [list(self.tokenizer(text)["input_ids"]) for text in texts]
        return _rows(texts)  # type: ignore[arg-type]

    def _trace(self, trace: dict[str, Any] | None) -> RoutingTrace | None:
        from micro.modeling import RoutingTrace

        if trace is None:
            return None
        return RoutingTrace(**trace, expert_names=list(self.config.expert_names or []))


def _check_prefix(shared: int, interventions: Sequence[Action]) -> None:
    """Whether all that was asked for can act behind a prefix that nothing acts on."""
    if shared <= 0:
        return
    from micro.interventions.actions import check_behind
    from micro.modeling.controls import ACTIVE

    if open_blocks := [name for name, _ in ACTIVE.get()]:
        raise ValueError(
            f"shared_prefix is {shared} inside a block of micro.steering ({', '.join(open_blocks)}), which holds for "
            "whole prompts, but a shared prefix is read unsteered: pass the controls to generate, which then begin "
            "behind the prefix, or leave shared_prefix out"
        )
    check_behind(interventions, shared, "shared_prefix")


def _table(actions: EngineActions | None) -> NativeActions | None:
    return None if actions is None else actions.table


def _findings(actions: EngineActions | None) -> Findings | None:
    return None if actions is None else actions.findings()


def _rows(tokens: Ids | Sequence[Ids] | Tensor) -> list[list[int]]:
    """Rows of ids; one row may come without its list."""

    def listed(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else value

    try:
        rows = [listed(row) for row in listed(tokens)]
        if rows and isinstance(rows[0], int):
            rows = [rows]
        return [[index(listed(token)) for token in row] for row in rows]
    except TypeError:
        raise TypeError(
            f"the tokens ({type(tokens).__name__}) are no rows of whole numbers: give a list of token ids, a list of "
            "such lists, or an integer tensor [B,S]"
        ) from None


def _options(
    dtype: torch.dtype | str | None, numerics: str | None, weights: str, keys_values: str, max_length: int | None
) -> dict[str, Any]:
    if isinstance(dtype, torch.dtype):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}, expected one of {[*_DTYPES.values()]}")
        dtype = _DTYPES[dtype]
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}, expected a number of tokens, or None for the config's")
    options = {"numerics": numerics, "weights": weights, "keys_values": keys_values, "max_length": max_length or 0}
    return options | {"dtype": dtype}


def _fields(config: MiCRoConfig, generation: Any) -> dict[str, Any]:
    """The configuration as the engine reads it."""
    names = ["backbone", "block_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    names += ["num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok"]
    names += ["router_hidden_size", "max_position_embeddings", "expert_names", "rms_norm_eps", "weight_rule"]
    stops = getattr(generation, "eos_token_id", None)
    stops = config.eos_token_id if stops is None else stops
    return {name: getattr(config, name) for name in names} | {
        "rope_theta": config.rope_theta_value,
        "rope_scaling": config.rope_scaling_value,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_ids": [] if stops is None else stops if isinstance(stops, list) else [stops],
    }


def _sampling(rows: int, *options: Any) -> list[tuple[Any, ...]]:
    """(temperature, top_k, top_p, repetition penalty, seed) once for all rows, or of each row."""
    for seed in options[-1] if isinstance(options[-1], Sequence) else [options[-1]]:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, expected a whole number in 0 .. 2**64 - 1")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    if not any(isinstance(option, Sequence) for option in options):
        return [options]
    columns = []
    for name, option in zip(names, options, strict=True):
        if isinstance(option, Sequence):
            if len(option) != rows:
                raise ValueError(f"{name} is given for {len(option)} rows, there are {rows}")
            columns.append(list(option))
        else:
            columns.append([(option + row) % 2**64 if name == "seed" else option for row in range(rows)])
    return list(zip(*columns, strict=True))
