"""From a model to numbers: who is routed where, and what it costs to lose an expert.

    report = analysis.routing(model, tokenizer, records)
    report = analysis.ablation(model, analysis.LossSuite(records, tokenizer))

Every report prints a table, saves JSON and CSV (``.save(folder)``) and draws itself (``.plot()``).
"""

from micro.analysis.ablation_report import AblationReport, LossSuite, Suite, ablation
from micro.analysis.counting import majority_vote, usage_counts
from micro.analysis.localizers import (
    LesionResult,
    LocalizerResult,
    LocalizerTest,
    Stimuli,
    lesion,
    localize,
    localizer_mask,
    localizer_test,
)
from micro.analysis.routing_report import RoutingReport, routing

__all__ = [
    "AblationReport",
    "LesionResult",
    "LocalizerResult",
    "LocalizerTest",
    "LossSuite",
    "RoutingReport",
    "Stimuli",
    "Suite",
    "ablation",
    "lesion",
    "localize",
    "localizer_mask",
    "localizer_test",
    "majority_vote",
    "routing",
    "usage_counts",
]
