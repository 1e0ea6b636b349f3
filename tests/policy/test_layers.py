"""One direction of dependency: kernels <- csrc <- Python, and inside each of them."""

import ast
import re
import subprocess
import sys

import pytest
from sources import ROOT, name, tracked

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)

TORCH = ("torch/", "ATen/", "c10/", "caffe2/")
PYTHON = ("Python.h", "pybind11/", "numpy/")
SLOW = {"torch/extension.h", "torch/all.h", "torch/torch.h"}  # half a minute and a gigabyte per file


def includes(path):
    return INCLUDE.findall(path.read_text())


def cpp(folder):
    return tracked(f"{folder}/*.h", f"{folder}/*.cpp", f"{folder}/*.cu", f"{folder}/*.cuh")


def test_the_patterns_find_what_they_forbid():
    assert INCLUDE.findall('#include <torch/all.h>\n  # include "Python.h"\n// include <x>') == [
        "torch/all.h",
        "Python.h",
    ]
    assert len(cpp("kernels")) > 3
    assert len(cpp("csrc")) > 3


def test_kernels_know_neither_torch_nor_python():
    wrong = [
        (name(p), i) for p in cpp("kernels") + cpp("tests/kernels") for i in includes(p) if i.startswith(TORCH + PYTHON)
    ]
    assert wrong == []


def test_kernels_do_not_include_upward():
    wrong = [(name(p), i) for p in cpp("kernels") for i in includes(p) if i.startswith(("micro/", "ops/", "bindings/"))]
    assert wrong == []


def test_only_the_bindings_know_python():
    files = [p for p in cpp("csrc") if not name(p).startswith("csrc/bindings/")] + cpp("tests/cpp") + cpp("examples")
    assert [(name(p), i) for p in files for i in includes(p) if i.startswith(PYTHON)] == []


def test_no_file_includes_all_of_torch():
    files = cpp("csrc") + cpp("tests") + cpp("examples") + cpp("benchmarks")
    assert [(name(p), i) for p in files for i in includes(p) if i in SLOW] == []


def test_public_headers_mean_the_same_in_every_build():
    for path in cpp("csrc/include"):
        text = path.read_text()
        assert "#pragma once" in text, f"{name(path)}: no include guard"
        conditional = re.findall(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*$", text, re.MULTILINE)
        assert conditional == [], f"{name(path)}: {conditional}"
        assert "micro_kernels" not in text, f"{name(path)}: kernel headers are private"
        assert [i for i in includes(path) if i.startswith(("ops/", "bindings/", *PYTHON))] == [], name(path)


def test_cpp_tests_and_examples_use_public_headers_only():
    private = ("ops/", "bindings/", "micro_kernels/", "common/")
    files = cpp("tests/cpp") + cpp("examples")
    assert [(name(p), i) for p in files for i in includes(p) if i.startswith(private)] == []


# ---- Python ---------------------------------------------------------------------------------------------------------

# A module may import modules of its own rank or below. Packages are named whole.
RANKS = [
    {"_C", "experts", "errors", "files", "progress", "estimate", "cuda"},
    {"_native"},
    {"ops", "curriculum"},
    {"modeling", "engine", "interventions", "optim", "steering", "data"},
    {"convert"},
    {"training"},
    {"analysis", "deltas", "evaluation", "report"},  # report draws for the others and joins what they save
    {"demo"},
    {"cli"},
]
RANK = {module: rank for rank, modules in enumerate(RANKS) for module in modules}
FREE = {"testing", "recipes"}  # testing is used by tests only; recipes hold no code


def imported(path):
    """The modules of micro that a file imports, wherever in the file, as 'micro.x.y'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "micro"}
        elif isinstance(node, ast.ImportFrom) and node.module == "micro":
            found |= {f"micro.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("micro."):
            found.add(node.module)
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name(path)}: relative import"
    return found


def top(module):
    """'micro.modeling.cache' -> 'modeling'; 'micro' -> None: the lazy names belong to nobody's rank."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def modules():
    return [p for p in tracked("micro/*.py") if p.name != "__init__.py" or p.parent != ROOT / "micro"]


def owner(path):
    part = path.relative_to(ROOT / "micro").parts[0]
    return part.removesuffix(".py")


def test_every_module_has_a_rank():
    assert sorted({owner(p) for p in modules()} - set(RANK) - FREE) == []


def test_nothing_imports_upward():
    wrong = []
    for path in modules():
        mine = owner(path)
        if mine in FREE:
            continue
        for module in imported(path):
            other = top(module)
            if other in FREE and mine not in ("cli", "demo", "training"):  # training: the tokenizer of backbone "tiny"
                wrong.append(f"{name(path)} imports {module}, which is for tests")
            elif other in RANK and RANK[other] > RANK[mine]:
                wrong.append(f"{name(path)} ({mine}) imports {module}")
    assert wrong == []


HEAVY = (
    "transformers",
    "datasets",
    "accelerate",
    "pydantic",
    "pyarrow",
    "matplotlib",
    "pandas",
    "scipy",
    "gguf",
    "trl",
)


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement, allowed",
    [
        ("import micro", set()),
        ("import micro; micro.build_info()", {"torch", "numpy"}),
        ("from micro import ops", {"torch", "numpy"}),
        ("from micro import Curriculum", {"torch", "numpy"}),
        ("from micro import optim", {"torch", "numpy"}),
    ],
)
def test_an_import_stays_lean(statement, allowed):
    loaded = loaded_after(statement)
    assert loaded & ({"torch", "numpy", *HEAVY} - allowed) == set()
    assert allowed <= loaded | {"numpy"}


def test_importing_reaches_no_device_and_no_network():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = refuse\n"
        "import micro, micro.modeling, micro.training, micro.convert, micro.data, micro.analysis, torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_one_openmp_runtime_in_the_process():
    code = (
        "import micro, micro.ops, numpy, torch\n"
        "torch.ones(1 << 16).sum()\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(*sorted({m for m in maps if 'libgomp' in m or 'libiomp' in m or 'libomp' in m}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert len(done.stdout.split()) == 1, done.stdout
