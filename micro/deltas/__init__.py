"""What experts learned, as weights: differences from the base they were cloned from, compared, added, merged, cut.

    deltas = micro.deltas.ExpertDeltas("run/checkpoint", base="HuggingFaceTB/SmolLM2-135M")
    print(micro.deltas.compare(deltas))                        # sizes and angles, per layer and matrix
    micro.deltas.ties(deltas, density=0.2).save_dense("merged")
    micro.deltas.negate(deltas, "social").save_into("social", "without-social")

Folders are read and written tensor by tensor.
"""

from micro.deltas.arithmetic import add, analogy, combine, graft, negate
from micro.deltas.compact import load_compact, save_compact
from micro.deltas.deltas import ExpertDeltas, Group
from micro.deltas.interference import LowRank, decorrelated, interference
from micro.deltas.merged import Merged
from micro.deltas.report import CompressionReport, DeltaReport, InterferenceReport, compare
from micro.deltas.ties import ties

__all__ = [
    "CompressionReport",
    "DeltaReport",
    "ExpertDeltas",
    "Group",
    "InterferenceReport",
    "LowRank",
    "Merged",
    "add",
    "analogy",
    "combine",
    "compare",
    "decorrelated",
    "graft",
    "interference",
    "load_compact",
    "negate",
    "save_compact",
    "ties",
]
