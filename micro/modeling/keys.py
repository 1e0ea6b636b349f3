"""Names of tensors: the official names on disk and ours in memory (model.md 5.1-5.3), and checks of files by header.

In memory the experts of a layer are one tensor with leading axis E; on disk there is one tensor per expert and no
``model.`` prefix. :func:`official_map` is the one table; everything else here is derived from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming

from micro.modeling.config import MiCRoConfig

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# name of a stacked parameter in memory -> name below one expert on disk
_BLOCK_NAMES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_FFN_NAMES = {name: name for name in ("gate_proj", "up_proj", "down_proj")}


class Target(NamedTuple):
    """Where one tensor of a file belongs: parameter name in memory (with ``model.``), expert or None, shape on disk."""

    name: str
    expert: int | None
    shape: tuple[int, ...]


class Header(NamedTuple):
    """One tensor of a safetensors file, as its header tells."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


# ---------------------------------------------------------------- the table
def expert_shapes(config: MiCRoConfig) -> dict[str, tuple[int, ...]]:
    """In-memory name below ``blocks.`` -> shape of one expert's tensor."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, int(config.head_dim or 0)
    queries, keys = config.num_attention_heads * head, int(config.num_key_value_heads or 0) * head
    ffn: dict[str, tuple[int, ...]] = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    if not config.is_block:
        return ffn
    norms: dict[str, tuple[int, ...]] = {"input_norm": (hidden,), "post_attention_norm": (hidden,)}
    if config.backbone == "olmo2":
        norms = {"q_norm": (queries,), "k_norm": (keys,), "post_attention_norm": (hidden,), "post_ffn_norm": (hidden,)}
    maps: dict[str, tuple[int, ...]] = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    return {**norms, **maps, **ffn}


def _shared_shapes(config: MiCRoConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the attention and norms that FFN experts share; equal in memory and on disk."""
    hidden, head = config.hidden_size, int(config.head_dim or 0)
    queries, keys = config.num_attention_heads * head, int(config.num_key_value_heads or 0) * head
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
    }
    if config.backbone == "olmo2":
        return {
            **shapes,
            "self_attn.q_norm": (queries,),
            "self_attn.k_norm": (keys,),
            "post_feedforward_layernorm": (hidden,),
        }
    return {**shapes, "input_layernorm": (hidden,)}


def final_norm_key(config: MiCRoConfig) -> str:
    """Official name of the final norm: ``final_norm.weight``, for OLMo-2 ``norm.weight``."""
    return "norm.weight" if config.backbone == "olmo2" else "final_norm.weight"


def _layer_entries(config: MiCRoConfig, layer: int) -> Iterator[tuple[str, Target]]:
    disk, memory = f"layers.{layer}.", f"model.layers.{layer}."
    width = int(config.router_hidden_size or 0)
    middle, names = ("", _BLOCK_NAMES) if config.is_block else ("block_sparse_moe.", _FFN_NAMES)
    yield f"{disk}{middle}gate.0.weight", Target(f"{memory}router.in_proj.weight", None, (width, config.hidden_size))
    yield f"{disk}{middle}gate.1.weight", Target(f"{memory}router.out_proj.weight", None, (config.num_experts, width))
    if not config.is_block:
        for name, shape in _shared_shapes(config).items():
            yield f"{disk}{name}.weight", Target(f"{memory}{name}.weight", None, shape)
    for name, shape in expert_shapes(config).items():
        for e in range(config.num_experts):
            yield f"{disk}{middle}experts.{e}.{names[name]}.weight", Target(f"{memory}blocks.{name}.weight", e, shape)


def official_map(config: MiCRoConfig) -> dict[str, Target]:
    """Official key -> where it belongs in a :class:`MiCRoForCausalLM`. A tied head has no key of its own."""
    table = (config.vocab_size, config.hidden_size)
    out = {"embed_tokens.weight": Target("model.embed_tokens.weight", None, table)}
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = Target("lm_head.weight", None, table)
    out[final_norm_key(config)] = Target("model.norm.weight", None, (config.hidden_size,))
    for layer in range(config.num_hidden_layers):
        out.update(_layer_entries(config, layer))
    return out


