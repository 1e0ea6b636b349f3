"""What is measured of a trained model, item by item, so that every interval can be recomputed from the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.replication.data import Items
from micro.analysis.batches import token_losses
from micro.analysis.modes import evaluating
from micro.experts import NAMES
from micro.progress import track

if TYPE_CHECKING:
    from transformers import TrainerCallback

Array = NDArray[np.float64]
# What is removed to steer to a domain: language stays, plus one domain (MiCRo, steering).
STEERING = {"logic": ["social", "world"], "social": ["logic", "world"], "world": ["logic", "social"]}
NETWORKS = ("language", "multiple_demand", "theory_of_mind")
TOP_1 = {"experts_per_token": 1}


def conditions(experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> steering arguments: nothing, each expert ablated, each steering set."""
    found: dict[str, dict[str, Any]] = {"none": {}}
    found |= {f"without {name}": {"ablate": [name]} for name in experts}
    return found | {f"towards {name}": {"ablate": removed} for name, removed in STEERING.items()}


@torch.no_grad()
def item_losses(model: Any, items: Items, controls: Mapping[str, Any]) -> Array:
    """Sum of the cross-entropy of each item's tokens in nats, float64 [items]."""
    sums = np.zeros(len(items.items))
    for batch in items.batches:
        losses = token_losses(model, batch, **controls).double().numpy()
        target = np.full(losses.shape, -1)
        target[:, :-1] = batch["items"][:, 1:].numpy()  # slot s predicts the token at s + 1
        np.add.at(sums, target[target >= 0], losses[target >= 0])
    return sums


@torch.no_grad()
def _choices(model: Any, batch: Mapping[str, torch.Tensor]) -> NDArray[np.int64]:
    """First choice of every layer for every token, int64 [L,B,S]; top-1 routing, in all models alike."""
    routing = model.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_routing=True,
        **TOP_1,
    ).routing
    found: NDArray[np.int64] = routing.probs.float().argmax(-1).cpu().numpy()
    return found


def item_routing(model: Any, items: Items) -> NDArray[np.int64]:
    """How many of each item's tokens each expert gets as their first choice, int64 [items,L,E]."""
    config = model.config
    counts = np.zeros((len(items.items), config.num_hidden_layers, config.num_experts), np.int64)
    for batch in items.batches:
        chosen, ids = _choices(model, batch), batch["items"].numpy()
        inside = ids >= 0
        for layer, experts in enumerate(chosen):
            np.add.at(counts, (ids[inside], layer, experts[inside]), 1)
    return counts


def label_routing(model: Any, items: Items) -> NDArray[np.int64]:
    """The same summed over the items of each domain, int64 [domains,L,E]: what matching needs."""
    counts = item_routing(model, items)
    total = np.zeros((len(NAMES), *counts.shape[1:]), np.int64)
    np.add.at(total, items.domains, counts)
    return total


def kept_items(items: Items, per_template: int) -> list[int]:
    """The first items of each template: those whose routes are kept token by token."""
    seen: dict[str, int] = {}
    kept = []
    for index, item in enumerate(items.items):
        seen[item.template] = seen.get(item.template, 0) + 1
        if seen[item.template] <= per_template:
            kept.append(index)
    return kept


def token_routes(model: Any, items: Items, kept: Sequence[int]) -> list[str]:
    """First choices of the kept items' tokens, item after item: one string of digits per layer."""
    place = {item: [] for item in kept}  # type: dict[int, list[NDArray[np.int64]]]
    for batch in items.batches:
        ids = batch["items"].numpy()
        wanted = [item for item in np.unique(ids).tolist() if item in place]
        if not wanted:
            continue
        chosen = _choices(model, batch)
        for item in wanted:
            place[item].append(chosen[:, ids == item])
    joined = np.concatenate([np.concatenate(parts, axis=1) for parts in place.values()], axis=1)
    return ["".join(map(str, row)) for row in joined]


