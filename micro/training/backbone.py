"""The model and tokenizer that a run starts from, continues with, and writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from micro.training import checkpoints

if TYPE_CHECKING:
    from micro.training.recipe import Recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
TINY = "tiny"


def start(recipe: Recipe) -> tuple[Any, Any]:
    """(model, tokenizer) of a recipe's backbone: upcycled, loaded as it is (a MiCRo folder), or dense.

    Errors: ValueError for a backbone that is missing, of another kind than the recipe's, or without tokenizer.
    """
    dtype = DTYPES[recipe.precision]
    path = Path(recipe.backbone).expanduser()
    if path.is_dir() and _is_mixture(path):
        return _open_mixture(recipe, path, dtype)
    source: Any = recipe.backbone
    tokenizer = None
    if recipe.backbone == TINY:
        source, tokenizer = tiny_backbone(recipe.seed)
    if recipe.kind == "dense":
        from micro.convert.backbone import open_backbone

        backbone = open_backbone(source, dtype, None)
        model, companions = backbone.model, backbone.companions
    else:
        import micro

        model = micro.upcycle(
            source, kind=recipe.kind, num_experts=recipe.num_experts, dtype=dtype, seed=recipe.seed, verify=False
        )
        companions = model.companions
    return model, tokenizer or tokenizer_of(companions, recipe.backbone)


def _is_mixture(folder: Path) -> bool:
    """Whether a folder holds a mixture already, ours or in the official layout."""
    from micro.convert.folders import read_json

    fields = read_json(folder / "config.json")
    return fields.get("model_type") == "micro" or bool(fields.get("num_experts"))


def _open_mixture(recipe: Recipe, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    import micro

    model = micro.load(folder, dtype=dtype)
    if model.config.block_type != recipe.kind or model.config.num_experts != recipe.num_experts:
        raise ValueError(
            f"{folder}: holds {model.config.num_experts} experts of kind {model.config.block_type!r}, but the recipe "
            f"says {recipe.num_experts} of kind {recipe.kind!r}"
        )
    return model, read_tokenizer(folder)


def tokenizer_of(companions: dict[str, bytes], name: str) -> Any:
    """The tokenizer among the files that travel with a model. Errors: ValueError where there is none."""
    from micro.modeling.companions import write_companions

    if not any(file.startswith(("tokenizer", "vocab")) for file in companions):
        raise ValueError(f"{name}: no tokenizer files stand beside the model; a run needs them")
    with tempfile.TemporaryDirectory() as folder:
        write_companions(companions, folder)
        return read_tokenizer(Path(folder))


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def reopen(folder: Path, recipe: Recipe) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that a run wrote: a stage's model or a checkpoint."""
    if recipe.kind == "dense":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[recipe.precision]), read_tokenizer(folder)
    import micro

    return micro.load(folder), read_tokenizer(folder)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """A model folder that is whole or not there, with the tokenizer beside the weights."""
    with checkpoints.writing(folder) as beside, quiet_transformers():
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's own bars ("Writing model shards"): a run shows one bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tiny_backbone(seed: int) -> tuple[Any, Any]:
    """A random Llama-shaped model of 0.1 M parameters and a byte-level tokenizer: for trying a recipe in seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from micro.testing.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
