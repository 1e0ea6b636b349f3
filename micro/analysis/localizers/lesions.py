"""Do the units that a localizer found matter? Silence them, and as many others, and compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from micro import interventions as iv
from micro.analysis.batches import IGNORED, batches, shifted, token_losses
from micro.analysis.inputs import input_rows
from micro.analysis.localizers.result import LesionResult, LocalizerResult
from micro.analysis.localizers.statistics import Mask
from micro.analysis.localizers.units import UnitReader
from micro.analysis.modes import evaluating
from micro.analysis.statistics import Array, bootstrap, permutation_p, ratio
from micro.analysis.suites import NATS, LossSuite, Suite, label_names, traits
from micro.progress import track

if TYPE_CHECKING:
    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM

FEWEST_FOR_P = 99  # random masks; below, a p value could not go under 0.01


class TextSuite:
    """Cross-entropy of the tokens of plain texts, in nats per token; one row.

    Raises:
        ValueError: no text of at least two tokens.
    """

    task = "texts"
    higher_is_better = False
    unit = NATS

    def __init__(self, texts: Sequence[str], tokenizer: Any, *, max_tokens: int = 2048) -> None:
        self.names = ["texts"]
        self.records = len(texts)
        self._batches = list(batches(input_rows(texts, tokenizer, "TextSuite"), tokenizer, max_tokens=max_tokens))

    def score(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> tuple[Array, Array]:
        """Sum of the losses and number of predicted tokens of each text, [texts, 1]."""
        sums, counts = np.zeros((self.records, 1)), np.zeros((self.records, 1))
        for records, batch in self._batches:
            sums[records, 0] = token_losses(model, batch, **controls).double().sum(1).numpy()
            counts[records, 0] = (shifted(batch["labels"]) != IGNORED).sum(1).numpy()
        return sums, counts


def silence(model: MiCRoForCausalLM, unit: str, mask: Mask | Tensor) -> iv.Action:
    """The action that sets the units of a mask [L,E,W] to zero: B_e(x) * (1 - mask) for unit "block_output".

    Raises:
        ValueError: the mask does not have the shape of the model's units.
    """
    tensor = torch.as_tensor(mask)
    shape = UnitReader(unit, "all", "mean").shape(model)
    if tuple(tensor.shape) != shape or tensor.dtype != torch.bool:
        raise ValueError(
            f"lesion: the mask must be bool {list(shape)} for the unit {unit!r} of this model, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    if unit == "residual":  # the point's layer l is the stream in front of layer l; units are counted behind it
        tensor = torch.cat([torch.zeros_like(tensor[:1]), tensor])
    return iv.zero(unit, units=tensor)  # type: ignore[arg-type]


def random_masks(mask: Mask, draws: int, *, matched: bool = False, seed: int = 0) -> list[Mask]:
    """``draws`` masks of the same size, of units outside ``mask``; ``matched``: of the same size in every cell.

    Args:
        mask: bool [L,E,W].
        draws: number of masks.
        matched: draw within each (layer, expert).
        seed: of the draws.

    Raises:
        ValueError: too few units outside the mask.
    """
    generator = np.random.default_rng(seed)
    cells = mask.reshape(-1, mask.shape[-1]) if matched else mask.reshape(1, -1)
    for cell, row in enumerate(cells):
        if 2 * row.sum() > len(row):
            where = f"cell {divmod(cell, mask.shape[1])} (layer, expert)" if matched else "the model"
            raise ValueError(
                f"lesion: {int(row.sum())} of {len(row)} units of {where} are selected, so that no control of the same "
                "size lies outside; select fewer units" + (", or use matched=False" if matched else "")
            )
    found = []
    for _ in range(draws):
        drawn = np.zeros_like(cells)
        for row, new in zip(cells, drawn, strict=True):
            new[generator.choice(np.flatnonzero(~row), int(row.sum()), replace=False)] = True
        found.append(drawn.reshape(mask.shape))
    return found


def lesion(
    model: MiCRoForCausalLM,
    tokenizer: Any,
    data: Suite | Sequence[str] | Sequence[Record],
    selected: LocalizerResult | Mask | Tensor,
    *,
    unit: str | None = None,
    draws: int = 20,
    matched: bool = False,
    controls: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LesionResult:
    """Silence selected units and measure the harm, beside random units that were not selected.

    Args:
        model: a MiCRo model of either kind.
        tokenizer: its tokenizer; not used with a suite.
        data: plain texts, labelled records (scored per domain), or any suite of :mod:`micro.analysis.suites`.
        selected: a :class:`LocalizerResult`, or a bool mask [L,E,W].
        unit: which units the mask means; that of the result, else "block_output".
        draws: random masks of the same size outside the mask; at least 20 for a figure, 99 for a p value.
        matched: the random masks have the same number of units in every layer and expert.
        controls: steering arguments, the same in every condition.
        seed: of the random masks and the bootstrap.
        progress: show a bar on stderr.

    Returns:
        A :class:`LesionResult`.

    Raises:
        ValueError: an empty mask, one of another shape, or one that covers more than half of the units.

    Source: AlKhamissi et al. 2024 (the LLM language network), lesions; matching per cell, intervals and p are ours.
    """
    if isinstance(selected, LocalizerResult):
        unit = unit or selected.unit
        selected = _mask_of(selected)
    unit = unit or "block_output"
    mask: Mask = selected.cpu().numpy() if isinstance(selected, Tensor) else np.asarray(selected)
    silence(model, unit, mask)  # checks the shape
    if not mask.any():
        raise ValueError("lesion: no unit is selected")
    if draws < 1:
        raise ValueError(f"lesion: draws must be at least 1, got {draws}")
    suite = _suite(data, tokenizer, label_names(model.config))
    masks = [mask, *random_masks(mask, draws, matched=matched, seed=seed)]
    with evaluating(model):
        base = suite.score(model, dict(controls or {}))
        scores = []
        for silenced in track(masks, "lesion", unit="masks", enabled=progress):
            with model.intervene(silence(model, unit, silenced)):
                scores.append(suite.score(model, dict(controls or {}))[0])
    settings: dict[str, Any] = {"matched": matched, "draws": draws, "seed": seed, "bootstrap_draws": 2000}
    if controls:
        settings["controls"] = {name: str(value) for name, value in controls.items()}
    return LesionResult(
        selected=int(mask.sum()),
        units=mask.size,
        unit=unit,
        settings=settings,
        **_harm(suite, base, np.stack(scores), seed=seed, model=model),
    )


def _mask_of(result: LocalizerResult) -> Mask:
    if result.mask is None:
        raise ValueError("lesion: this result holds no mask; load it from the folder that also holds localizer.npz")
    return result.mask


def _suite(data: Any, tokenizer: Any, names: list[str] | None) -> Suite:
    if hasattr(data, "score"):
        suite: Suite = data
        return suite
    if not data:
        raise ValueError("lesion: data is empty; give texts, records or a suite")
    if isinstance(data, str):
        raise TypeError("lesion: data must be a list of texts, got one string")
    return TextSuite(data, tokenizer) if isinstance(data[0], str) else LossSuite(data, tokenizer, names=names)


def _harm(suite: Suite, base: tuple[Array, Array], scores: Array, *, seed: int, model: Any) -> dict[str, Any]:
    """The fields of a result that the scores decide; scores: sums [1 + masks, records, rows], the lesion first."""
    sums, counts = base
    about = traits(suite, model)
    kept = np.flatnonzero(counts.sum(0) > 0)
    names = [suite.names[k] for k in kept]
    differences = -about.sign * about.factor * (scores - sums)[:, :, kept]
    counts, sums = counts[:, kept], sums[:, kept]
    if len(names) > 1:
        names.append("all")
        differences, sums, counts = (
            np.concatenate([x, x.sum(-1, keepdims=True)], -1) for x in (differences, sums, counts)
        )
    against = differences[0] - differences[1:].mean(0)
    low, high = bootstrap(len(counts), lambda w: ratio(w @ against, w @ counts), seed=seed)
    harm = ratio(differences.sum(1), counts.sum(0))  # [1 + masks, rows]
    enough = len(scores) > FEWEST_FOR_P
    return {
        "rows": names,
        "unlesioned": ratio(sums.sum(0), counts.sum(0)).tolist(),
        "harm": harm[0].tolist(),
        "random": harm[1:].T.tolist(),
        "excess": ratio(against.sum(0), counts.sum(0)).tolist(),
        "excess_interval": np.stack([low, high], -1).tolist(),
        "p": permutation_p(harm[0], harm[1:]).tolist() if enough else None,
        "scale": about.unit if about.factor == 1 else "percentage points",
        "records": int((counts.sum(1) > 0).sum()),
    }