def official_shapes(config: MiCRoConfig) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of every tensor that a folder with this config must hold."""
    return {key: target.shape for key, target in official_map(config).items()}


# ---------------------------------------------------------------- transformers' conversion registry
def disk_mapping(
    config: MiCRoConfig | None = None, *, prefix: str = "model."
) -> list[WeightConverter | WeightRenaming]:
    """Official keys -> memory, as transformers' loader takes it; it is reversed on save.

    Without config: the union over families and kinds, good for loading only (two official names of the final norm lead
    to one parameter). Both sides of a renaming are anchored, because it is reversed. prefix "" is for headless models.
    """
    p = prefix.replace(".", r"\.")
    norms = ("final_norm", "norm") if config is None else (final_norm_key(config).split(".")[0],)
    routers = {True: (r"\.gate\.",), False: (r"\.block_sparse_moe\.gate\.",)}
    kinds = (False, True) if config is None else (config.is_block,)
    mapping: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(rf"^{name}\.", rf"^{p}norm\.") for name in norms if prefix or name != "norm"
    ]
    if prefix:
        mapping += [WeightRenaming(rf"^{name}\.", rf"^{p}{name}\.") for name in ("embed_tokens", "layers")]
    for block in kinds:
        for gate in routers[block]:
            mapping += [
                WeightRenaming(rf"{gate}0\.", r"\.router\.in_proj\."),
                WeightRenaming(rf"{gate}1\.", r"\.router\.out_proj\."),
            ]
        middle, names = ("", _BLOCK_NAMES) if block else (".block_sparse_moe", _FFN_NAMES)
        mapping += [
            WeightConverter(f"{middle}.experts.*.{disk}.weight", f".blocks.{memory}.weight", [MergeModulelist(dim=0)])
            for memory, disk in names.items()
        ]
    return mapping


# ---------------------------------------------------------------- files
def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder that a loader would read: one file, or those that the index names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one that holds {WEIGHTS_FILE} or {INDEX_FILE}")
    if (single := folder / WEIGHTS_FILE).is_file():
        return [single]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ValueError(f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{index}: no index of safetensors shards with a weight_map ({error})") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{index}: the shards {missing} are not there")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, Header]:
    """Names, dtypes and shapes in one safetensors file; reads no tensor. A file cut short is an error."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file}: {size} bytes hold no safetensors header of {length} bytes; is the file complete?"
            )
        try:
            table = json.loads(stream.read(length))
            entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
            out = {name: Header(entry["dtype"], tuple(entry["shape"]), file) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file}: the safetensors header is unreadable ({error})") from error
    if end != size - 8 - length:
        raise ValueError(f"{file}: holds {size - 8 - length} bytes of tensors, its header says {end}; incomplete file")
    return out


def read_headers(folder: str | Path) -> dict[str, Header]:
    """Headers of all weight files of a folder; a name in two files is an error."""
    out: dict[str, Header] = {}
    for file in weight_files(folder):
        header = read_header(file)
        if twice := sorted(header.keys() & out.keys()):
            raise ValueError(f"{folder}: in more than one file: {twice[:5]}")
        out |= header
    return out


def file_dtype(headers: Mapping[str, Header]) -> torch.dtype:
    """The one floating dtype of all tensors; several dtypes are an error."""
    dtypes = {header.dtype for header in headers.values()}
    if len(dtypes) != 1 or not dtypes <= DTYPES.keys():
        raise ValueError(f"the tensors have dtypes {sorted(dtypes)}, expected one of {sorted(DTYPES)} for all of them")
    return DTYPES[dtypes.pop()]


