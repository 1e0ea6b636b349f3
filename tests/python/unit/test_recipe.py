"""Recipes: typed checks with file, line and nearest key; settings; inheritance; the bundled files."""

from __future__ import annotations

from pathlib import Path

import pytest

from micro.training import recipe as recipes
from micro.training.recipe import Generate, Recipe, Source, Stage, parse_save_every
from micro.training.schema import RecipeError, apply_overrides

TEXT = """\
backbone: somewhere
learning_rate: 2e-5
losses: {z_loss: 0.1}
datasets:
  reasoning: {generate: {n: 8}}
  chat:
stages:
  - {name: induce, data: reasoning, route_by: labels, trainable: experts, epochs: 2, losses: {}}
  - name: calibrate
    data: [reasoning, {path: other.jsonl, repeat: 2}]
    trainable: routers
    max_steps: 5
    learning_rate: 3e-3
    batch_size: 4
"""


def written(folder: Path, text: str = TEXT) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_stages_inherit_and_override(tmp_path: Path) -> None:
    recipe = recipes.load(written(tmp_path))
    first, second = recipe.stage(0), recipe.stage(1)
    assert recipe.name == "r"
    assert (first.learning_rate, first.batch_size, first.losses) == (2e-5, 32, {})
    assert (second.learning_rate, second.batch_size, second.losses) == (3e-3, 4, {"z_loss": 0.1})
    assert first.sources == [Source(generate=Generate(n=8))]
    assert second.sources == [Source(generate=Generate(n=8)), Source(path="other.jsonl", repeat=2)]
    assert (first.folder, second.folder) == ("1-induce", "2-calibrate")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "learning_rate: 2e-5",
            "lerning_rate: 1",
            r"r\.yaml:2: lerning_rate: unknown key; did you mean 'learning_rate'",
        ),
        (
            "batch_size: 4",
            "batch_sice: 4",
            r"r\.yaml:14: stages\[1\]\.batch_sice: unknown key; did you mean 'batch_size'",
        ),
        ("max_steps: 5", "max_steps: five", r"r\.yaml:12: stages\[1\]\.max_steps: expected a whole number"),
        ("max_steps: 5", "max_steps: true", "expected a whole number"),
        ("max_steps: 5", "", "either `epochs` or `max_steps`"),
        ("trainable: routers", "trainable: router", "expected one of experts, routers, everything, but_routers"),
        ("name: calibrate", "name: induce", "names must differ"),
        ("name: calibrate", "name: a/b", "letters, digits"),
        ("{z_loss: 0.1}", "{zloss: 0.1}", "did you mean 'z_loss'"),
        ("{z_loss: 0.1}", "{label_loss: 0.1}", None),
        ("losses: {}}", "losses: {label_loss: 1}}", "the probabilities would be the labels"),
        ("backbone: somewhere", "kind: block", "the key 'backbone' is missing"),
        ("backbone: somewhere", "backbone: a\nbackbone: b", r"r\.yaml:2: backbone stands twice"),
        ("backbone: somewhere", "backbone: [a", "not valid YAML"),
        ("{generate: {n: 8}}", "{generate: {n: 8}, path: x}", "either `path` or `generate`"),
        ("batch_size: 4", "batch_size: 6\n    micro_batch_size: 4", "no multiple of micro_batch_size"),
        ("batch_size: 4", "experts_per_token: 5", "there are 4 experts"),
        ("learning_rate: 2e-5", "kind: dense", "has no experts"),
        ("learning_rate: 2e-5", "report_to: [tensorbord]", "did you mean 'tensorboard'"),
        ("learning_rate: 2e-5", "save_every: 10x", "save_every"),
        ("learning_rate: 2e-5", "beta2: 1.0", "beta1 and beta2"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    path = written(tmp_path, TEXT.replace(old, new, 1))
    if message is None:
        recipes.load(path)
        return
    with pytest.raises(RecipeError, match=message):
        recipes.load(path)


def test_a_data_set_without_a_file_says_what_to_give(tmp_path: Path) -> None:
    recipe = recipes.load(written(tmp_path), ["stages.0.data=chat"])
    with pytest.raises(RecipeError, match=r"datasets\.chat=PATH"):
        recipe.stage(0)


def test_settings_reach_every_depth(tmp_path: Path) -> None:
    recipe = recipes.load(
        written(tmp_path),
        [
            "stages.calibrate.max_steps=7",
            "stages.0.epochs=3",
            "datasets.chat=c.parquet",
            "encoding.mask=after_first_header",
        ],
    )
    assert (recipe.stages[1].max_steps, recipe.stages[0].epochs) == (7, 3)
    assert recipe.datasets["chat"] == "c.parquet"
    assert recipe.stage(0).encoding == {"mask": "after_first_header"}
    for bad, message in (("seed", "KEY=VALUE"), ("stages.nope.epochs=1", "no entry 'nope'"), ("seed.x=1", "seed")):
        with pytest.raises(RecipeError, match=message):
            recipes.load(written(tmp_path), [bad])


def test_a_setting_of_the_length_takes_the_place_of_the_other_one(tmp_path: Path) -> None:
    recipe = recipes.load(written(tmp_path), ["stages.induce.max_steps=3", "stages.1.epochs=1"])
    assert [(stage.epochs, stage.max_steps) for stage in recipe.stages] == [(None, 3), (1, None)]
    stages = "stages=[{name: other, data: chat, epochs: 1}]"  # what was set before it is gone
    assert recipes.load(written(tmp_path), ["stages.induce.max_steps=3", stages]).stages[0].epochs == 1
    both = ["stages.induce.max_steps=3", "stages.induce.epochs=1"]
    with pytest.raises(RecipeError, match="either `epochs` or `max_steps`"):
        recipes.load(written(tmp_path), both)


def test_overrides_leave_the_original_alone() -> None:
    original = {"a": {"b": [1, {"name": "x", "c": 2}]}}
    changed = apply_overrides(original, ["a.b.x.c=3", "a.d=[1, 2]"])
    assert changed == {"a": {"b": [1, {"name": "x", "c": 3}], "d": [1, 2]}}
    assert original == {"a": {"b": [1, {"name": "x", "c": 2}]}}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("10min", ("seconds", 600.0)),
        ("90s", ("seconds", 90.0)),
        ("1.5h", ("seconds", 5400.0)),
        ("25%", ("share", 0.25)),
        ("epoch", ("epoch", 1.0)),
        (50, ("steps", 50.0)),
        (None, None),
        ("never", None),
    ],
)
def test_save_every(text: str | int | None, meaning: tuple[str, float] | None) -> None:
    assert parse_save_every(text) == meaning


