"""Actions on a CUDA device: what they are on the CPU, forward and backward, and changing rows waits for nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pretend_cuda import no_waits
from small_models import ALL_FOUR, random_ids, small_model
from torch import Tensor

from micro import interventions as iv
from micro.modeling import MiCRoForCausalLM

pytestmark = pytest.mark.gpu

# Two layers in float64, sums in another order.
BOUND = 1e-10


def pair(backbone: str = "llama", kind: str = "block") -> tuple[MiCRoForCausalLM, MiCRoForCausalLM]:
    """The same model on the CPU and on the device."""
    model = small_model(backbone, kind)
    return model, copy.deepcopy(model).to("cuda")


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=BOUND, atol=BOUND, equal_nan=True)


def run(model: MiCRoForCausalLM, ids: Tensor, *actions: iv.Action, **options: Any) -> tuple[Tensor, iv.Session]:
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad(), model.intervene(*actions, **options) as session:
        return model(ids.to(model.device), attention_mask=mask.to(model.device)).logits, session


@pytest.mark.parametrize("backbone, kind", ALL_FOUR)
def test_changes_and_reads_are_the_cpus(backbone: str, kind: str) -> None:
    actions = [
        iv.zero("heads", heads=[1]),
        iv.scale("units", 0.5, experts=["logic", "world"], units=[0, 7], positions=[1, 3]),
        iv.shift("residual", torch.linspace(-1, 1, 32, dtype=torch.float64), layers=1, rows=[1]),
        iv.replace("ffn", 0.1, positions=slice(4, 6)),
        *(iv.read(point, name=point) for point in iv.POINTS),
        iv.moments("block_output", covariance=True, name="m"),
    ]
    got, want = (run(model, random_ids(2, 9), *actions, all_experts=True) for model in reversed(pair(backbone, kind)))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 6:] = False
    near(got[0].cpu()[real], want[0][real])
    for point in iv.POINTS:
        mine, theirs = got[1].reading(point), want[1].reading(point)
        assert mine.values.device.type == "cuda"
        near(mine.values, theirs.values)
        assert torch.equal(mine.expert.cpu(), theirs.expert)
        assert torch.equal(mine.slot.cpu(), theirs.slot)
        assert torch.equal(mine.chosen.cpu(), theirs.chosen)
    for part in ("count", "mean", "variance", "covariance"):
        near(getattr(got[1].moments("m"), part), getattr(want[1].moments("m"), part))


@pytest.mark.parametrize("make", [lambda s: iv.replace("ffn", source=s), lambda s: iv.resample("ffn", s, seed=3)])
def test_rows_of_another_run_are_the_cpus(make: Any) -> None:
    cpu, cuda = pair()
    _, source = run(cpu, random_ids(2, 9, seed=5), iv.read("ffn"), all_experts=True)
    action = make(source.reading("ffn"))
    near(run(cuda, random_ids(2, 9), action)[0][1], run(cpu, random_ids(2, 9), action)[0][1])


def test_gradients_of_gates_are_the_cpus() -> None:
    found = []
    for model in pair():
        gate = torch.linspace(0.2, 1.8, 2 * 4 * 4, dtype=torch.float64, device=model.device).view(2, 4, 4, 1)
        gate.requires_grad_()
        ids = random_ids(2, 9).to(model.device)
        with model.intervene(iv.scale("heads", gate)):
            model(ids, labels=ids).loss.backward()
        found.append(gate.grad)
    near(found[1], found[0])


def test_changing_rows_waits_for_nothing() -> None:
    _, cuda = pair()
    ids = random_ids(2, 9).cuda()
    actions = [iv.zero("heads", heads=[1]), iv.scale("units", 0.5, experts="logic"), iv.moments("ffn", name="m")]
    with torch.no_grad(), cuda.intervene(*actions):
        cuda(ids, use_cache=False)
        with no_waits():
            cuda(ids, use_cache=False)
