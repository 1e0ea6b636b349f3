"""The model card (README.md) of a written folder (ecosystem.md 13, 14)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from micro.estimate import parameters, shape_of

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

_KINDS = {
    "block": "mixture of blocks: every expert is a whole transformer block with its own keys and values",
    "ffn": "mixture of FFNs: attention and norms are shared, every expert is an FFN",
}
# Backbones whose licence is known, by a word in their name (ecosystem.md 14).
_LICENCES = {"smollm2": "apache-2.0", "olmo-2": "apache-2.0", "llama-3.2": "llama3.2", "llama-3.1": "llama3.1"}


def licence_of(source: str, declared: str | None = None) -> str:
    """The licence that a card names: what the source declares, else that of a known backbone, else ``unknown``."""
    if declared and declared.strip():
        return declared.strip().lower()
    return next((licence for word, licence in _LICENCES.items() if word in source.lower()), "unknown")


def naming_note(source: str, licence: str, name: str) -> str | None:
    """What the Llama licences ask of the name of a derived model; None where nothing is to be said."""
    if not licence.startswith("llama") or name.lower().startswith("llama"):
        return None
    return f"{source} is under the {licence} licence, which asks that the name of a derived model starts with 'Llama'"


def model_card(model: MiCRoForCausalLM) -> str:
    """README.md with its YAML header for a mixture; what is not known is written as "unknown"."""
    receipt: dict[str, Any] = model.upcycle_receipt or {}
    source = str(receipt.get("source", "unknown"))
    licence = licence_of(source, receipt.get("licence"))
    parts = [_header(receipt, licence, "micro"), _title(licence), _architecture(model), _origin(receipt), _USAGE]
    return "\n\n".join([*parts, _limits(model, receipt), _CITATION]) + "\n"


def _header(receipt: dict[str, Any], licence: str, library: str) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if receipt.get("base_model"):
        lines.append(f"base_model: {receipt['base_model']}")
    tags = ["tags:", "- moe", "- mixture-of-cognitive-reasoners"]
    return "\n".join([*lines, f"license: {licence}", *tags, "---"])


def _title(licence: str) -> str:
    built = "\n\nBuilt with Llama." if licence.startswith("llama") else ""
    return f"# Mixture of cognitive reasoners{built}"


def _architecture(model: MiCRoForCausalLM) -> str:
    config = model.config
    names = ", ".join(config.expert_names or [])
    counts = parameters(shape_of(config))
    return "\n".join(
        [
            "## Architecture",
            "",
            f"- {_KINDS[config.block_type]}",
            f"- backbone: {config.backbone}, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            f"- experts per layer: {names}; experts per token: {config.num_experts_per_tok}",
            f"- parameters: {counts.total:,} in all, {counts.active:,} active per token",
            f"- router in use: {'yes' if config.use_router else 'no (tokens are routed by labels)'}",
            f"- dtype: {str(model.dtype).removeprefix('torch.')}",
        ]
    )


def _origin(receipt: dict[str, Any]) -> str:
    lines = ["## Origin", ""]
    if not receipt:
        return "\n".join([*lines, "The backbone is unknown: the folder this model came from holds no receipt."])
    lines.append(f"- every expert started as a copy of: {receipt['source']}")
    difference = receipt.get("max_abs_diff")
    checked = "not checked" if difference is None else f"at most {difference:.3g}"
    lines.append(f"- difference of logits from the dense model right after upcycling: {checked}")
    lines.append("- training data: unknown (this card is written with the weights, not by a training run)")
    return "\n".join(lines)


def collapsed_card(source: MiCRoForCausalLM, how: str) -> str:
    """README.md for a dense model that a mixture was collapsed to; ``how`` names the rule."""
    receipt: dict[str, Any] = source.upcycle_receipt or {}
    name = str(receipt.get("source", "unknown"))
    licence = licence_of(name, receipt.get("licence"))
    experts = ", ".join(source.config.expert_names or [])
    body = f"A dense model, collapsed from a mixture of the experts {experts} by the rule: {how}."
    header = _header(receipt, licence, "transformers")
    return "\n\n".join([header, _title(licence), body, _origin(receipt), _CITATION]) + "\n"


_USAGE = """## Usage

```python
import micro
from transformers import AutoTokenizer

model, tokenizer = micro.load("."), AutoTokenizer.from_pretrained(".")
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20, ablate="social")[0]))
```"""


def _limits(model: MiCRoForCausalLM, receipt: dict[str, Any]) -> str:
    lines = ["## Limits", "", "- routing shows which expert computed a token, not how important that expert is"]
    if receipt.get("quantised"):
        lines.append(f"- the weights come from a quantised file ({receipt['quantised']}): no figure for the original")
    if _all_equal(model):
        lines.append("- all experts are equal, as they are before training: routing and steering have no effect")
    return "\n".join(lines)


def _all_equal(model: MiCRoForCausalLM) -> bool:
    """Whether every expert still equals the first one bit for bit."""
    stacks = (p.detach() for name, p in model.named_parameters() if ".blocks." in name)
    return all(bool((stack[1:] == stack[:1]).all()) for stack in stacks)


_CITATION = """## Citation

AlKhamissi et al., "Mixture of Cognitive Reasoners: Modular Reasoning with Brain-Like Specialization", 2025."""
