"""A mixture on disk as its base and one low-rank delta per expert: about 1.4 times a dense model instead of 4 times.

Layout: ``model.safetensors`` (or shards) holds every tensor outside the experts under its official name and, for each
stack of clones, ``experts/<dense name>.base``, ``.left`` [E,a,k] and ``.right`` [E,b,k], whose product is the delta.
Stacks without a delta of low rank (gains, or k (a + b) >= a b) stand whole in ``experts/<dense name>.stack`` [E, ...].
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.convert.folders import read_json, write_json
from micro.deltas.interference import LowRank, factors_of
from micro.deltas.merged import Entry, add, write_rest, write_tensors
from micro.deltas.sources import FileTensors
from micro.files import check_target, replace_folder

if TYPE_CHECKING:
    from torch import Tensor

    from micro.deltas.deltas import Group
    from micro.modeling import MiCRoForCausalLM

ABOUT = "compact.json"
FORMAT = 1


def is_small(low: LowRank, group: Group) -> bool:
    """Whether two factors are smaller than the matrix itself."""
    return group.is_matrix and low.rank_of(group) * sum(group.shape) < group.shape[0] * group.shape[1]


def save_compact(low: LowRank, out: str | Path, *, overwrite: bool = False, progress: bool = False) -> Path:
    """Write base and factors of a :class:`micro.deltas.LowRank`; :func:`load_compact` makes the mixture again.

    The factors have the dtype of the mixture, so in 16 bits the delta is rounded once more than by ``low.save``.

    Raises:
        FileExistsError: the folder is not empty (``overwrite`` replaces a model folder).
    """
    deltas = low.deltas
    target = Path(out).expanduser().absolute()
    check_target(target, overwrite)
    with replace_folder(target, overwrite=overwrite) as beside:
        write_tensors(beside, list(_entries(low)), deltas.dtype, progress=progress)
        deltas.config.save_pretrained(beside)
        about: dict[str, Any] = {"format": FORMAT, **low.receipt()}
        write_rest(deltas, beside, about, dense=False)
        write_json(beside / ABOUT, about)
    return target


def _entries(low: LowRank) -> Iterator[Entry]:
    from micro.modeling.keys import official_shapes

    deltas, shapes = low.deltas, official_shapes(low.deltas.config)
    count = len(deltas.experts)
    for name in deltas.shared:
        yield name, shapes[name], partial(deltas.mixture.shared, name)
    for group in deltas.groups:
        name = _name(group.dense)
        if not is_small(low, group):
            yield f"{name}.stack", (count, *group.shape), partial(deltas.stack, group)
            continue
        k, (a, b) = low.rank_of(group), group.shape
        yield f"{name}.base", group.shape, partial(deltas.base, group)
        pair = _Pair(low, group)
        yield f"{name}.left", (count, a, k), pair.left
        yield f"{name}.right", (count, b, k), pair.right


def _name(dense: str) -> str:
    """What the tensors of a stack start with; no name that a loader of models would take for its own."""
    return f"experts/{dense.removesuffix('.weight')}"


class _Pair:
    """Both factors of one stack, each with the square root of the singular values: made once, gone after the second."""

    def __init__(self, low: LowRank, group: Group) -> None:
        self.low, self.group = low, group
        self._right: Tensor | None = None

    def left(self) -> Tensor:
        found = factors_of(self.low.deltas, self.group, self.low.rank_of(self.group), seed=self.low.seed)
        root = found.s[:, None].sqrt()
        self._right = found.v * root
        return found.u * root

    def right(self) -> Tensor:
        right, self._right = self._right, None
        assert right is not None, "left is written before right"
        return right


def load_compact(folder: str | Path) -> MiCRoForCausalLM:
    """The mixture of a folder that :func:`save_compact` wrote, with full matrices.

    Raises:
        ValueError: the folder is no such folder, or of a later format.
    """
    import torch
    from transformers.initialization import no_init_weights

    from micro.deltas.deltas import wide_dtype
    from micro.modeling import MiCRoConfig, MiCRoForCausalLM
    from micro.modeling.companions import read_companions
    from micro.modeling.keys import file_dtype, official_map, read_headers

    folder = Path(folder).expanduser()
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder / ABOUT}: format {about.get('format')!r} is not {FORMAT}; it needs a newer version")
    headers = read_headers(folder)
    read, dtype = FileTensors(folder, headers), file_dtype(headers)
    config = MiCRoConfig.from_pretrained(folder)
    with no_init_weights():
        model: Any = MiCRoForCausalLM(config)
    model = model.to(dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, target in official_map(config).items():
            if target.expert is None:
                parameters[target.name].copy_(read(key))
            elif target.expert == 0:
                parameters[target.name].copy_(_stack(read, headers, key, wide_dtype(dtype)))
    model.companions = read_companions(folder)
    loaded: MiCRoForCausalLM = model.eval()
    return loaded


def _stack(read: FileTensors, headers: Any, key: str, wide: Any) -> Tensor:
    """The experts' tensors [E, ...] of the stack that an official key belongs to."""
    from micro.convert.backbone import dense_key

    name = _name(str(dense_key(key)))
    if f"{name}.stack" in headers:
        return read(f"{name}.stack")
    left, right = (read(f"{name}.{side}").to(wide) for side in ("left", "right"))
    return add(read(f"{name}.base")[None], left @ right.mT, 1.0)
