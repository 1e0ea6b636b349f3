"""Models and tasks without a network: the score is a known function of the cells that are removed."""

from types import SimpleNamespace

import numpy as np

from micro.experts import NAMES


def model(experts=NAMES, layers=3, vocab_size=100):
    config = SimpleNamespace(
        expert_names=list(experts), num_experts=len(experts), num_hidden_layers=layers, vocab_size=vocab_size
    )
    return SimpleNamespace(config=config, training=False)


def removed_cells(controls, experts, layers):
    """Bool [L,E]."""
    gone = np.zeros((layers, len(experts)), bool)
    ablate = controls.get("ablate") or []
    per_layer = ablate if isinstance(ablate, dict) else dict.fromkeys(range(layers), ablate)
    for layer, names in per_layer.items():
        for name in names:
            gone[layer, list(experts).index(name)] = True
    return gone


class Planted:
    """``function(removed [L,E], record) -> scores [rows]``; every record has ``items`` items of every row."""

    def __init__(self, function, *, names=("row",), records=10, items=1, experts=NAMES, layers=3, **attributes):
        self.function, self.names, self.records, self.items = function, list(names), records, items
        self.experts, self.layers = experts, layers
        self.calls = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def score(self, model, controls):
        self.calls.append(dict(controls))
        gone = removed_cells(controls, self.experts, self.layers)
        counts = np.full((self.records, len(self.names)), float(self.items))
        scores = [np.broadcast_to(self.function(gone, record), (len(self.names),)) for record in range(self.records)]
        return np.stack(scores) * counts, counts
