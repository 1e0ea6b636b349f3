"""Mixture -> dense (model.md 5.7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import dense
from tolerances import UPCYCLED

import micro

FAMILIES = ("llama", "olmo2")
KINDS = ("block", "ffn")
RULES: list[dict[str, Any]] = [
    {"rule": "mean"},
    {"rule": "expert", "expert": "world"},
    {"rule": "weighted", "weights": [0.1, 0.2, 0.3, 0.4]},
]


def _mixture(family: str = "llama", kind: Any = "block", dtype: torch.dtype = torch.float64, experts: int = 4) -> Any:
    """A mixture whose experts all differ."""
    model = micro.upcycle(dense(family, dtype), kind=kind, num_experts=experts, verify=False)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r["rule"])
@pytest.mark.parametrize("experts", [4, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_collapse_undoes_upcycling(rule: dict[str, Any], experts: int, dtype: torch.dtype) -> None:
    backbone = dense("llama", dtype, tie_word_embeddings=True)
    names = ["logic", "social", "world"] + [f"x{i}" for i in range(experts - 3)]
    weights = [1 / 7] * 7 if experts == 7 and "weights" in rule else rule.get("weights")
    back = micro.collapse(
        micro.upcycle(backbone, num_experts=experts, expert_names=names, verify=False), **{**rule, "weights": weights}
    )
    assert type(back) is type(backbone)
    assert back.lm_head.weight is back.model.embed_tokens.weight  # tied again
    want, have = backbone.state_dict(), back.state_dict()
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_the_mixture_under_force(family: str, kind: str) -> None:
    model = _mixture(family, kind)
    ids = torch.randint(97, (2, 20))
    outs = []
    with torch.no_grad():
        for expert in ("social", "language"):
            expected = model(ids, force=expert).logits
            found = micro.collapse(model, "expert", expert=expert)(ids).logits
            assert (found - expected).abs().max() <= UPCYCLED[torch.float64] * expected.abs().max()
            outs.append(found)
    assert (outs[0] - outs[1]).abs().max() > 1e-3


def test_an_expert_for_each_layer() -> None:
    model = _mixture()
    ids = torch.randint(97, (1, 16))
    force = torch.tensor([3, 1]).view(1, 2, 1)
    with torch.no_grad():
        expected = model(ids, force=force).logits
        for choice in (["language", 1], {0: "LN", 1: "theory of mind"}):
            found = micro.collapse(model, "expert", expert=choice)(ids).logits  # type: ignore[arg-type]
            assert (found - expected).abs().max() <= UPCYCLED[torch.float64] * expected.abs().max()


def test_means_are_taken_in_float64() -> None:
    model = _mixture(dtype=torch.float32)
    stack = model.model.layers[1].blocks.down_proj.weight
    mean = micro.collapse(model)
    assert torch.equal(mean.model.layers[1].mlp.down_proj.weight, stack.double().mean(0).float())
    table = torch.tensor([[0.25, 0.25, 0.5, 0.0], [0.0, 0.5, 0.0, 0.5]])
    weighted = micro.collapse(model, "weighted", weights=table)
    want = (0.5 * stack[1].double() + 0.5 * stack[3].double()).float()
    assert torch.equal(weighted.model.layers[1].mlp.down_proj.weight, want)
    named = micro.collapse(model, "weighted", weights={"social": 0.5, "LN": 0.5})
    assert torch.equal(named.model.layers[1].mlp.down_proj.weight, want)


def test_the_head_stays_untied_where_it_differs() -> None:
    model = micro.upcycle(dense("llama", tie_word_embeddings=True), verify=False)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    back = micro.collapse(model)
    assert back.config.tie_word_embeddings is False
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(back.model.embed_tokens.weight, model.lm_head.weight)


def test_the_result_shares_no_memory_and_saves(tmp_path: Path) -> None:
    model = _mixture(dtype=torch.float32)
    back = micro.collapse(model, "expert", expert=0)
    before = model.model.layers[0].blocks.q_proj.weight.clone()
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    assert torch.equal(model.model.layers[0].blocks.q_proj.weight, before)
    micro.convert(model, tmp_path / "mixture")
    dense_again = micro.collapse(tmp_path / "mixture", "expert", expert=0)
    dense_again.save_pretrained(tmp_path / "dense")
    loaded = type(dense_again).from_pretrained(tmp_path / "dense")
    ids = torch.randint(97, (1, 8))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dense_again(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "median"}, "rule 'median'"),
        ({"rule": "expert"}, "expert= belongs to rule 'expert' and is needed"),
        ({"rule": "mean", "expert": 1}, "expert= belongs to rule 'expert'"),
        ({"rule": "mean", "weights": [1, 0, 0, 0]}, "weights= belongs to rule 'weighted'"),
        ({"rule": "expert", "expert": "humour"}, "unknown expert 'humour'"),
        ({"rule": "expert", "expert": "none"}, "names no expert"),
        ({"rule": "expert", "expert": [0, 1, 2]}, "3 entries for 2 layers"),
        ({"rule": "expert", "expert": {0: 1}}, "must name every layer 0..1"),
        ({"rule": "weighted", "weights": [1.0, 1.0, 0, 0]}, "sum to 1"),
        ({"rule": "weighted", "weights": [1.5, -0.5, 0, 0]}, "non-negative"),
        ({"rule": "weighted", "weights": [float("nan"), 1, 0, 0]}, "non-negative"),
        ({"rule": "weighted", "weights": [0.5, 0.5]}, r"shape \[2\], expected \[4\] or \[2,4\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        micro.collapse(micro.upcycle(dense("llama"), verify=False), **arguments)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a MiCRoForCausalLM"):
        micro.collapse(dense("llama"))  # type: ignore[arg-type]