class RouteRecorder:
    """Keeps the routes of held-out tokens at 25, 50, 75 and 100 % of the stage called `stage`; a callback for ``run``.

    What is recorded stands in `folder` at once, so that an interrupted run loses none of it.
    """

    SHARES = (25, 50, 75, 100)

    def __init__(self, stage: str, items: Items, kept: Sequence[int], folder: Path) -> None:
        self.stage, self.items, self.kept, self.folder = stage, items, kept, folder

    def callback(self) -> TrainerCallback:
        """For the `callbacks` of ``micro.training.run``."""
        from transformers import TrainerCallback

        owner = self

        class Record(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                if Path(str(args.output_dir)).name.partition("-")[2] == owner.stage:
                    owner.after_step(int(state.global_step), int(state.max_steps), model)

        return Record()

    def after_step(self, step: int, steps: int, model: Any) -> None:
        """Record if this step ends a quarter of the stage; the model is left as it was."""
        for share in self.SHARES:
            if step == max(1, round(share / 100 * steps)):
                with evaluating(model):
                    routes = token_routes(model, self.items, self.kept)
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{share}.txt").write_text("\n".join(routes) + "\n")

    def recorded(self) -> dict[str, list[str]]:
        """Share -> routes, as far as they were recorded."""
        found = {}
        for share in self.SHARES:
            path = self.folder / f"{share}.txt"
            if path.is_file():
                found[f"{share} %"] = path.read_text().split()
        return found


def fresh_router_routes(model: Any, items: Items, kept: Sequence[int], seed: int) -> list[str]:
    """Routes when all routers are drawn anew; the model keeps its own."""
    from micro.convert.upcycle import initialize_routers

    routers = {name: value.clone() for name, value in model.state_dict().items() if ".router." in name}
    initialize_routers(model, seed)
    found = token_routes(model, items, kept)
    model.load_state_dict(routers, strict=False)
    return found


def localizer_shares(model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Share of the selected units (top 10 %) that each expert holds, per localizer (model.md 9.5). The control is the
    random-label arm, so no labels of stimuli are permuted here.
    """
    from micro.analysis import localize

    found = {}
    for network in NETWORKS:
        result = localize(model, tokenizer, localizer=network, unit="block_output", percent=10, permutations=0)
        found[network] = {
            "selected": result.selected,
            "units": result.units,
            "significant": result.significant,
            "counts": result.counts,
            "stimuli": result.stimuli,
            "source": result.source,
        }
    return found


def measure(
    model: Any, tokenizer: Any, held_out: Items, matching: Items, *, localizers: bool, progress: bool = True
) -> dict[str, Any]:
    """All numbers of one trained model. Only the losses without steering for a dense one."""
    model.train(False)
    routed = hasattr(model.config, "num_experts")
    asked = conditions(NAMES) if routed else {"none": {}}
    losses = {
        name: item_losses(model, held_out, controls)
        for name, controls in track(asked.items(), "held-out loss", total=len(asked), enabled=progress)
    }
    found: dict[str, Any] = {
        "items": {
            "domain": held_out.domains.tolist(),
            "template": [item.template for item in held_out.items],
            "record": [item.record for item in held_out.items],
            "tokens": held_out.counts().tolist(),
        },
        "loss": {name: _rounded(values, 3) for name, values in losses.items()},
    }
    if routed:
        found["routed"] = item_routing(model, held_out).tolist()
        found["matching"] = label_routing(model, matching).tolist()
        if localizers:
            found["localizers"] = localizer_shares(model, tokenizer)
    return found


def domain_losses(model: Any, items: Items) -> dict[str, float]:
    """Held-out loss of each domain in nats per token, without steering: what the backbone had before any arm."""
    sums, counts = item_losses(model, items, {}), items.counts()
    of = {name: items.domains == index for index, name in enumerate(NAMES)}
    return {name: round(float(sums[own].sum() / counts[own].sum()), 4) for name, own in of.items()}


def _rounded(values: Array, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
