"""Against llama.cpp on the dense backbone's shape (G5), through its Python binding in a process of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import EngineDecode, EnginePrefill, open_engine
from experiment import BF16, Experiment, MissingError, Table
from goals import Line, Skipped
from jobs import Prefill
from lab import Lab, Models
from outputs import compare
from shapes import SMOLLM2_135M, Shape, prompt
from torch import Tensor

NEW = 64  # tokens
KEYS = ("G5/prefill", "G5/decode")
PACKAGE = "llama-cpp-python"


def write_gguf(models: Models, path: Path) -> None:
    """The dense model in bfloat16. The format pairs rotary components that lie side by side, so the rows of queries
    and keys are put in that order; norm gains are float32 there.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    shape = models.shape
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _tensors(models.dense, shape):
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            data = tensor.to(BF16).contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _tensors(dense: Any, shape: Shape) -> Iterator[tuple[str, Tensor]]:
    yield "token_embd.weight", dense.model.embed_tokens.weight.detach()
    yield "output_norm.weight", dense.model.norm.weight.detach()
    yield "output.weight", dense.lm_head.weight.detach()
    for index, layer in enumerate(dense.model.layers):
        for theirs, name in _NAMES.items():
            tensor = layer.get_submodule(theirs).weight.detach()
            if name in ("attn_q", "attn_k"):
                halves = tensor.view(-1, 2, shape.head_dim // 2, shape.hidden)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            yield f"blk.{index}.{name}.weight", tensor


def require_binding(python: str) -> None:
    """A line that says what to install, before anything is made."""
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False).returncode:
        raise MissingError(f"the package {PACKAGE} is not installed for {Path(python).name}; see --llama-python")


class LlamaCpp:
    """The process that holds the binding; two OpenMP runtimes in one process would wait for each other."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        worker = Path(__file__).with_name("llama_worker.py")
        self.process = subprocess.Popen(
            [python, str(worker), str(model), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process with llama.cpp ended; its messages stand above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._read()

    def prefill(self, ids: list[int]) -> float:
        return float(self.tell(do="prefill", ids=ids)["seconds"])

    def decode(self, ids: list[int], new: int) -> float:
        return float(self.tell(do="decode", ids=ids, new=new)["seconds"])

    def close(self) -> None:
        self.process.communicate()


def llama_cpp(lab: Lab) -> Iterator[Line | Skipped]:
    """Our engine, top-1 over four experts, and the same engine forced to one expert, against the dense model there."""
    models = lab.models(SMOLLM2_135M, BF16)
    ids, new = prompt(models.shape, lab.size(512)), 4 if lab.options.quick else NEW
    try:
        require_binding(lab.options.llama_python)
        engines = {"engine": open_engine(models.ours), "engine fast": open_engine(models.ours, numerics="fast")}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "dense.gguf")
            lab.say("writing the dense model as GGUF")
            write_gguf(models, path)
            with closing(LlamaCpp(lab.options.llama_python, path, lab.options.threads)) as theirs:
                yield from _against(lab, models, engines, theirs, ids, new)
    except MissingError as missing:
        yield from (Skipped(key, str(missing)) for key in KEYS)


def _against(
    lab: Lab, models: Models, engines: dict[str, Any], theirs: LlamaCpp, ids: Tensor, new: int
) -> Iterator[Line]:
    prompt_ids = ids[0].tolist()
    logits = torch.tensor(theirs.tell(do="logits", ids=prompt_ids)["logits"])[None, None]
    forced = Prefill(models.ours, ids, {"force": models.ours.config.expert_names[0]}).outputs()["logits"][:, -1:]
    compared = compare("ours, forced to expert 0, against llama.cpp", {"logits": forced}, {"logits": logits}, BF16)
    own = {"logits": Prefill(models.ours, ids).outputs()["logits"][:, -1:]}
    for name, engine in engines.items():
        compare(f"{name} against forward", EnginePrefill(engine, ids).outputs(), own, BF16)
    sides = {
        **{name: EnginePrefill(engine, ids).seconds for name, engine in engines.items()},
        "llama.cpp": lambda: theirs.prefill(prompt_ids),
        "dense path": Prefill(models.ours, ids, {"force": models.ours.config.expert_names[0]}).seconds,
    }
    bfloat16 = "with" if "AVX512_BF16 = 1" in theirs.about["system"] else "without"
    against = f"llama.cpp, {theirs.about['version']}, {bfloat16} AVX512_BF16"
    table = Table(lab, lab.rounds(sides))
    note = f"forward forced to one expert: {table.rounds.ratio('llama.cpp', 'dense path')}"
    yield table.line("G5/prefill", "engine", "llama.cpp", against, compared, fast="engine fast", note=note)
    sides = {
        **{name: EngineDecode(engine, ids, new).seconds for name, engine in engines.items()},
        "llama.cpp": lambda: theirs.decode(prompt_ids, new),
    }
    table = Table(lab, lab.rounds(sides))
    note = f"{new / table.rounds.median('engine'):.1f} against {new / table.rounds.median('llama.cpp'):.1f} tokens/s"
    yield table.line("G5/decode", "engine", "llama.cpp", against, compared, fast="engine fast", note=note)


EXPERIMENTS = [Experiment("llama_cpp", KEYS, 1.5, llama_cpp)]