def compare_headers(config: MiCRoConfig, headers: Mapping[str, Header], *, head: bool = True) -> list[str]:
    """Every missing, unexpected or mis-shaped tensor, in official names. ``head=False``: a headless model, for which
    ``lm_head.weight`` may be there or not.
    """
    want = official_shapes(config)
    have = {name: header.shape for name, header in headers.items()}
    optional = set() if head else {"lm_head.weight"}
    problems = [f"missing {name} {list(want[name])}" for name in sorted(want.keys() - have.keys() - optional)]
    problems += [f"unexpected {name} {list(have[name])}" for name in sorted(have.keys() - want.keys() - optional)]
    problems += [
        f"{name} has shape {list(have[name])}, expected {list(want[name])}"
        for name in sorted(want.keys() & have.keys())
        if have[name] != want[name]
    ]
    return problems


def check_folder(config: MiCRoConfig, folder: str | Path, *, head: bool = True) -> torch.dtype:
    """Compare a folder's file headers with the config before anything is loaded; returns the dtype of the tensors.

    Raises one ``ValueError`` that lists every problem in official names.
    """
    headers = read_headers(folder)
    problems = compare_headers(config, headers, head=head)
    if config.tie_word_embeddings and "lm_head.weight" in headers:
        problems.append(
            "config.json ties the head, but lm_head.weight is in the file: set tie_word_embeddings to false"
        )
    if problems:
        shown = problems[:40] + ([f"and {len(problems) - 40} more"] if len(problems) > 40 else [])
        raise ValueError(f"{folder}: the weights do not fit the config, {len(problems)} problems: " + "; ".join(shown))
    return file_dtype(headers)


# ---------------------------------------------------------------- state dictionaries
def stack_official_keys(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, object],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """``load_state_dict`` pre-hook: official keys become stacked parameters, in place.

    ``transformers.Trainer`` calls ``load_state_dict(file, strict=False)`` on resume, shard by shard, without any key
    conversion. Experts that are not in this dictionary keep the module's present values; with ``strict`` they are
    missing keys.
    """
    config = module.config
    assert isinstance(config, MiCRoConfig)
    parameters = dict(module.named_parameters())
    headless = "embed_tokens.weight" in parameters
    stacks: dict[str, Tensor] = {}
    lacking: list[str] = []
    for key, target in official_map(config).items():
        name = target.name.removeprefix("model.") if headless else target.name
        if name not in parameters or prefix + key not in state_dict:
            if target.expert is not None and prefix + name not in state_dict:
                lacking.append(prefix + key)
            continue
        if target.expert is None:
            state_dict[prefix + name] = state_dict.pop(prefix + key)
            continue
        tensor = state_dict.pop(prefix + key)
        if tuple(tensor.shape) != target.shape:
            error_msgs.append(f"{prefix + key} has shape {list(tensor.shape)}, expected {list(target.shape)}")
        elif name not in stacks:
            stacks[name] = _start_of_stack(parameters[name], tensor, target.expert)
        else:
            stacks[name][target.expert] = tensor
    state_dict.update({prefix + name: stack for name, stack in stacks.items()})
    if strict:
        touched = {prefix + name for name in stacks}
        missing_keys.extend(key for key in lacking if prefix + official_owner(config, key, prefix, headless) in touched)


def official_owner(config: MiCRoConfig, key: str, prefix: str, headless: bool) -> str:
    """Parameter name in memory of one official key."""
    name = official_map(config)[key.removeprefix(prefix)].name
    return name.removeprefix("model.") if headless else name


def _start_of_stack(parameter: Tensor, tensor: Tensor, expert: int) -> Tensor:
    """A stack with one expert filled in and the module's present values elsewhere."""
    stack = tensor.new_empty(parameter.shape)
    if not parameter.is_meta:
        stack.copy_(parameter.detach())
    stack[expert] = tensor
    return stack


def to_official(config: MiCRoConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In-memory state of a :class:`MiCRoForCausalLM` -> official keys; experts are views of the stacks."""
    out = {}
    for key, target in official_map(config).items():
        tensor = state_dict[target.name]
        out[key] = tensor if target.expert is None else tensor[target.expert]
    return out
