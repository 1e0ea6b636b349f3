"""A resident process around llama.cpp's Python binding (package llama-cpp-python). Commands and answers are lines of
JSON; it times itself. Imports nothing of ours.

    python llama_worker.py MODEL.gguf THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

BATCH = 512


class Session:
    def __init__(self, binding: Any, path: str, threads: int) -> None:
        self.c = binding
        binding.llama_backend_init()
        model_parameters = binding.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self.model = binding.llama_model_load_from_file(path.encode(), model_parameters)
        parameters = binding.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 8192, BATCH, BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = binding.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError("llama.cpp could not load the model; its messages stand above")
        self.memory = binding.llama_get_memory(self.context)
        self.vocabulary = binding.llama_vocab_n_tokens(binding.llama_model_get_vocab(self.model))
        self.held: list[int] = []

    def feed(self, ids: list[int]) -> None:
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            tokens = (self.c.llama_token * len(part))(*part)
            if self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError("llama_decode failed")

    def last(self) -> Any:
        """Logits of the last token, as a C array; the call waits until they are there."""
        return self.c.llama_get_logits_ith(self.context, -1)

    def clear(self) -> None:
        self.c.llama_memory_clear(self.memory, False)
        self.held = []

    def logits(self, ids: list[int]) -> dict[str, Any]:
        self.clear()
        self.feed(ids)
        return {"logits": self.last()[: self.vocabulary]}

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        self.clear()
        begin = time.perf_counter()
        self.feed(ids)
        self.last()
        return {"seconds": time.perf_counter() - begin}

    def decode(self, ids: list[int], new: int) -> dict[str, Any]:
        """The prompt is not timed. Tokens are given: picking the largest logit in Python would be timed too."""
        if self.held == ids:
            self.c.llama_memory_seq_rm(self.memory, 0, len(ids), -1)
        else:
            self.clear()
            self.feed(ids)
            self.held = ids
        begin = time.perf_counter()
        for token in ids[:new]:
            self.feed([token])
            self.last()
        return {"seconds": time.perf_counter() - begin}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    import llama_cpp

    session = Session(llama_cpp, sys.argv[1], int(sys.argv[2]))
    information = llama_cpp.llama_print_system_info().decode()
    say({"version": f"llama-cpp-python {llama_cpp.__version__}", "system": information})
    for line in sys.stdin:
        command = json.loads(line)
        say(getattr(session, command.pop("do"))(**command))


if __name__ == "__main__":
    main()
