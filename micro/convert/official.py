"""Write model folders: ours, or with the config and run file that the official classes need (model.md 5.4, 5.8)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from micro.convert.card import model_card
from micro.convert.folders import write_json
from micro.convert.tensors import official_tensors, write_shards
from micro.experts import default_names
from micro.files import replace_folder

if TYPE_CHECKING:
    from micro.modeling import MiCRoConfig, MiCRoForCausalLM

RUN_FILE = "run.yaml"
_VERSION = "4.53.2"  # of transformers, for which the official classes were written
# (revision, kind, family): class name and model type (model.md 5.4). Revision 1 has no FFN class for OLMo-2.
CLASSES = {
    ("r1", "block", "llama"): ("MiCRoLlama", "llama"),
    ("r1", "block", "olmo2"): ("MiCRoOLMo", "olmo2"),
    ("r1", "ffn", "llama"): ("LlamaMoE", "llama"),
    ("r2", "block", "llama"): ("MiCRoLlama", "micro_llama"),
    ("r2", "block", "olmo2"): ("MiCRoOLMo", "olmo2"),
    ("r2", "ffn", "llama"): ("MiCRoLlamaMoE", "micro_llama_moe"),
    ("r2", "ffn", "olmo2"): ("MiCRoOlmoMoE", "micro_olmo_moe"),
}
_FAMILY_WORDS = ("llama", "smollm", "olmo")
# What "everything trains" is called in the run files of either revision (model.md 6.1).
_TRAINABLE = {"r1": ["model", "reasoners", "experts-router"], "r2": ["model", "experts", "experts-router"]}


def convert(
    model_or_folder: MiCRoForCausalLM | str | Path,
    out: str | Path,
    *,
    to: Literal["micro", "official"] = "micro",
    revision: Literal["r1", "r2"] = "r1",
    overwrite: bool = False,
) -> Path:
    """Write a mixture to the folder ``out``, in our format or in that of the official classes.

    The tensors have the official names in both and are written bit for bit. "official" adds an untied head, the class
    name, model type and old field names of ``revision``, and the run file that the official constructor opens; that
    file's absolute path stands in ``config_path``, so change it after moving the folder. The folder is written beside
    and renamed; tokenizer files, generation settings and a model card go with it. Returns the folder.

    Errors: ValueError for a model that the official classes cannot express; FileExistsError for a folder that is not
    empty, unless ``overwrite`` is set and it holds a model.
    """
    from micro.convert.load import load

    if to not in ("micro", "official"):
        raise ValueError(f"convert: to={to!r} must be 'micro' or 'official'")
    if revision not in ("r1", "r2"):
        raise ValueError(f"convert: revision={revision!r} must be 'r1' or 'r2'")
    target = Path(out).expanduser().absolute()
    if isinstance(model_or_folder, (str, Path)):
        if Path(model_or_folder).expanduser().absolute() == target:
            raise ValueError(f"convert: {target} is the source itself; name another folder")
        model = load(model_or_folder)
    else:
        model = model_or_folder
    if to == "official":
        check_expressible(model.config, revision)
        if revision == "r1" and "tokenizer.json" not in model.companions:
            warnings.warn(
                f"{target}: there are no tokenizer files to write, but official classes of revision r1 load the "
                f"tokenizer that {RUN_FILE} names: copy tokenizer files there, or name another folder",
                stacklevel=2,
            )
    with replace_folder(target, overwrite=overwrite) as beside:
        if to == "micro":
            model.save_pretrained(beside, max_shard_size="5GB")
        else:
            _write_official(model, beside, target, revision)
        (beside / "README.md").write_text(model_card(model), encoding="utf-8")
    return target


def save(model: MiCRoForCausalLM, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a mixture in our format, with everything that travels with it; the same as ``convert(..., to="micro")``."""
    return convert(model, out, overwrite=overwrite)