@pytest.mark.parametrize("text", ["0", "-5", "2.5", "120%", "ten", ""])
def test_bad_save_every(text: str) -> None:
    with pytest.raises(ValueError, match="save_every"):
        parse_save_every(text)


@pytest.mark.parametrize("name", recipes.names())
def test_bundled_recipes_are_whole(name: str) -> None:
    """Every bundled recipe resolves once its data are named, and says what it is."""
    missing = [key for key, value in recipes.load(name).datasets.items() if value is None]
    recipe = recipes.load(name, [f"datasets.{key}=file.jsonl" for key in missing])
    stages = [recipe.stage(index) for index in range(len(recipe.stages))]
    assert all(stage.sources for stage in stages)
    assert len(recipes.describe(name)) > 20


def test_published_numbers() -> None:
    """model.md 6.1 and 6.2: batch 32, 2e-5, warm-up 0.03, K and epochs per stage."""
    recipe = recipes.load("micro-1b", ["datasets.reasoning=a", "datasets.chat=b"])
    stages = [recipe.stage(index) for index in range(3)]
    assert [s.epochs for s in stages] == [2, 2, 1]
    assert [s.experts_per_token for s in stages] == [2, 2, 1]
    assert [s.trainable for s in stages] == ["experts", "routers", "everything"]
    assert [s.route_by for s in stages] == ["labels", "router", "router"]
    assert all((s.learning_rate, s.warmup, s.batch_size, s.max_length) == (2e-5, 0.03, 32, 4096) for s in stages)
    assert (recipe.weight_decay, recipe.beta1, recipe.beta2, recipe.eps) == (0.01, 0.9, 0.999, 1e-8)
    assert (recipe.max_grad_norm, recipe.seed, recipe.freeze) == (1.0, 42, "r1")


def test_official_preset_sets_what_is_not_given() -> None:
    stage = Stage(name="a", data="x", epochs=1)
    plain = Recipe(backbone="b", stages=[stage])
    official = Recipe(backbone="b", stages=[stage], preset="official")
    mixed = Recipe(backbone="b", stages=[stage], preset="official", aux_window="mean", freeze_pad_row=False)
    values = [(recipes.aux_window(r), recipes.freeze_pad_row(r)) for r in (plain, official, mixed)]
    assert values == [("mean", False), ("sum", True), ("mean", False)]
    assert official.stage(0).encoding == {"preset": "official"}


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'smoke'"):
        recipes.load("smok")
