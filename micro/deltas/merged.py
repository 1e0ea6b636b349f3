"""Weights made of a base and a delta, as a model in memory or as a folder that is written tensor by tensor."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.deltas.deltas import ExpertDeltas, Group, wide_dtype
from micro.deltas.sources import EMBEDDING, HEAD
from micro.files import check_target, replace_folder
from micro.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from micro.modeling import MiCRoForCausalLM

RECEIPT = "deltas.json"
SHARD_BYTES = 5 * 10**9
_TYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass
class Merged:
    """theta = theta_base + scale * tau for one block per layer, not yet computed.

    Args:
        deltas: where base and shared tensors come from.
        delta: tau of a group, shaped like one expert's tensor, in the wide dtype.
        how: one line for the card.
        scale: lambda. 0 gives the base's bits, as does every element with tau = 0.
        shared: the same for tensors outside the experts (embedding, head, final norm; with FFN experts attention and
            norms too): 1 = as the mixture has them, 0 = the base's. Without a base they are the mixture's.
        settings: what else the receipt (``deltas.json``) should tell.
    """

    deltas: ExpertDeltas
    delta: Callable[[Group], Tensor]
    how: str
    scale: float = 1.0
    shared: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)

    def tensor(self, group: Group) -> Tensor:
        """One merged tensor, in the mixture's dtype."""
        base = self.deltas.base(group)
        return base if self.scale == 0 else add(base, self.delta(group), self.scale)

    def shared_tensor(self, name: str) -> Tensor:
        """One tensor outside the experts: base + shared * (mixture - base)."""
        own = self.deltas.mixture.shared(name).detach()
        base = None if self.shared == 1 else self.deltas.shared_base(name)
        if base is None:
            return own
        wide = wide_dtype(own.dtype)
        return base if self.shared == 0 else add(base, own.to(wide) - base.to(wide), self.shared)

    def receipt(self) -> dict[str, Any]:
        """What was merged, from what, and how."""
        about = {"how": self.how, "mixture": self.deltas.mixture.name, "base": self.deltas.base_name}
        return {**about, "scale": self.scale, "shared": self.shared, **self.settings}

    # ------------------------------------------------------------------ one dense model
    def dense(self) -> PreTrainedModel:
        """A dense Hugging Face model; its head is tied where it equals the embedding."""
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        from micro.convert.collapse import dense_config

        config = dense_config(self.deltas.config, self._tied())
        with no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.deltas.dtype)
        tensors = {name: produce().clone() for name, _, produce in self._dense_tensors()}
        tensors.setdefault(HEAD, tensors["model." + EMBEDDING])
        model.load_state_dict(tensors, strict=True, assign=True)
        model.tie_weights()
        model.train(False)
        return model

    def save_dense(self, out: str | Path, *, overwrite: bool = False, progress: bool = False) -> Path:
        """Write the dense model with tokenizer files and card, one tensor in memory at a time."""
        from micro.convert.collapse import dense_config

        target = Path(out).expanduser().absolute()
        check_target(target, overwrite)
        config = dense_config(self.deltas.config, self._tied())
        config.architectures = ["LlamaForCausalLM" if self.deltas.config.backbone == "llama" else "Olmo2ForCausalLM"]
        config.dtype = str(self.deltas.dtype).removeprefix("torch.")
        with replace_folder(target, overwrite=overwrite) as beside:
            write_tensors(beside, list(self._dense_tensors()), self.deltas.dtype, progress=progress)
            config.save_pretrained(beside)
            write_rest(self.deltas, beside, self.receipt(), dense=True)
        return target

    def _tied(self) -> bool:
        import torch

        if self.deltas.config.tie_word_embeddings:
            return True
        return torch.equal(self.shared_tensor(HEAD), self.shared_tensor(EMBEDDING))

    def _dense_tensors(self) -> Iterator[Entry]:
        from micro.convert.backbone import dense_key
        from micro.modeling.keys import official_shapes

        shapes, tied = official_shapes(self.deltas.config), self._tied()
        for name in self.deltas.shared:
            key = dense_key(name)
            if key is not None and not (tied and key == HEAD):
                yield key, shapes[name], partial(self.shared_tensor, name)
        for group in self.deltas.groups:
            yield group.dense, group.shape, partial(self.tensor, group)

    # ------------------------------------------------------------------ one expert of the mixture
    def into(self, expert: str | int) -> MiCRoForCausalLM:
        """A copy of the mixture in which the merged weights stand as ``expert``; everything else keeps its bits."""
        index = self._one(expert)
        return rewritten(self.deltas, lambda group, e: self.tensor(group) if e == index else None)

    def save_into(self, expert: str | int, out: str | Path, *, overwrite: bool = False, progress: bool = False) -> Path:
        """As :meth:`into`, written as a folder, one tensor in memory at a time."""
        index = self._one(expert)
        receipt = {**self.receipt(), "into": self.deltas.experts[index]}
        return save_rewritten(
            self.deltas,
            lambda group, e: self.tensor(group) if e == index else None,
            out,
            receipt,
            overwrite=overwrite,
            progress=progress,
        )

    def _one(self, expert: str | int) -> int:
        return self.deltas.indices([expert], "into")[0]


