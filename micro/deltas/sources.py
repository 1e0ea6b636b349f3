"""Tensors of a mixture and of its base, read one at a time: from a model in memory or from the files of a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from micro.modeling import MiCRoConfig, MiCRoForCausalLM
    from micro.modeling.keys import Header

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class FileTensors:
    """Tensors of a folder of safetensors files, mapped into memory and read when they are asked for."""

    def __init__(self, folder: Path, headers: Mapping[str, Header]) -> None:
        self.folder, self.headers = folder, headers
        self._open: dict[Path, Any] = {}

    def __call__(self, name: str) -> Tensor:
        """One tensor under its name on disk; KeyError where there is none."""
        from safetensors import safe_open

        file = self.headers[name].file
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


@dataclass
class Mixture:
    """A mixture of experts as a source of tensors under official names (model.md 5.1-5.3)."""

    config: MiCRoConfig
    get: Callable[[str], Tensor]
    name: str
    model: MiCRoForCausalLM | None = None  # where it is in memory
    folder: Path | None = None
    companions: dict[str, bytes] = field(default_factory=dict)

    def shared(self, name: str) -> Tensor:
        """A tensor outside the experts; the head of a tied model is its embedding."""
        tied = name == HEAD and self.config.tie_word_embeddings
        return self.get(EMBEDDING if tied else name)


def open_mixture(source: MiCRoForCausalLM | str | Path, what: str) -> Mixture:
    """A mixture from a loaded model or from a folder (ours or official), whose tensors stay on disk.

    Raises:
        TypeError: neither a mixture nor a path.
        ValueError: the folder holds something else, or its tensors do not fit its configuration.
    """
    if isinstance(source, (str, Path)):
        return _open_folder(Path(source).expanduser())
    from micro.convert.tensors import official_tensors
    from micro.modeling import MiCRoForCausalLM

    if not isinstance(source, MiCRoForCausalLM):
        raise TypeError(f"{what}: expected a MiCRoForCausalLM or a folder of one, got {type(source).__name__}")
    tensors = official_tensors(source)
    name = str(getattr(source.config, "_name_or_path", "") or type(source).__name__)
    return Mixture(source.config, tensors.__getitem__, name, model=source, companions=dict(source.companions))


def _open_folder(folder: Path) -> Mixture:
    from micro.convert.folders import read_json
    from micro.convert.load import official_config, recognise
    from micro.modeling import MiCRoConfig
    from micro.modeling.companions import read_companions
    from micro.modeling.keys import check_folder, read_headers

    headers = read_headers(folder)
    layout = recognise(headers, folder)
    fields = read_json(folder / "config.json")
    if fields.get("model_type") == MiCRoConfig.model_type:
        config = MiCRoConfig.from_pretrained(folder)
    else:
        config = official_config(fields, layout, headers, folder)
    check_folder(config, folder)
    get = FileTensors(folder, headers)
    return Mixture(config, get, str(folder), folder=folder, companions=read_companions(folder))


def open_base(source: Any, mixture: Mixture) -> tuple[Callable[[str], Tensor], str]:
    """(official name -> tensor of the base, description). The base is a dense model or folder, or a mixture.

    Raises:
        ValueError: a tensor is missing in the base or has another shape.
    """
    from micro.modeling import MiCRoForCausalLM

    is_mixture = isinstance(source, MiCRoForCausalLM)
    if isinstance(source, (str, Path)) and Path(source).expanduser().is_dir():
        from micro.modeling.keys import read_headers

        names = read_headers(Path(source).expanduser())
        is_mixture = not any(name.startswith("model.layers.") for name in names)
    if is_mixture:
        other = open_mixture(source, "base")
        get: Callable[[str], Tensor] = other.shared
        described = f"mixture {other.name}"
    else:
        get, described = _dense(source)
    _check_shapes(get, mixture, described, routers=is_mixture)
    return get, described


def _dense(source: Any) -> tuple[Callable[[str], Tensor], str]:
    """Tensors of a dense model by the official name of a clone of theirs."""
    from micro.convert.backbone import dense_key, open_backbone

    if isinstance(source, (str, Path)) and (folder := Path(source).expanduser()).is_dir():
        from micro.convert.folders import read_json
        from micro.modeling.keys import read_headers

        headers = read_headers(folder)
        read: Callable[[str], Tensor] = FileTensors(folder, headers)
        tied, name = bool(read_json(folder / "config.json").get("tie_word_embeddings")), str(folder)
        tied = tied or HEAD not in headers
    else:
        backbone = open_backbone(source, None, None)
        model: PreTrainedModel = backbone.model
        read_from = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        read, tied, name = read_from.__getitem__, HEAD not in read_from, backbone.name

    def get(official: str) -> Tensor:
        key = dense_key(official)
        if key is None:
            raise KeyError(official)
        return read("model." + EMBEDDING if tied and key == HEAD else key)

    return get, f"dense model {name}"


def _check_shapes(get: Callable[[str], Tensor], mixture: Mixture, described: str, *, routers: bool) -> None:
    from micro.modeling.keys import official_map

    problems = []
    for key, target in official_map(mixture.config).items():
        if ".gate." in key and not routers:
            continue
        if target.expert not in (None, 0):
            continue  # the clones of one layer have one shape
        try:
            shape = tuple(get(key).shape)
        except KeyError:
            problems.append(f"{key} is missing")
            continue
        if shape != target.shape:
            problems.append(f"{key} is {list(shape)}, expected {list(target.shape)}")
    depth = mixture.config.num_hidden_layers
    first = next(key for key in official_map(mixture.config) if key.startswith("layers.0.") and "q_proj" in key)
    with contextlib.suppress(KeyError):
        get(first.replace("layers.0.", f"layers.{depth}.", 1))
        problems.append(f"it has more than {depth} layers")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"base: {described} is not what {mixture.name} was cloned from: {'; '.join(problems[:5])}{more}"
        )
