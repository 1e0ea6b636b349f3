"""Every analysis on official checkpoints: the numbers of the same weights in our own layout."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from dense_models import official_config, official_tensors, write_official
from small_models import small_config

import micro
from micro import analysis, data, deltas, evaluation
from micro.analysis import alignment, circuits
from micro.cli import main as cli
from micro.cli.analysis_common import load_model
from micro.modeling import MiCRoForCausalLM
from micro.testing import tiny_tokenizer

# Both families and both kinds of experts, both revisions; the others differ in names of classes only. All analyses run
# on the first and the last, which have no tensor but embedding, head and router in common; the rest on some.
Layout = tuple[str, str, str, int]  # family, kind, revision, experts per token (2 after stage 2)
LAYOUTS: list[Layout] = [
    ("llama", "block", "r1", 1),
    ("llama", "block", "r2", 2),
    ("llama", "ffn", "r2", 1),
    ("olmo2", "block", "r1", 1),
    ("olmo2", "ffn", "r2", 1),
]
WHOLE = (LAYOUTS[0], LAYOUTS[-1])
SOME = ("routing", "ablation", "localizer", "steering", "attribution", "patching", "deltas", "alignment", "cogbench")
TOKENIZER = tiny_tokenizer()
FIELDS = {
    "vocab_size": len(TOKENIZER),
    "max_position_embeddings": 4096,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
SENTENCES = [
    "Mia hid the key.", "Tom believes her.", "Water freezes at zero degrees.", "Two and three make five.",
    "The verb agrees with its subject.", "Rivers carry sand to the sea.", "She feels sad.", "Iron rusts in the rain.",
    "If it rains, then it is wet.", "He hopes that she is happy.", "The word means large.", "Four is more than two.",
]  # fmt: skip


@dataclass
class Loaded:
    """A folder, and what ``micro.load`` makes of it."""

    folder: Path
    model: MiCRoForCausalLM
    tokenizer: Any = TOKENIZER

    @property
    def unit(self) -> str:
        return "block_output" if self.model.config.is_block else "up"

    @property
    def suite(self) -> analysis.LossSuite:
        return analysis.LossSuite(RECORDS, self.tokenizer)


RECORDS = data.generate(2, split="test", seed=3)


def planted(family: str, kind: str, experts: int = 4) -> dict[str, torch.Tensor]:
    """Tensors under their official names, for the tokenizer's vocabulary."""
    tensors = official_tensors(family, kind, experts=experts)
    generator = torch.Generator().manual_seed(11)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        tensors[name] = 0.2 * torch.randn((len(TOKENIZER), 32), generator=generator)
    for name in tensors:
        if ".gate." in name:
            tensors[name] *= 4  # routers that decide
    return tensors


def official(folder: Path, family: str, kind: str, revision: str, experts: int = 4, **changes: Any) -> Path:
    config = {**official_config(family, kind, revision, experts=experts), **FIELDS, **changes}
    write_official(folder, config, planted(family, kind, experts))
    TOKENIZER.save_pretrained(folder)
    return folder


