"""What a demo came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from micro.analysis import AblationReport, RoutingReport
    from micro.demo.plan import DemoPlan
    from micro.report import TokenView


@dataclass
class Steered:
    """One prompt with its answers under each steering setting."""

    prompt: str
    answers: dict[str, str]


@dataclass
class DemoResult:
    """Everything that the page and the verdict are made of."""

    plan: DemoPlan
    receipt: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    routing: RoutingReport | None = None
    control: RoutingReport | None = None
    ablation: AblationReport | None = None
    control_ablation: AblationReport | None = None
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    steered: list[Steered] = field(default_factory=list)
    views: list[TokenView] = field(default_factory=list)
    generated: list[TokenView] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gb: float = 0.0
