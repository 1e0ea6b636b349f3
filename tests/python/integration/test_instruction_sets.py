"""Every instruction set that this machine has: the fused layer, the separate operators and the engine give the same
bits, and all sets the same numbers up to rounding.

The set is chosen once per process. One process imports what is slow to import and forks one more for each set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import INSTRUCTION_SETS

SETS = ("plain", "avx2", "avx512", "avx512_bf16")
# Odd sizes: rests of panels of 64 columns, of vectors of 16 and 8, and of blocks of rows.
SHAPE: dict[str, Any] = {
    "hidden_size": 72,
    "intermediate_size": 83,
    "head_dim": 24,
    "vocab_size": 131,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}


def results(model: Any) -> dict[str, torch.Tensor]:
    """Logits of the three paths, which have to agree."""
    ids = torch.randint(0, 131, (3, 21), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        fused = model(ids, use_cache=False).logits
        hooks = [layer.router.in_proj.register_forward_hook(lambda *_: None) for layer in model.model.layers]
        separate = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
    engine = model.engine()
    read = engine.prefill(ids[:, :-1], all_logits=True, chunk=7).logits
    last = engine.decode(ids[:, -1]).logits
    whole = torch.cat([read, last[:, None]], 1).to(fused.dtype)
    assert torch.equal(fused, separate), "the fused layer and the separate operators differ"
    assert torch.equal(fused, whole), "the model and the engine differ"
    out = {"logits": fused}
    if model.dtype != torch.float64:
        out["int8"] = model.engine(weights="int8").prefill(ids, all_logits=True).logits
    return out


def work(isa: str, folder: Path) -> None:
    from small_models import ALL_FOUR, small_model

    from micro._native import core

    assert core.build_info()["isa"] == isa
    torch.set_num_threads(1)
    found = {}
    for backbone, kind in ALL_FOUR:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            try:
                found[backbone, kind, dtype] = results(small_model(backbone, kind, dtype=dtype, **SHAPE))
            except AssertionError as error:
                raise AssertionError(f"{isa}, {backbone}, {kind}, {dtype}: {error}") from error
    torch.save(found, folder / f"{isa}.pt")


def main(folder: Path, sets: list[str]) -> None:
    """A child process for each set."""
    import transformers.modeling_utils  # noqa: F401  # here once, instead of in every child

    for isa in sets:
        child = os.fork()
        if child == 0:
            os.environ["MICRO_ISA"] = isa
            status = 1
            try:
                work(isa, folder)
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
            os._exit(status)
        _, status = os.waitpid(child, 0)
        if status != 0:
            raise SystemExit(1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from micro._native import core

    folder = tmp_path_factory.mktemp("sets")
    sets = SETS[: SETS.index(core.build_info()["isa_best"]) + 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, folder, *sets], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {isa: torch.load(folder / f"{isa}.pt") for isa in sets}


def test_all_paths_agree_on_every_set(found: dict[str, Any]) -> None:
    """The children compared them bit for bit; here only that each of them did."""
    assert all(len(of_set) == 12 for of_set in found.values())


@pytest.mark.parametrize("dtype", INSTRUCTION_SETS, ids=str)
@pytest.mark.parametrize("isa", SETS[1:])
def test_sets_differ_by_rounding_only(isa: str, dtype: torch.dtype, found: dict[str, Any]) -> None:
    if isa not in found:
        pytest.skip(f"this machine has no {isa}")
    bound, share = INSTRUCTION_SETS[dtype]
    for case, want in found["plain"].items():
        for name, logits in want.items() if case[2] == dtype else ():
            distance = (found[isa][case][name].double() - logits.double()).abs().amax(-1) / logits.double().abs().max()
            near = float((distance <= bound).double().mean())
            assert near >= share, f"{case}, {name}: {near:.0%} of the rows, the others up to {float(distance.max())}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