Both = Callable[[Layout], tuple[Loaded, Loaded]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Layout -> the official folder, and ours, written from a model that never saw it."""

    @functools.cache
    def make(layout: Layout) -> tuple[Loaded, Loaded]:
        family, kind, revision, k = layout
        folder, fields = tmp_path_factory.mktemp("folders"), {**FIELDS, "num_experts_per_tok": k}
        own = MiCRoForCausalLM(small_config(family, kind, intermediate_size=48, rms_norm_eps=1e-5, **fields))
        own.load_state_dict(planted(family, kind))
        own.save_pretrained(folder / "ours")
        TOKENIZER.save_pretrained(folder / "ours")
        official(folder / "official", family, kind, revision, num_experts_per_tok=k)
        first, second = (Loaded(folder / name, micro.load(folder / name)) for name in ("official", "ours"))
        return first, second

    return make


# ---------------------------------------------------------------- the analyses
def agreement(given: Loaded) -> Any:
    other = copy.deepcopy(given.model)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.router.out_proj.weight.copy_(layer.router.out_proj.weight.flip(0))
    models = {"end": given.model, "half": other}
    return analysis.agreement(models, given.tokenizer, RECORDS, null_draws=2, fresh_routers=1, draws=20)


def localized(given: Loaded, **options: Any) -> Any:
    stimuli = analysis.Stimuli("pair", SENTENCES[:6], SENTENCES[6:])
    return analysis.localize(
        given.model, given.tokenizer, stimuli, given.unit, permutations=4, random_draws=20, **options
    )


def aligned(given: Loaded) -> Any:
    pooled = alignment.pooled_activations(
        given.model, given.tokenizer, SENTENCES, point=given.unit, experts=["logic", "social"], layers=[1]
    )
    responses = np.random.default_rng(0).normal(size=(len(SENTENCES), 4))
    return analysis.align(pooled.sets(), responses, folds=3, inner_folds=2, permutations=3, draws=10)


def read(given: Loaded) -> Any:
    words = [sentence.split() for sentence in SENTENCES]
    surprisal = np.concatenate(alignment.word_surprisal(given.model, given.tokenizer, words))
    generator = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "sentence": np.repeat(np.arange(len(words)), [len(some) for some in words]),
            "word": [word for some in words for word in some],
            "time": generator.uniform(200, 400, len(surprisal)),
            "frequency": generator.uniform(1, 9, len(surprisal)),
        }
    )
    return analysis.reading_times(table, {"model": surprisal}, folds=3, permutations=3, draws=20)


def ratings() -> dict[str, list[Any]]:
    return {"sentence": SENTENCES, "mental": np.random.default_rng(1).uniform(1, 7, len(SENTENCES)).tolist()}


def merged(given: Loaded) -> Any:
    ties = deltas.ties(deltas.ExpertDeltas(given.folder), density=0.5)
    return {group.dense: ties.tensor(group) for group in ties.deltas.select(layers=[1])}


def compressed(given: Loaded) -> Any:
    return deltas.LowRank(deltas.ExpertDeltas(given.folder), rank=2).report()


def of_the_harness(given: Loaded) -> Any:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    lm = evaluation.MiCRoLM(str(given.folder), ablate="social", progress=False)
    asked = [("Question: What freezes?\nAnswer:", f" {word}") for word in ("water", "sand")]
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)], disable_tqdm=True)


PAIR = circuits.PromptPair([5, 6, 7, 8], [5, 6, 9, 8], [10], [11])
COGBENCH: dict[str, Any] = {"runs": 2, "draws": 5, "baseline": "published"}
FEW: dict[str, Any] = {"draws": 20}

ANALYSES: dict[str, Callable[[Loaded], Any]] = {
    "routing": lambda m: analysis.routing(m.model, m.tokenizer, RECORDS, **FEW),
    "agreement": agreement,
    "similarity": lambda m: analysis.similarity(m.model, m.tokenizer, SENTENCES[:3], **FEW),
    "selectivity": lambda m: analysis.selectivity(m.model, m.tokenizer, ratings(), permutations=20, **FEW),
    "ablation": lambda m: analysis.ablation(m.model, m.suite, "all", **FEW),
    "shapley": lambda m: analysis.expert_shapley(m.model, m.suite, **FEW),
    "cells": lambda m: analysis.cell_map(m.model, m.suite, random_draws=0),
    "random_cells": lambda m: analysis.random_cells(m.model, m.suite, ["logic"], bootstrap_draws=20),
    "cell_shapley": lambda m: analysis.cell_shapley(m.model, m.suite, ["social"], orders=4),
    "compensation": lambda m: analysis.routing_compensation(m.model, m.suite, **FEW),
    "localizer": localized,
    "localizer_routed": lambda m: localized(m, mode="routed"),
    "lesion": lambda m: analysis.lesion(m.model, m.tokenizer, SENTENCES[:3], localized(m), draws=2),
    "steering": lambda m: analysis.steering_matrix(m.model, m.suite, random_sets=2, **FEW),
    "bias": lambda m: analysis.bias_curves(m.model, m.tokenizer, RECORDS, values=[-2, 2], experts=["world"], **FEW),
    "answers": lambda m: analysis.steered_outputs(m.model, m.tokenizer, ["Why?"], max_new_tokens=4),
    "resonance": lambda m: analysis.tunable_cells(
        m.model, m.tokenizer, SENTENCES[:3], SENTENCES[3:6], top=1, switches=["suppress"], draws=2, permutations=19
    ),
    "attribution": lambda m: analysis.attribution(m.model, m.tokenizer, SENTENCES[:2], shifts=5, random_readers=1),
    "patching": lambda m: circuits.patching(m.model, None, [PAIR], routes="free"),
    "removal": lambda m: circuits.removal(m.model, m.suite, point="block_output", level="cell"),
    "gating": lambda m: circuits.head_gating(m.model, m.tokenizer, RECORDS, steps=2, seeds=[0]),
    "self_repair": lambda m: circuits.self_repair(m.model, None, [([5, 6, 7], [10])]),
    "deltas": lambda m: deltas.compare(deltas.ExpertDeltas(m.folder)),
    "deltas_in_memory": lambda m: deltas.interference(deltas.ExpertDeltas(m.model), rank=2, layers=[1], controls=1),
    "ties": merged,
    "low_rank": compressed,
    "alignment": aligned,
    "reading_times": read,
    "suites": lambda m: evaluation.suites.run(
        m.model, m.tokenizer, tasks=["arithmetic", "facts"], items=3, ablate=["logic"], **FEW
    ),
    "cogbench": lambda m: evaluation.cogbench.run(
        m.model, m.tokenizer, experiments=["horizon", "temporal_discounting"], **COGBENCH
    ),
    "harness": of_the_harness,
}


def told(result: Any, given: Loaded) -> str:
    """Every number as text (NaN is NaN), without what names the folder or the file's configuration."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    content = result.to_dict() if hasattr(result, "to_dict") else result
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "agent"}
    return json.dumps(content, sort_keys=True, default=plain).replace(str(given.folder), "FOLDER")


