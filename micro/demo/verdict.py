"""The demo's two claims, and whether the numbers bear them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from micro.demo.result import DemoResult


@dataclass
class Verdict:
    """A claim in words with its numbers, and whether it holds."""

    claim: str
    holds: bool


def verdicts(result: DemoResult) -> list[Verdict]:
    """Both claims on held-out templates: routing follows the labels; ablation hurts the expert's own domain most."""
    return [_routing_claim(result), _ablation_claim(result)]


def _routing_claim(result: DemoResult) -> Verdict:
    ours, control = result.routing, result.control
    assert ours is not None and control is not None
    assert ours.accuracy is not None and ours.accuracy_interval is not None and ours.accuracy_by_layer is not None
    assert control.accuracy is not None and control.accuracy_interval is not None
    chance = 1 / len(ours.experts)
    low, high = ours.accuracy_interval
    control_low, control_high = control.accuracy_interval
    text = (
        f"On held-out templates {ours.accuracy:.3f} [{low:.3f}, {high:.3f}] of the answer tokens are routed to the "
        f"expert of their label (top-1, mean over all layers, balanced over labels, 95 % bootstrap interval over "
        f"{ours.samples} records; best layer {ours.best_layer}: {max(ours.accuracy_by_layer):.3f}). This exceeds "
        f"chance, {chance:.2f}, and the control trained with random labels, {control.accuracy:.3f} [{control_low:.3f}, "
        f"{control_high:.3f}], with disjoint intervals."
    )
    return Verdict(text, low > chance and low > control_high)


def _ablation_claim(result: DemoResult) -> Verdict:
    report = result.ablation
    assert report is not None
    own = report.own_domain_is_worst
    parts = []
    for r, row in enumerate(report.rows):
        c = report.conditions.index(row)
        low, high = report.rise_interval[r][c]
        others = max(rise for i, rise in enumerate(report.rise[r]) if i not in (0, c))
        parts.append(f"{row} {report.rise[r][c]:+.2f} [{low:+.2f}, {high:+.2f}], next {others:+.2f}")
    text = (
        "Ablating an expert raises the loss of its own domain's tokens more than ablating any other expert does "
        f"(nats per token, 95 % paired bootstrap interval): {'; '.join(parts)}."
    )
    return Verdict(text, len(own) == len(report.rows) and all(own.values()))
