"""Names of metrics, and the published values of humans and of the random agent that S_BRE is normalised by."""

from __future__ import annotations

# metric -> (human, random agent), as published.
BEHAVIOUR: dict[str, tuple[float, float]] = {
    "prior weighting": (0.876392, -0.003606),
    "likelihood weighting": (0.912803, 0.019342),
    "directed exploration": (0.325837, -0.044352),
    "random exploration": (0.017441, 0.000996),
    "meta-cognition": (0.765097, 0.663820),
    "learning rate": (0.185417, 0.437773),
    "optimism bias": (0.186343, 0.036133),
    "model-basedness": (0.026288, 0.000926),
    "temporal discounting": (10.3, 9.106),
    "risk taking": (17.222667, 0.991919),
}

# experiment -> (human, random agent): the key "performance" of its score.
PERFORMANCE: dict[str, tuple[float, float]] = {
    "probabilistic_reasoning": (0.870241, 0.655862),
    "horizon": (51.612845, 50.426392),
    "restless_bandit": (54.883903, 49.982804),
    "instrumental": (0.552292, 0.493371),
    "two_step": (0.527000, 0.500100),
    "balloon": (12.8, 0.884848),
}

# The published human value leaves out the largest 5 % of the errors, those of engines and random agent do not.
UNTRIMMED_HUMAN_REASONING = 0.827709

PRESETS = ("clean", "published")
METRICS = tuple(BEHAVIOUR)

Values = dict[str, dict[str, float]]  # {"behaviour": {metric: value}, "performance": {experiment: value}}

HUMAN: Values = {
    "behaviour": {name: human for name, (human, _) in BEHAVIOUR.items()},
    "performance": {name: human for name, (human, _) in PERFORMANCE.items()},
}
RANDOM: Values = {
    "behaviour": {name: random for name, (_, random) in BEHAVIOUR.items()},
    "performance": {name: random for name, (_, random) in PERFORMANCE.items()},
}


def human_values(preset: str) -> Values:
    """Human values for a preset: ``clean`` takes the mean of all errors of probabilistic reasoning, as for engines."""
    check_preset(preset)
    performance = dict(HUMAN["performance"])
    if preset == "clean":
        performance["probabilistic_reasoning"] = UNTRIMMED_HUMAN_REASONING
    return {"behaviour": dict(HUMAN["behaviour"]), "performance": performance}


def check_preset(preset: str) -> None:
    """Raises ValueError for a name that is no preset."""
    if preset not in PRESETS:
        raise ValueError(f"cogbench: preset must be 'clean' or 'published', got {preset!r}")
