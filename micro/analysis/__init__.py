"""From a model to numbers: who is routed where, and what it costs to lose an expert.

    report = analysis.routing(model, tokenizer, records)
    report = analysis.ablation(model, analysis.LossSuite(records, tokenizer))

Every report prints a table, saves JSON and CSV (``.save(folder)``) and draws itself (``.plot()``).
"""

from micro.analysis import circuits
from micro.analysis.ablations.cell_shapley_report import CellShapleyReport, cell_shapley
from micro.analysis.ablations.cells import CellReport, cell_map, few_per_domain
from micro.analysis.ablations.compensation import CompensationReport, routing_compensation
from micro.analysis.ablations.random_cells import random_cells
from micro.analysis.ablations.report import AblationReport, LossSuite, Suite, ablation
from micro.analysis.ablations.scores import ScoreStore
from micro.analysis.ablations.shapley_report import ShapleyReport, expert_shapley
from micro.analysis.alignment import AlignmentResult, ReadingTimesResult, align, reading_times
from micro.analysis.capture import Capture, capture
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
from micro.analysis.routes.agreement_report import AgreementReport, agreement
from micro.analysis.routes.counting import majority_vote, usage_counts
from micro.analysis.routes.report import RoutingReport, routing
from micro.analysis.routes.selectivity_report import SelectivityReport, selectivity
from micro.analysis.routes.similarity_report import SimilarityReport, similarity
from micro.analysis.steering.attribution import AttributionReport, attribution
from micro.analysis.steering.bias import bias_curves
from micro.analysis.steering.matrix import SteeringReport, steered_outputs, steering_matrix
from micro.analysis.steering.resonance import ResonanceReport, TargetSuite, cell_effects, resonance, tunable_cells
from micro.analysis.steering.router_parts import RouterSplit, router_split

__all__ = [
    "AblationReport",
    "AgreementReport",
    "AlignmentResult",
    "AttributionReport",
    "Capture",
    "CellReport",
    "CellShapleyReport",
    "CompensationReport",
    "LesionResult",
    "LocalizerResult",
    "LocalizerTest",
    "LossSuite",
    "ReadingTimesResult",
    "ResonanceReport",
    "RouterSplit",
    "RoutingReport",
    "ScoreStore",
    "SelectivityReport",
    "ShapleyReport",
    "SimilarityReport",
    "SteeringReport",
    "Stimuli",
    "Suite",
    "TargetSuite",
    "ablation",
    "agreement",
    "align",
    "attribution",
    "bias_curves",
    "capture",
    "cell_effects",
    "cell_map",
    "cell_shapley",
    "circuits",
    "expert_shapley",
    "few_per_domain",
    "lesion",
    "localize",
    "localizer_mask",
    "localizer_test",
    "majority_vote",
    "random_cells",
    "reading_times",
    "resonance",
    "router_split",
    "routing",
    "routing_compensation",
    "selectivity",
    "similarity",
    "steered_outputs",
    "steering_matrix",
    "tunable_cells",
    "usage_counts",
]
