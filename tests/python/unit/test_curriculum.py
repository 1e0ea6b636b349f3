import json
import math

import pytest

from micro.curriculum import Curriculum, FreezeRule, Stage

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.blocks.q_proj.weight",
    "model.layers.0.router.in_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def learning(curriculum):
    return [name for name in NAMES if curriculum.trainable(name)]


def test_the_package_offers_it():
    import micro

    assert micro.Curriculum is Curriculum
    assert micro.Stage is Stage
    assert micro.FreezeRule is FreezeRule


def test_a_loop_over_the_published_stages():
    curriculum = Curriculum.published([3, 2, 4])
    curriculum.check(NAMES)
    seen = []
    while not curriculum.done:
        seen.append((curriculum.stage, curriculum.step, curriculum.route_by(), curriculum.experts_per_token()))
        curriculum.advance()
    assert seen[:3] == [(0, i, "labels", 2) for i in range(3)]
    assert seen[3:5] == [(1, i, "router", 2) for i in range(2)]
    assert seen[5:] == [(2, i, "router", 1) for i in range(4)]
    with pytest.raises(ValueError, match="the curriculum is done"):
        curriculum.learning_rate()


@pytest.mark.parametrize("freeze, first", [("r1", NAMES[1:2]), (FreezeRule.R2, NAMES[:2] + NAMES[3:])])
def test_what_learns_in_each_stage(freeze, first):
    curriculum = Curriculum.published([1, 1, 1], freeze=freeze)
    assert learning(curriculum) == first
    curriculum.advance()
    assert learning(curriculum) == NAMES[2:3]
    curriculum.advance()
    assert learning(curriculum) == NAMES


def test_names_may_lack_the_prefix():
    curriculum = Curriculum.published([1, 1, 1], freeze=FreezeRule.R1)
    assert curriculum.trainable("layers.7.blocks.input_norm.weight")
    assert not curriculum.trainable("layers.7.router.out_proj.weight")


def test_the_rate_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    steps = 67
    stage = Stage(learning_rate=2e-5)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-5)
    schedule = optimization.get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * steps), steps)
    for step in range(steps + 1):
        assert stage.learning_rate_at(step, steps) == pytest.approx(schedule.get_last_lr()[0], rel=1e-14, abs=1e-20)
        optimizer.step()
        schedule.step()


def test_state_goes_through_json():
    curriculum = Curriculum.version_3([2, 3])
    for _ in range(3):
        curriculum.advance()
    state = json.loads(json.dumps(curriculum.state_dict()))
    other = Curriculum.version_3([2, 3])
    other.load_state_dict(state)
    assert (other.stage, other.step, other.learning_rate()) == (1, 1, curriculum.learning_rate())


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"steps": [2, 4]},
            r"this state belongs to a curriculum with stages \[experts, end_to_end\] of \[2, 4\] steps",
        ),
        ({"names": ["a", "b"]}, "belongs to a curriculum"),
        ({"stage": 5}, "step 0 of stage 5 does not exist"),
        ({"stage": "first"}, "'stage' cannot be 'first'"),
        ({"version": 2}, "version 2 was given"),
        ({"step": None}, "'step' cannot be None"),
    ],
)
def test_a_wrong_state_is_refused(change, words):
    curriculum = Curriculum.version_3([2, 3])
    with pytest.raises(ValueError, match=words):
        curriculum.load_state_dict(curriculum.state_dict() | change)
    with pytest.raises(ValueError, match="'stage' is missing"):
        curriculum.load_state_dict({"version": 1})


def test_a_stage_survives_its_dictionary():
    stage = Stage(
        name="calibrate",
        experts_per_token=2,
        route_by="labels",
        trainable=["experts-router"],
        freeze=FreezeRule.R1,
        kind="ffn",
        learning_rate=3e-3,
        betas=(0.8, 0.9),
        schedule="linear",
        loss_coefficients={"z_loss": 1e-3},
        aux_window="sum",
    )
    again = Stage(**json.loads(json.dumps(stage.as_dict())))
    assert again.as_dict() == stage.as_dict()
    assert again.freeze is FreezeRule.R1
    assert again.betas == (0.8, 0.9)
    assert Curriculum([again], [1]).loss_coefficients() == {"z_loss": 1e-3}
    assert repr(again) == "Stage('calibrate', K=2, route_by='labels', freeze='r1', kind='ffn')"


def test_defaults_are_the_published_settings():
    stage = Stage()
    assert (stage.learning_rate, stage.warmup_ratio, stage.schedule) == (2e-5, 0.03, "cosine")
    assert (stage.betas, stage.eps, stage.weight_decay, stage.max_grad_norm) == ((0.9, 0.999), 1e-8, 0.01, 1.0)
    assert stage.freeze is FreezeRule.R2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"route_by": "label"}, "route_by must be labels or router, got 'label'"),
        ({"schedule": "step"}, "schedule must be cosine or linear or constant, got 'step'"),
        ({"freeze": "r3"}, "freeze must be r1 or r2, got 'r3'"),
        ({"kind": "moe"}, "kind must be block or ffn"),
        ({"aux_window": "max"}, "aux_window must be mean or sum"),
        ({"name": "a", "learning_rate": -1e-5}, "stage 'a': learning_rate must lie in"),
        ({"trainable": []}, "trains nothing"),
        ({"trainable": ["expert"]}, "got 'expert'"),
        ({"loss_coefficients": {"aux": 1.0}}, "got 'aux'"),
    ],
)
def test_a_wrong_stage_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Stage(**arguments)


def test_training_nothing_is_an_error_before_the_run():
    with pytest.raises(ValueError, match="stage 'router' trains nothing: under freeze rule r2 for kind block"):
        Curriculum.published([1, 1, 1]).check(["model.layers.0.blocks.q_proj.weight", "lm_head.weight"])
