"""The tensors of a model under their official names, and safetensors shards written as the names come."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from micro.convert.folders import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from micro.modeling import MiCRoForCausalLM

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def official_tensors(model: MiCRoForCausalLM, *, untied: bool = False) -> dict[str, Tensor]:
    """Official key -> tensor; experts are views of the stacks, so writing to them changes the model.

    A tied head has no key of its own, unless ``untied`` asks for it: it is then the embedding itself.
    """
    from micro.modeling.keys import to_official

    tensors = to_official(model.config, {name: p.detach() for name, p in model.named_parameters()})
    if untied:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    return tensors


def write_shards(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = 5 * 10**9) -> None:
    """Write tensors as safetensors, in shards with an index where one file would exceed ``max_shard_bytes``.

    Tensors may be views and may share memory: each is copied as it is written, one shard at a time.
    """
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    room, total = max_shard_bytes, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        total += size
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, keys in zip(files, shards, strict=True):
        copies = {key: tensors[key].detach().cpu().contiguous().clone() for key in keys}
        save_file(copies, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: file for file, keys in zip(files, shards, strict=True) for key in keys}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
