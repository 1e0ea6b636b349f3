"""A small dense backbone, trained on the spot: what ``micro demo --tiny`` upcycles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
VOCABULARY, STEPS, ROWS, RATE = 1024, 150, 8, 4e-3


def train_backbone(folder: Path, records: Path, *, seed: int, say: Callable[[str], None]) -> Path:
    """Train a dense Llama of 0.5 M parameters on the training answers and write it as a Hugging Face folder.

    Args:
        folder: written whole or not at all; kept if it is there.
        records: labelled records; their labels are not used.
        seed: of the weights and the order of the rows.
        say: receives one line with the loss.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from micro.data import load_records
    from micro.files import replace_folder
    from micro.testing import tiny_tokenizer

    if folder.is_dir():
        return folder
    answers = load_records(records)
    tokenizer = tiny_tokenizer((m["content"] for r in answers for m in r.messages()), vocab_size=VOCABULARY)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    model = LlamaForCausalLM(config)
    first, last = _train(model, _batches(answers, tokenizer, seed))
    say(f"dense backbone: {STEPS} steps, loss {first:.2f} to {last:.2f} nats per token")
    with replace_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    return folder


def _batches(records: list[Any], tokenizer: Any, seed: int) -> Iterator[dict[str, Any]]:
    import torch

    from micro.data import Collator, encode

    rows = [row for record in records if (row := encode(record, tokenizer, max_length=256)) is not None]
    generator = torch.Generator().manual_seed(seed)
    collate = Collator(tokenizer)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for i in range(0, len(order) - ROWS + 1, ROWS):
            batch = collate([rows[j] for j in order[i : i + ROWS]])
            batch.pop("routing_labels")
            yield batch


def _train(model: Any, batches: Iterator[dict[str, Any]]) -> tuple[float, float]:
    """Plain AdamW with a linear decay; returns the first and the last loss."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


def tiny_checkpoint(folder: str | Path, *, seed: int = 0, say: Callable[[str], None] = print) -> Path:
    """A trained MiCRo model of two million parameters, to try things on: made once, about a minute on two cores.

    Args:
        folder: made if needed; holds ``model/`` (weights and tokenizer), ``data/train.jsonl`` and ``data/test.jsonl``
            (answers from held-out templates). A finished one is returned at once, an interrupted one goes on.
        seed: of data, weights and training.
        say: receives one line per event.

    Returns:
        ``folder``.
    """
    from micro.data import generate, generate_chat, save_chat, save_records
    from micro.demo.plan import TINY
    from micro.training import run

    folder = Path(folder)
    if (folder / "model").is_dir():
        return folder
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    save_records(generate(TINY.train_records, split="train", seed=seed), data / "train.jsonl")
    save_records(generate(TINY.test_records, split="test", seed=seed + 1), data / "test.jsonl")
    save_chat(generate_chat(TINY.chat_records, seed=seed + 2), data / "chat.jsonl")
    backbone = train_backbone(folder / "backbone", data / "train.jsonl", seed=seed, say=say)
    recipe = TINY.recipe(str(backbone), data, control=False, seed=seed)
    trained = run(recipe, output_dir=folder / "run", resume=(folder / "run").exists())
    if trained.model_dir is None:  # Ctrl-C: training has saved its place
        raise KeyboardInterrupt
    Path(trained.model_dir).rename(folder / "model")
    return folder
