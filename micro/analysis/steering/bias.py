"""Graded bias on the routers: how often an expert is chosen for it, and what that does to the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.batches import token_losses
from micro.analysis.inputs import counted
from micro.analysis.modes import evaluating
from micro.analysis.result import plain
from micro.analysis.statistics import Array, bootstrap
from micro.analysis.steering.matrix import mean_change
from micro.analysis.suites import LossSuite, label_names
from micro.progress import Progress

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

BIASES = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
Measured = tuple[Array, Array, Array, Array]  # losses, counts [records,rows]; probability, usage [E]


def bias_curves(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    records: Sequence[Any],
    *,
    experts: Sequence[str] | None = None,
    values: Sequence[float] = BIASES,
    layers: Sequence[int] | None = None,
    max_tokens: int = 2048,
    encode_options: dict[str, Any] | None = None,
    draws: int = 2000,
    seed: int = 0,
    store: ScoreStore | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Router logit of one expert + b in all layers, for several b: how often it is chosen and what that does.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: of the model.
        records: held-out labelled records.
        experts: whose logit is raised; each if not given.
        values: of b, in nats.
        layers: where; all if not given.
        max_tokens: slots per batch.
        encode_options: passed to :func:`micro.data.encode`.
        draws: of the bootstrap over records.
        seed: of the bootstrap.
        store: where what was measured is kept, setting by setting, so that a run that was stopped goes on; in memory if
            not given. It belongs to the model's weights and to the records: those of others are not taken.
        progress: show a bar on stderr.

    Returns:
        One dict per expert, for ``SteeringReport.curves``: expert, values [N]; probability [N] and usage [N]: the
        router's mean probability of the expert and the share of tokens with it among their experts, over tokens that
        predict an answer and over layers; change [N][domains] in log-likelihood, nats per token, against b = 0, with
        interval [N][domains][2]; domains.

    Raises:
        ValueError: texts in place of records, none that can be encoded, or an unknown expert.
    """
    if records and isinstance(records[0], str):
        raise ValueError("bias_curves: needs labelled records, not texts")
    names = list(model.config.expert_names or [])
    chosen = list(experts or names)
    suite = _Answers(
        records, tokenizer, names=label_names(model.config), max_tokens=max_tokens, encode_options=encode_options
    )
    settings = [(name, float(b)) for name in chosen for b in values]
    found = _measured(model, suite, [{}, *(_bias(*setting, layers) for setting in settings)], store, progress)
    free, found = found[0], found[1:]
    out = []
    for i, name in enumerate(chosen):
        some = found[i * len(values) : (i + 1) * len(values)]
        change = mean_change(np.stack([free[0] - sums for sums, *_ in some]), free[1])  # minus a loss
        e = names.index(name)
        low, high = bootstrap(len(records), change, draws=draws, seed=seed)
        out.append(
            {
                "expert": name, "values": [float(b) for b in values], "domains": suite.names,
                "layers": None if layers is None else list(layers),
                "probability": [float(one[2][e]) for one in some], "usage": [float(one[3][e]) for one in some],
                "change": plain(change(np.ones(len(records)))),
                "interval": plain(np.stack([low, high], -1)),
            }
        )  # fmt: skip
    return out


def _bias(expert: str, b: float, layers: Sequence[int] | None) -> dict[str, Any]:
    if b == 0:
        return {}  # changes no bit
    inner = {expert: b}
    return {"bias": inner if layers is None else dict.fromkeys(layers, inner)}


def _measured(
    model: MiCRoForCausalLM,
    suite: _Answers,
    conditions: Sequence[Mapping[str, Any]],
    store: ScoreStore | None,
    progress: bool,
) -> list[Measured]:
    """Losses and routing under each condition; what the store has of both is taken from it."""
    store = ScoreStore() if store is None else store
    about = store.about(model, [suite])[0]
    keys = [(store.key(about, c, "free"), store.key([*about, "routing"], c, "free")) for c in conditions]
    kept = [(store.get(losses), store.get(routing)) for losses, routing in keys]
    wanted = {pair: i for i, pair in reversed(list(enumerate(keys))) if None in kept[i]}  # each once
    with evaluating(model), Progress("bias", len(wanted), unit="settings", enabled=progress) as bar:
        for (losses, routing), i in sorted(wanted.items(), key=lambda item: item[1]):
            sums, counts, probability, usage = suite.routed(model, conditions[i])
            if store.get(losses) is None:  # else they are the matrix', with the same bits or nearly so
                store.put(losses, (sums, counts))
            store.put(routing, (probability, usage))
            bar.advance()
    found: list[Measured] = []
    for losses, routing in keys:
        scores, shares = store.get(losses), store.get(routing)
        assert scores is not None and shares is not None
        found.append((*scores, *shares))
    return found


class _Answers(LossSuite):
    """The loss of the answers, and where their tokens were routed meanwhile."""

    def routed(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> Measured:
        """What ``score`` gives, and of each expert the mean probability and the share of tokens, over layers and tokens
        that predict an answer.
        """
        from micro.modeling.steer import Steering

        sums = np.zeros((self.records, len(self.names)))
        counts = np.zeros_like(sums)
        experts = model.config.num_experts
        probability, usage, tokens = np.zeros(experts), np.zeros(experts), 0
        for records, batch in self._batches:
            steering = Steering.make(model.config, **controls)
            steering.trace = []
            losses = token_losses(model, batch, steering=steering, output_routing=True)
            self._add(sums, counts, records, batch, losses)
            predicting, trace = counted(batch, "predicting"), steering.trace[0]
            probs, ids, weights = (x[:, predicting.to(x.device)] for x in (trace.probs, trace.ids, trace.weights))
            chosen = torch.zeros_like(probs, dtype=torch.float64)
            chosen.scatter_add_(-1, ids.long(), (weights > 0).double())
            probability += probs.double().sum((0, 1)).cpu().numpy()
            usage += chosen.sum((0, 1)).cpu().numpy()
            tokens += probs.shape[0] * probs.shape[1]
        return sums, counts, probability / max(tokens, 1), usage / max(tokens, 1)
