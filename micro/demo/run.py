"""The demo's steps, in order."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micro.demo.plan import DemoPlan
from micro.demo.result import DemoResult, Steered
from micro.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from micro.data import Record
    from micro.report import TokenView

SHOWN = 6  # held-out answers drawn as coloured tokens
# What is removed to steer to a domain: language stays, plus one domain (MiCRo, steering).
STEERING = {
    "unsteered": [],
    "logic": ["social", "world"],
    "social": ["logic", "world"],
    "world": ["logic", "social"],
}


def run_demo(plan: DemoPlan, output: str | Path, *, seed: int = 0, say: Callable[[str], None] = print) -> DemoResult:
    """Run the whole demo into ``output``: data, model, results as JSON and CSV, ``report.html``.

    An interrupted demo goes on where its training stood when it is started again with the same settings.

    Args:
        plan: :data:`~micro.demo.FULL`, :data:`~micro.demo.TINY` or an own one.
        output: folder, made if needed. It must be empty or hold the same demo.
        seed: of data, routers and training.
        say: receives one line per event.

    Raises:
        ValueError: ``output`` holds a demo with other settings.
    """
    output = Path(output)
    _claim_folder(output, plan, seed)
    result = DemoResult(plan)
    test = _make_data(plan, output / "data", seed, result, say)
    with _step(result, "backbone", say):
        backbone = _backbone(plan, output, seed, say)
    with _step(result, "upcycle", say):
        result.receipt = _check_upcycling(backbone, seed, say)
    with _step(result, "train", say):
        folder = _train(plan, backbone, output, result, control=False, seed=seed)
    with _step(result, "analyse", say):
        _analyse(folder, test, output, result, seed)
    with _step(result, "generate", say):
        _generate(folder, result, seed)
    with _step(result, "control", say):
        control = _train(plan, backbone, output, result, control=True, seed=seed)
        _analyse_control(control, test, output, result, seed)
        shutil.rmtree(control)  # a gigabyte that nothing needs any more
    result.peak_memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    _finish(output, result)
    return result


def _claim_folder(output: Path, plan: DemoPlan, seed: int) -> None:
    """A folder belongs to one demo: its settings are written first and compared when it is entered again."""
    settings = json.dumps({"plan": asdict(plan), "seed": seed}, indent=1) + "\n"
    path = output / "demo.json"
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        raise ValueError(f"{output}: holds a demo with other settings ({path}); choose another --output or remove it")
    if not path.exists() and output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output}: is not empty and holds no demo; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_text(path, settings)


@contextmanager
def _step(result: DemoResult, name: str, say: Callable[[str], None]) -> Iterator[None]:
    begin = time.monotonic()
    yield
    result.seconds[name] = time.monotonic() - begin
    say(f"{name}: {result.seconds[name]:.0f} s")


def _make_data(plan: DemoPlan, folder: Path, seed: int, result: DemoResult, say: Callable[[str], None]) -> list[Record]:
    from micro.data import bag_of_words_baseline, generate, generate_chat, save_chat, save_records

    folder.mkdir(parents=True, exist_ok=True)
    train = generate(plan.train_records, split="train", seed=seed)
    test = generate(plan.test_records, split="test", seed=seed + 1)
    save_records(train, folder / "train.jsonl")
    save_records(test, folder / "test.jsonl")
    save_chat(generate_chat(plan.chat_records, seed=seed + 2), folder / "chat.jsonl")
    result.baseline = bag_of_words_baseline(train, test).to_json()
    say(f"data: {len(train)} training answers, {len(test)} answers from held-out templates, {plan.chat_records} chats")
    return test


def _backbone(plan: DemoPlan, output: Path, seed: int, say: Callable[[str], None]) -> str:
    if plan.backbone != "tiny":
        return plan.backbone
    from micro.demo.tiny import train_backbone

    return str(train_backbone(output / "backbone", output / "data" / "train.jsonl", seed=seed, say=say))


def _check_upcycling(backbone: str, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Upcycle in float32 and hold the logits against the dense model's, as the receipt records."""
    import micro

    model = micro.upcycle(backbone, seed=seed, verify=True)
    receipt = dict(model.upcycle_receipt or {})
    say(
        f"upcycled {receipt['source']} to four experts: {receipt['parameters']:,} parameters, logits differ from the "
        f"dense model's by at most {receipt['max_abs_diff']:.2g}"
    )
    return receipt