def check_expressible(config: MiCRoConfig, revision: str) -> None:
    """Refuse what the official classes would compute differently; warn of names that their files cannot hold."""
    if (revision, config.block_type, config.backbone) not in CLASSES:
        raise ValueError(
            f"convert: revision {revision} has no class for FFN experts over {config.backbone}; use revision='r2'"
        )
    problems = []
    if config.weight_rule != "renormalized":
        problems.append(f"weight_rule {config.weight_rule!r} (they renormalise)")
    if config.router_hidden_size != config.hidden_size:
        problems.append(f"router_hidden_size {config.router_hidden_size} (theirs is hidden_size {config.hidden_size})")
    if config.backbone == "olmo2" and int(config.head_dim or 0) * config.num_attention_heads != config.hidden_size:
        problems.append(f"head_dim {config.head_dim} (theirs is hidden_size / num_attention_heads)")
    if problems:
        raise ValueError(f"convert: the official classes cannot express {'; '.join(problems)}")
    if config.expert_names != default_names(config.num_experts):
        warnings.warn(
            f"the official format stores no expert names: {config.expert_names} will load as "
            f"{default_names(config.num_experts)}",
            stacklevel=3,
        )


def _write_official(model: MiCRoForCausalLM, folder: Path, target: Path, revision: str) -> None:
    import yaml

    from micro.modeling.companions import write_companions

    write_shards(folder, official_tensors(model, untied=True))
    dtype = str(model.dtype).removeprefix("torch.")
    write_json(folder / "config.json", official_fields(model.config, revision, dtype, target / RUN_FILE))
    run = run_file(model.config, revision, _source(model), target)
    (folder / RUN_FILE).write_text(yaml.safe_dump(run, sort_keys=False, allow_unicode=True), encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    write_companions(model.companions, folder)


def _source(model: MiCRoForCausalLM) -> str:
    """The backbone's name for the run file. Official code tells families by words in it, so one of them is in it."""
    name = str(model.upcycle_receipt["source"]) if model.upcycle_receipt else ""
    return name if any(word in name.lower() for word in _FAMILY_WORDS) else f"micro-{model.config.backbone}"


def official_fields(config: MiCRoConfig, revision: str, dtype: str, run_path: Path) -> dict[str, Any]:
    """The content of an official config.json.

    ``num_hidden_layers`` holds L, also for block models, although official files hold L*E there: the official
    constructor multiplies what it reads by E, and would build L*E layers, most of them random, out of L*E.
    ``backbone_num_layers`` is L in either case, and a loader that goes by it finds the same model.
    """
    name, model_type = CLASSES[revision, config.block_type, config.backbone]
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    copied = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "initializer_range",
        "max_position_embeddings",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "num_experts",
        "num_experts_per_tok",
        "use_router",
        "jitter_noise",
    )
    balancing = (config.loss_coefficients or {}).get("load_balancing_loss", 0.0)
    auxiliary = {"router_aux_loss_coef": balancing, "output_router_logits": balancing != 0}
    return {
        "architectures": [name],
        "model_type": model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "backbone_num_layers": config.num_hidden_layers,
        **{field: getattr(config, field) for field in copied},
        "rope_theta": theta,
        "rope_scaling": scaling,
        **({"mlp_bias": False} if config.backbone == "llama" else {}),
        **(auxiliary if config.block_type == "ffn" else {}),
        "ablate": [],
        "config_path": str(run_path),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "transformers_version": _VERSION,
    }


def run_file(config: MiCRoConfig, revision: str, source: str, target: Path) -> dict[str, Any]:
    """The run file that the official constructor reads; the tokenizer is the folder itself."""
    return {
        "model": source,
        "tokenizer": str(target),
        "num-experts": config.num_experts,
        "top-k-experts": config.num_experts_per_tok,
        "use-router": config.use_router,
        "jitter-noise": config.jitter_noise,
        "trainable": _TRAINABLE[revision],
    }
