"""A small byte-level tokenizer with a chat template, made on the spot: for tests and for `micro demo --tiny`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from micro.errors import require

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

# The order of SmolLM2's first ids: <|im_end|> is 2 (end of text and padding), <file_sep> is 5 (model.md 8.3).
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>")

# Rendered as SmolLM2's template renders (model.md 8.7), with a shorter default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a tiny model<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Text that the default merges are learnt from: a few sentences of each domain, so that common words are one token.
CORPUS = (
    "You are a tiny model that answers the user.\nsystem user assistant",
    (
        "First we add the two numbers, so the sum of 12 and 7 is 19. Then we take away 4, which leaves 15. "
        "If every box holds three pens, then five boxes hold fifteen pens. Therefore the answer is 15."
    ),
    (
        "Mia feels sad because she thinks that Tom has forgotten her birthday. He believes that the key is still in "
        "the drawer, but she knows it was moved. They want to help their friend, and he hopes that she will be happy."
    ),
    (
        "Water freezes at zero degrees because its molecules slow down. Rivers carry sand to the sea, and iron rusts "
        "when it meets air and rain. In the south the winters are mild, and plants grow where there is light."
    ),
    (
        "In other words, the sentence says the same thing with a plural noun. The verb agrees with its subject, and "
        "the word means large. To put it simply, we can write the phrase in the past tense."
    ),
    "What is this, and how does that work? Explain why, who, when and where. Please write a short answer.",
)


def tiny_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with SmolLM2's special tokens and template. No file is read.

    texts: what the merges are learnt from (None: a built-in page). vocab_size: an upper bound; at least 262 (256 bytes
    and six special tokens). Ids are the same on every call.
    Errors: ImportError without the extra `hf`, ValueError for a size below 262.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"tiny_tokenizer: vocab_size must be at least {smallest} (bytes and special tokens), got {vocab_size}"
        )
    for module in ("tokenizers", "transformers"):
        require(module, "hf", "tiny_tokenizer")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
