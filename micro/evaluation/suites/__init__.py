"""Offline suites per domain, with intervals, chance, simple rules and ablation bars: nothing is downloaded.

    result = run(model, tokenizer, ablate=True)             # language, logic, social, world
    suite = make("theory_of_mind", tokenizer)               # one of them for micro.analysis.ablation and its like

Items come from own templates (train and test share none), by seed and version. Where their packages are installed:
SyntaxGym (brainscore-language), reasoning-gym, glosses of WordNet (Debian). **Not comparable with published
benchmarks.**
"""

from micro.evaluation.suites.choice import ChoiceSuite
from micro.evaluation.suites.items import Item
from micro.evaluation.suites.result import NOTE, SuitesResult
from micro.evaluation.suites.run import TASKS, make, run
from micro.evaluation.suites.syntaxgym import SyntaxGym

__all__ = ["NOTE", "TASKS", "ChoiceSuite", "Item", "SuitesResult", "SyntaxGym", "make", "run"]
