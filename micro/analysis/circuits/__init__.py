"""Which parts of a model do the work: patching between prompts, removal, head gating, self-repair."""

from micro.analysis.circuits.components import Component, components
from micro.analysis.circuits.gating import GatingResult, head_gating
from micro.analysis.circuits.patching import PatchingResult, patching
from micro.analysis.circuits.prompts import PromptPair
from micro.analysis.circuits.removal import RemovalResult, removal
from micro.analysis.circuits.repair import RepairResult, self_repair

__all__ = [
    "Component",
    "GatingResult",
    "PatchingResult",
    "PromptPair",
    "RemovalResult",
    "RepairResult",
    "components",
    "head_gating",
    "patching",
    "removal",
    "self_repair",
]