CASES = [(layout, name) for layout in LAYOUTS for name in (ANALYSES if layout in WHOLE else SOME)]


def shown(layout: Layout) -> str:
    return "-".join(map(str, layout))


@pytest.mark.parametrize(("layout", "name"), CASES, ids=[f"{shown(layout)}-{name}" for layout, name in CASES])
def test_an_official_folder_gives_the_numbers_of_our_own(both: Both, layout: Layout, name: str) -> None:
    loaded = both(layout)
    if name == "self_repair" and layout[:2] == ("olmo2", "ffn"):
        with pytest.raises(ValueError, match="norms the mixture"):
            ANALYSES[name](loaded[0])
        return
    first, second = (told(ANALYSES[name](one), one) for one in loaded)
    assert len(first) > 20
    assert first == second


@pytest.mark.parametrize("layout", WHOLE, ids=shown)
def test_another_weight_is_seen(both: Both, layout: Layout) -> None:
    """The texts that are compared do depend on the model."""
    given = both(layout)[0]
    other = copy.deepcopy(given.model)
    with torch.no_grad():
        weight = other.model.layers[0].blocks.down_proj.weight
        weight.add_(0.2 * torch.randn_like(weight))
    for name in ("ablation", "steering", "removal", "localizer"):
        found = [told(ANALYSES[name](Loaded(given.folder, model)), given) for model in (given.model, other)]
        assert found[0] != found[1], name


# ---------------------------------------------------------------- what official folders do not bring along
def test_a_folder_without_tokenizer_says_what_to_copy(tmp_path: Path) -> None:
    folder = write_official(
        tmp_path / "official", official_config("llama", "block", "r1") | FIELDS, planted("llama", "block")
    )
    with pytest.raises(ValueError, match="no tokenizer in this folder; copy"):
        load_model(folder)


def test_without_a_chat_template_texts_are_analysed_and_records_say_what_is_missing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = official(tmp_path / "official", "llama", "block", "r1")
    model, tokenizer = load_model(folder)
    tokenizer.chat_template = None
    assert analysis.routing(model, tokenizer, SENTENCES, draws=20).samples == len(SENTENCES)
    suite = analysis.TargetSuite(SENTENCES, tokenizer)
    assert analysis.ablation(model, suite, draws=20).rows == ["all"]
    assert analysis.similarity(model, tokenizer, SENTENCES[:2], chat=False, draws=20).to_dict()
    assert analysis.steered_outputs(model, tokenizer, ["Why?"], max_new_tokens=2)
    assert evaluation.suites.run(model, tokenizer, tasks=["facts"], items=2, draws=5).rows
    with pytest.raises(ValueError, match="no chat template"):
        analysis.routing(model, tokenizer, RECORDS)


def test_a_stage_1_checkpoint_says_that_its_router_is_off(tmp_path: Path) -> None:
    model, tokenizer = load_model(official(tmp_path / "official", "llama", "block", "r1", use_router=False))
    with pytest.raises(ValueError, match="use_router=False"):
        analysis.routing(model, tokenizer, SENTENCES)
    with pytest.raises(ValueError, match="use_router=False"):
        analysis.ablation(model, analysis.TargetSuite(SENTENCES, tokenizer), draws=20)


def test_another_number_of_experts_has_names_and_rows_of_its_own(tmp_path: Path) -> None:
    folder = official(tmp_path / "official", "llama", "block", "r1", experts=3)
    model, tokenizer = load_model(folder)
    assert model.config.expert_names == ["expert_0", "expert_1", "expert_2"]
    assert analysis.routing(model, tokenizer, RECORDS, draws=20).accuracy is None
    report = analysis.ablation(model, analysis.LossSuite(RECORDS, tokenizer), draws=20)
    assert report.conditions[1:] == model.config.expert_names
    assert set(report.rows) <= {"logic", "social", "world", "language"}
    [curve] = analysis.bias_curves(model, tokenizer, RECORDS, values=[2], experts=["expert_1"], draws=20)
    assert len(curve["change"][0]) == 4


def test_the_command_takes_three_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = official(tmp_path / "official", "llama", "block", "r1", experts=3)
    data.save_records(RECORDS, tmp_path / "records.jsonl")
    for module in ("ablate", "analysis_common"):
        monkeypatch.setattr(f"micro.cli.{module}.save_figure", lambda figure, path: None)
    arguments = ["--data", str(tmp_path / "records.jsonl"), "-o", str(tmp_path / "out")]
    assert cli.run(["ablate", str(folder), *arguments, "--cells"]) == 0
    content = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert content["conditions"] == ["none", "expert_0", "expert_1", "expert_2"]
