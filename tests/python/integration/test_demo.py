"""The demo from start to end at a size of seconds: its parts fit, its folder is whole, a second start goes on."""

import dataclasses
import json

import pytest

from micro.demo import TINY, run_demo, tiny
from micro.demo.plan import StageSize
from micro.demo.verdict import verdicts

PLAN = dataclasses.replace(
    TINY, rows=4, train_records=12, test_records=4, chat_records=4, induce=StageSize(2, 1e-3),
    calibrate=StageSize(2, 1e-3), finish=StageSize(1, 1e-4), control_induce_steps=1, control_calibrate_steps=1,
    new_tokens=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "STEPS", 2)
        yield folder, run_demo(PLAN, folder, say=lambda line: None)


def test_it_upcycles_trains_and_measures(demo):
    _, result = demo
    assert result.receipt["max_abs_diff"] < 1e-4
    assert [line["stage"] for line in result.metrics["MiCRo"]] == ["induce"] * 2 + ["calibrate"] * 2 + ["finish"]
    assert result.routing.samples == result.control.samples == 4
    assert len(result.steered) == 4 and set(result.steered[0].answers) == {"unsteered", "logic", "social", "world"}
    assert [v.prompt_length > 0 for v in result.generated] == [True] * 4


def test_the_folder_is_whole(demo):
    folder, result = demo
    page = (folder / "report.html").read_text()
    for section in ("Claims", "Routing", "Tokens", "Ablation", "Steering", "Training", "Method and limits"):
        assert f">{section}</h2>" in page
    assert page.count("class='tokens'") == len(result.views) + len(result.generated)
    summary = json.loads((folder / "results" / "summary.json").read_text())
    assert [v["holds"] for v in summary["verdicts"]] == [v.holds for v in verdicts(result)]
    assert not (folder / "control" / "model").exists()


def test_verdicts_can_fail(demo):
    _, result = demo
    worse = dataclasses.replace(result.routing, accuracy=0.25, accuracy_interval=[0.2, 0.3])
    claim, _ = verdicts(dataclasses.replace(result, routing=worse))
    assert not claim.holds
    rise = [[0.0, 0.1, 0.1, 0.1, 0.1]] * 4
    rise[0] = [0.0, 0.1, 0.2, 0.0, 0.0]
    wrong = dataclasses.replace(result.ablation, rise=rise)
    assert not verdicts(dataclasses.replace(result, ablation=wrong))[1].holds


def test_another_demo_in_the_same_folder_is_refused(demo):
    folder, _ = demo
    with pytest.raises(ValueError, match="demo with other settings"):
        run_demo(PLAN, folder, seed=1)