def add(base: Tensor, delta: Tensor, scale: float) -> Tensor:
    """Base + scale * delta in the dtype of the delta, rounded to that of the base; its bits where nothing is added."""
    import torch

    return torch.where(delta == 0, base, (base.to(delta.dtype) + scale * delta).to(base.dtype))


# ---------------------------------------------------------------- mixtures with other experts
Replace = Callable[[Group, int], "Tensor | None"]  # (group, expert) -> its new tensor, None = as it is


def rewritten(deltas: ExpertDeltas, replace: Replace) -> MiCRoForCausalLM:
    """A copy of the mixture in memory with some experts' tensors replaced."""
    import torch

    from micro.convert import load
    from micro.convert.tensors import official_tensors

    given = deltas.mixture.model
    model = load(deltas.mixture.folder) if given is None else copy.deepcopy(given)  # type: ignore[arg-type]
    tensors = official_tensors(model)
    with torch.no_grad():
        for group in deltas.groups:
            for e, key in enumerate(group.keys):
                if (new := replace(group, e)) is not None:
                    tensors[key].copy_(new)
    return model


def save_rewritten(
    deltas: ExpertDeltas,
    replace: Replace,
    out: str | Path,
    receipt: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write the mixture with some experts' tensors replaced, beside and then renamed."""
    target = Path(out).expanduser().absolute()
    check_target(target, overwrite)

    def own(group: Group, e: int) -> Tensor:
        new = replace(group, e)
        return deltas.mixture.get(group.keys[e]) if new is None else new

    def entries() -> Iterator[Entry]:
        from micro.modeling.keys import official_shapes

        shapes = official_shapes(deltas.config)
        for name in deltas.shared:
            yield name, shapes[name], partial(deltas.mixture.shared, name)
        for group in deltas.groups:
            for e, key in enumerate(group.keys):
                yield key, group.shape, partial(own, group, e)

    with replace_folder(target, overwrite=overwrite) as beside:
        write_tensors(beside, list(entries()), deltas.dtype, progress=progress)
        config = copy.deepcopy(deltas.config)
        config.architectures, config.dtype = ["MiCRoForCausalLM"], str(deltas.dtype).removeprefix("torch.")
        config.save_pretrained(beside)
        write_rest(deltas, beside, receipt, dense=False)
    return target


def write_rest(deltas: ExpertDeltas, folder: Path, receipt: Mapping[str, Any], *, dense: bool) -> None:
    """Tokenizer files, generation settings, card and receipt of a written folder."""
    from micro.modeling.companions import RECEIPT as UPCYCLE_RECEIPT
    from micro.modeling.companions import write_companions

    companions = {k: v for k, v in deltas.mixture.companions.items() if not (dense and k == UPCYCLE_RECEIPT)}
    if deltas.mixture.model is not None:
        deltas.mixture.model.generation_config.save_pretrained(folder)
    write_companions(companions, folder)
    (folder / "README.md").write_text(_card(deltas, receipt, dense), encoding="utf-8")
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _card(deltas: ExpertDeltas, receipt: Mapping[str, Any], dense: bool) -> str:
    from types import SimpleNamespace

    from micro.convert.card import collapsed_card
    from micro.modeling.companions import receipt_of

    if dense:
        source: Any = SimpleNamespace(config=deltas.config, upcycle_receipt=receipt_of(deltas.mixture.companions))
        return collapsed_card(source, str(receipt["how"]))
    folder = deltas.mixture.folder
    card = folder / "README.md" if folder is not None else None
    text = card.read_text(encoding="utf-8") if card is not None and card.is_file() else "# Mixture\n"
    return f"{text.rstrip()}\n\n## Changed weights\n\n{receipt['how']} (`{RECEIPT}` holds the settings).\n"


# ---------------------------------------------------------------- files
Entry = tuple[str, tuple[int, ...], Callable[[], "Tensor"]]  # name, shape, function that makes the tensor


def write_tensors(
    folder: Path, entries: list[Entry], dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES, progress: bool = False
) -> None:
    """Write tensors as safetensors while they are made, in shards with an index above ``shard_bytes``.

    The format is a length, a JSON header and the raw bytes: names and shapes are enough to write the header first, so
    that no more than one tensor is in memory.
    """
    from micro.convert.folders import write_json
    from micro.convert.tensors import INDEX, WEIGHTS

    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        need = prod(entry[1]) * dtype.itemsize
        if need > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= need
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with Progress("write", len(entries), unit="tensors", enabled=progress) as bar:
        for file, shard in zip(files, shards, strict=True):
            _write_shard(folder / file, shard, dtype, bar)
    if len(shards) > 1:
        total = sum(prod(entry[1]) * dtype.itemsize for entry in entries)
        weight_map = {entry[0]: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(file: Path, shard: list[Entry], dtype: torch.dtype, bar: Progress) -> None:
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind, end = _TYPES[str(dtype).removeprefix("torch.")], 0
    for name, shape, _ in shard:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape, make in shard:
            tensor = make().detach().to(dtype).cpu().contiguous()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: made a tensor {list(tensor.shape)}, expected {list(shape)}")
            stream.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
            bar.advance()
