"""A short run of the parsers' fuzz body (tests/fuzz/records_fuzz.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_mutated_files_never_crash_the_parsers() -> None:
    path = Path(__file__).parents[2] / "fuzz" / "records_fuzz.py"
    spec = importlib.util.spec_from_file_location("records_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tried, accepted = module.fuzz(400, seed=1)
    assert tried == 400
    assert 100 < accepted < 390  # otherwise the mutations are too mild or too wild to test anything