def _train(plan: DemoPlan, backbone: str, output: Path, result: DemoResult, *, control: bool, seed: int) -> Path:
    from micro.training import run

    folder = output / ("control" if control else "run")
    trained = run(
        plan.recipe(backbone, output / "data", control=control, seed=seed), output_dir=folder, resume=folder.exists()
    )
    if trained.model_dir is None:  # Ctrl-C: training has saved its place
        raise KeyboardInterrupt
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    result.metrics["random labels" if control else "MiCRo"] = [json.loads(line) for line in lines if line.strip()]
    return Path(trained.model_dir)


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    import micro

    return micro.load(folder).train(False), AutoTokenizer.from_pretrained(folder)


def _analyse(folder: Path, test: list[Record], output: Path, result: DemoResult, seed: int) -> None:
    from micro.analysis import LossSuite, ablation, routing
    from micro.analysis.routes.views import record_view

    model, tokenizer = _load(folder)
    result.routing = routing(model, tokenizer, test, seed=seed, progress=True)
    result.routing.save(output / "results" / "micro")
    result.ablation = ablation(model, LossSuite(test, tokenizer), seed=seed, progress=True)
    result.ablation.save(output / "results" / "micro")
    result.views = [
        record_view(model, tokenizer, record, f"Held-out answer {i + 1}, teacher-forced")
        for i, record in enumerate(test[:SHOWN])
    ]


def _analyse_control(folder: Path, test: list[Record], output: Path, result: DemoResult, seed: int) -> None:
    from micro.analysis import LossSuite, ablation, routing

    model, tokenizer = _load(folder)
    one = {"experts_per_token": 1}  # the control ends with stage 2, whose models send a token to two experts
    result.control = routing(model, tokenizer, test, controls=one, seed=seed, progress=True)
    result.control_ablation = ablation(model, LossSuite(test, tokenizer), controls=one, seed=seed, progress=True)
    result.control.save(output / "results" / "random_labels")
    result.control_ablation.save(output / "results" / "random_labels")


def _generate(folder: Path, result: DemoResult, seed: int) -> None:
    """One held-out prompt of each domain under all settings, in one batch: steering is an argument per row."""
    import torch

    from micro.analysis.routes.views import trace_view
    from micro.data import generate
    from micro.experts import NAMES

    model, tokenizer = _load(folder)
    tokenizer.padding_side = "left"
    turns = [generate(1, domains=(d,), split="test", seed=seed + 3)[0].messages()[:-1] for d in NAMES]
    prompts = [messages[-1]["content"] for messages in turns]
    chats = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in turns]
    batch = tokenizer(
        [chat for chat in chats for _ in STEERING], return_tensors="pt", padding=True, add_special_tokens=False
    )
    torch.manual_seed(0)
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        ablate=[removed for _ in prompts for removed in STEERING.values()],
        max_new_tokens=result.plan.new_tokens,
        do_sample=False,
        output_routing=True,
    )
    width = batch["input_ids"].shape[1]
    for i, prompt in enumerate(prompts):
        answers = {}
        for j, setting in enumerate(STEERING):
            row = i * len(STEERING) + j
            ids = out.sequences[row].tolist()
            answers[setting] = tokenizer.decode(ids[width:], skip_special_tokens=True).strip()
            if setting == "unsteered":
                first = int((batch["attention_mask"][row] == 0).sum())
                end = width + _length(ids[width:], tokenizer.eos_token_id)
                title = f"Generated answer to a prompt about {NAMES[i]}"
                view = trace_view(title, tokenizer, ids[:end], out.routing, row=row, prompt=width)
                result.generated.append(_from(view, first))
        result.steered.append(Steered(prompt, answers))


def _length(ids: list[int], end: int) -> int:
    """Tokens up to the first end-of-turn token, without it."""
    return ids.index(end) if end in ids else len(ids)


def _from(view: TokenView, first: int) -> TokenView:
    """The view without its first slots, which are padding."""
    view.tokens, view.probs = view.tokens[first:], view.probs[:, first:]
    view.prompt_length -= first
    return view


def _finish(output: Path, result: DemoResult) -> None:
    from micro.demo.page import build_page
    from micro.demo.verdict import verdicts

    summary = {
        "verdicts": [asdict(v) for v in verdicts(result)],
        "receipt": result.receipt,
        "bag_of_words": result.baseline,
        "seconds": result.seconds,
        "peak_memory_gb": result.peak_memory_gb,
        "steered": [asdict(s) for s in result.steered],
    }
    write_text(output / "results" / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    build_page(result).write(output / "report.html")
