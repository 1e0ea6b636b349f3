"""Every operator is a whole slice, every source is built, and no file holds what belongs to one machine."""

import ast
import inspect
import re

import pytest
from sources import ROOT, name, tracked

from micro import _native, ops
from micro.testing import reference

# Operators that live in the slice of another one: a second function of the same header, kernel and test.
SHARED_SLICE = {"moments_": "moments", "rope_table": "rope", "rope_frequencies": "rope"}


def lists(folder):
    """The sources that a CMakeLists.txt names."""
    text = (ROOT / folder / "CMakeLists.txt").read_text()
    return set(re.findall(r"^\s+([\w/]+(?:\.cpp|\.cu)?)$", text, re.MULTILINE))


def mentioned(text, pattern):
    return any(text in path.read_text() for path in tracked(pattern))


def test_the_operators_were_found():
    assert "rms_norm" in _native.operators()
    assert not any(op.endswith("_backward") for op in _native.operators())


@pytest.mark.parametrize("op", _native.operators())
def test_an_operator_is_a_whole_slice(op):
    home = SHARED_SLICE.get(op, op)
    assert (ROOT / f"csrc/include/micro/{home}.h").is_file()
    assert mentioned(f'"{op}(', "csrc/ops/*.cpp"), f"no file of csrc/ops defines {op}"
    assert mentioned(f"ops.{op}(", "tests/python/unit/*.py"), f"no unit test calls micro.ops.{op}"
    if (ROOT / "kernels" / home).is_dir():
        header = f"micro_kernels/{home}.h"
        assert (ROOT / "kernels/include" / header).is_file()
        assert mentioned(header, "tests/kernels/*.cpp"), f"no kernel test includes {header}"
    assert hasattr(reference, op), f"micro/testing/reference.py does not define {op}"
    wrapper = getattr(ops, op, None)
    assert wrapper is not None, f"micro.ops has no wrapper for {op}"
    assert wrapper.__module__.startswith("micro.ops."), f"micro.ops.{op} is not the compiled operator"
    assert wrapper.__doc__, f"micro.ops.{op} has no docstring"


@pytest.mark.parametrize("op", _native.operators())
def test_a_wrapper_has_the_arguments_of_its_definition(op):
    assert list(inspect.signature(getattr(ops, op)).parameters) == list(
        inspect.signature(getattr(reference, op)).parameters
    )


def test_every_definition_has_an_operator():
    public = {n for n, f in vars(reference).items() if inspect.isfunction(f) and f.__module__ == reference.__name__}
    helpers = {n for n in public if n.startswith("_") or n in {"wide"}}
    missing = {n for n in public - helpers if getattr(ops, n, None) is None}
    assert missing == set()


def test_every_source_is_built():
    for folder, patterns in {"kernels": ["kernels/*.cpp", "kernels/*.cu"], "csrc": ["csrc/*.cpp"]}.items():
        listed = lists(folder)
        orphans = [name(p) for p in tracked(*patterns) if str(p.relative_to(ROOT / folder)) not in listed]
        assert orphans == []


def test_every_cpp_test_and_example_is_built():
    listed = lists("tests")
    for kind, suffix in {"kernels": "_test", "cpp": "_test", "fuzz": "_fuzz"}.items():
        bodies = {p.stem.removesuffix(suffix) for p in tracked(f"tests/{kind}/*{suffix}.cpp")}
        assert bodies <= listed, f"tests/CMakeLists.txt does not name {sorted(bodies - listed)}"
    assert {p.stem for p in tracked("examples/*.cpp")} <= lists("examples")


# ---- stubs ----------------------------------------------------------------------------------------------------------


def stub_names():
    """What micro/_C.pyi declares: {'f', 'Class', 'Class.method', ...}."""
    found = set()
    for node in ast.parse((ROOT / "micro" / "_C.pyi").read_text()).body:
        names = declared(node)
        found |= names
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner}" for child in node.body for inner in declared(child)}
    return {n for n in found if not n.split(".")[-1].startswith("_")}


def declared(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {t.id for t in node.targets if isinstance(t, ast.Name)}
    return set()


def test_the_stub_lists_what_the_module_has():
    found = set()
    for key, value in vars(_native.core).items():
        if key.startswith("_"):
            continue
        found.add(key)
        if inspect.isclass(value):
            found |= {f"{key}.{inner}" for inner in vars(value) if not inner.startswith("_")}
    assert stub_names() == {n for n in found if n.split(".")[-1] not in {"name", "value"} or n in stub_names()}


# ---- files ----------------------------------------------------------------------------------------------------------

TEXT = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".cmake", ".yaml", ".yml", ".ipynb", ".in")
CODE = (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh")
MOST_LINES = 650

# Written in pieces, so that this file does not find itself.
FORBIDDEN = {
    "a package registry": re.compile("|".join(["py" + r"pi\.org", "python" + "hosted", r"conda\." + "anaconda"])),
    "a path of one machine": re.compile(r"/" + r"(?:(?:work|root)/|(?:home|Users)/(?!somebody))\w"),
}


def texts():
    own = {".ci/test", ".ci/lint", ".ci/run", "Makefile", "LICENSE"}
    return [p for p in tracked() if p.suffix in TEXT or name(p) in own]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what):
    found = [
        f"{name(path)}:{number}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN[what].search(line)
    ]
    assert found == []


def test_no_file_is_too_long_to_read():
    long = {name(p): n for p in tracked() if p.suffix in CODE and (n := p.read_text().count("\n")) > MOST_LINES}
    assert long == {}


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")
    found = [name(p) for p in tracked() if p.suffix in CODE and marks.search(p.read_text())]
    assert found == []


def test_no_large_or_built_file_is_tracked():
    large = [name(p) for p in tracked() if p.stat().st_size > 1_000_000]
    assert large == []
    assert [name(p) for p in tracked("*.so", "*.whl", "*.safetensors", "*.gguf") if "tests/data" not in name(p)] == []


def test_there_is_one_version():
    import micro

    header = (ROOT / "csrc/include/micro/version.h").read_text()
    assert f'"{micro.__version__}"' in header
    assert f"[{micro.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- README ---------------------------------------------------------------------------------------------------------


def test_the_readme_names_what_exists():
    """The table of analyses: every name behind `analysis.`, and the further names of the same cell."""
    from micro import analysis

    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    cells = [line.rsplit("|", 2)[1] for line in rows if "`analysis." in line]
    names = [n for cell in cells for n in re.findall(r"`(?:analysis)?\.(\w+)`", cell)]
    assert len(names) > 10
    assert [n for n in names if not hasattr(analysis, n)] == []
