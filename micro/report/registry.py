"""The kinds of results that a report knows: in which order they come, under which heading, and which class reads them.

A new kind is one line here. Classes are named by dotted path and imported when a result of their kind is found.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from micro.analysis.result import Result


@dataclass(frozen=True)
class Kind:
    """One kind of result: ``path`` is ``module:Class``; ``text`` says in a sentence or two what is to be seen.

    ``card``: the part of a model card that shows it, "routing" or "evaluation"; None: it stays in the report.
    """

    path: str
    heading: str
    text: str
    card: str | None = None

    def load_class(self) -> type[Result]:
        """The class, imported now."""
        module, name = self.path.split(":")
        found: type[Result] = getattr(importlib.import_module(module), name)
        return found


# In the order of the page; the key is the class's `name`, which is also the name of its JSON file.
KINDS: dict[str, Kind] = {
    "routing": Kind(
        "micro.analysis.routes.report:RoutingReport",
        "Routing",
        "Which expert is the first choice of a token, over all texts and per layer. Usage is not importance: only an "
        "ablation says what an expert does.",
        card="routing",
    ),
    "agreement": Kind(
        "micro.analysis.routes.agreement_report:AgreementReport",
        "Agreement of checkpoints",
        "How often two checkpoints send a token to the same expert, beside the same checkpoint on other texts and "
        "a freshly drawn router.",
    ),
    "similarity": Kind(
        "micro.analysis.routes.similarity_report:SimilarityReport",
        "Similarity of experts",
        "Cosine similarity of the outputs of two experts on tokens of the same sentences; an expert with itself is the "
        "ceiling of the comparison.",
    ),
    "selectivity": Kind(
        "micro.analysis.routes.selectivity_report:SelectivityReport",
        "Selectivity and human ratings",
        "Does the share of a sentence that an expert takes follow what people say about the sentence?",
    ),
    "ablation": Kind(
        "micro.analysis.ablations.report:AblationReport",
        "Ablation",
        "What each task loses when a set of experts is removed in all layers and its tokens go to the remaining ones.",
        card="evaluation",
    ),
    "routing_compensation": Kind(
        "micro.analysis.ablations.compensation:CompensationReport",
        "Compensation by routing",
        "The harm of an ablation with the intact model's routes replayed and with routes free: the difference is what "
        "later routers make good.",
    ),
    "cells": Kind(
        "micro.analysis.ablations.cells:CellReport",
        "Single cells",
        "What each task loses when one expert of one layer is removed; as controls the worst cell on held-out records, "
        "and whole experts against as many random cells.",
    ),
    "shapley": Kind(
        "micro.analysis.ablations.shapley_report:ShapleyReport",
        "Shapley values",
        "The fair share of each expert in a task's score, exact over all sets of experts, and how pairs interact.",
    ),
    "cell_shapley": Kind(
        "micro.analysis.ablations.cell_shapley_report:CellShapleyReport",
        "Shapley values of cells",
        "In which layers an expert's share of a task's score arises, from sampled orders of its layers.",
    ),
    "localizer": Kind(
        "micro.analysis.localizers.result:LocalizerResult",
        "Localizers",
        "Units that answer more to one kind of stimuli than to its control, and the experts and layers that they stand "
        "in; bands are chance.",
    ),
    "lesion": Kind(
        "micro.analysis.localizers.result:LesionResult",
        "Lesions",
        "What silencing the localized units costs, beside random units outside the mask.",
    ),
    "steering": Kind(
        "micro.analysis.steering.matrix:SteeringReport",
        "Steering",
        "How each task's score changes under each steering set, beside sets of random cells.",
        card="evaluation",
    ),
    "resonance": Kind(
        "micro.analysis.steering.resonance:ResonanceReport",
        "Resonance",
        "Which cells (one expert in one layer) prompts of one kind use more than prompts of another, and what it does "
        "to both to switch those cells, beside random cells.",
    ),
    "attribution": Kind(
        "micro.analysis.steering.attribution:AttributionReport",
        "Router attribution",
        "Which earlier outputs (embedding, attention, feed-forward) decide the routers' logits, beside random routers, "
        "and which cell promotes or inhibits later ones.",
    ),
    "patching": Kind(
        "micro.analysis.circuits.patching:PatchingResult",
        "Activation patching",
        "How much of the difference between a clean and a corrupt prompt each component carries: 1 restores the clean "
        "answer, 0 does nothing.",
    ),
    "removal": Kind(
        "micro.analysis.circuits.removal:RemovalResult",
        "Removal of components",
        "How the score of each task changes when one component is removed.",
    ),
    "gating": Kind(
        "micro.analysis.circuits.gating:GatingResult",
        "Causal head gating",
        "Which attention heads a task needs (facilitating), which harm it (interfering) and which it can do without "
        "(irrelevant), from gates fitted with frozen weights.",
    ),
    "self_repair": Kind(
        "micro.analysis.circuits.repair:RepairResult",
        "Self-repair",
        "How much of a removed component's direct effect later layers make good, with routes replayed and free.",
    ),
    "deltas": Kind(
        "micro.deltas.report:DeltaReport",
        "Expert deltas",
        "How far each expert has moved from the backbone that all of them were copied from, and the angles between the "
        "experts' changes.",
    ),
    "interference": Kind(
        "micro.deltas.report:InterferenceReport",
        "Interference of deltas",
        "How much the experts' changes share directions and would disturb each other in a merge.",
    ),
    "compression": Kind(
        "micro.deltas.report:CompressionReport",
        "Compression of deltas",
        "Sizes and errors of the experts' changes at low rank.",
    ),
    "suites": Kind(
        "micro.evaluation.suites.result:SuitesResult",
        "Task suites",
        "Scores on suites of tasks that need no download, beside chance.",
        card="evaluation",
    ),
    "harness": Kind(
        "micro.evaluation.harness:HarnessResult",
        "LM evaluation harness",
        "Scores of tasks of lm-evaluation-harness.",
        card="evaluation",
    ),
    "cogbench": Kind(
        "micro.evaluation.cogbench.result:CogBenchResult",
        "CogBench",
        "Seven experiments of cognitive psychology; 0 is a random agent, 1 is human.",
        card="evaluation",
    ),
    "alignment": Kind(
        "micro.analysis.alignment.result:AlignmentResult",
        "Brain alignment",
        "How well features of layers and experts predict held-out responses of voxels. The self-test says whether the "
        "metric would have found a known layer; where it fails, no order of layers can be read off.",
        card="evaluation",
    ),
    "reading_times": Kind(
        "micro.analysis.alignment.result:ReadingTimesResult",
        "Reading times",
        "What surprisal adds to length, frequency and spill-over in the log-likelihood of reading times.",
        card="evaluation",
    ),
}
