"""Evaluation of models on tasks, all under steering.

result = evaluation.cogbench.run(model, tokenizer, output="cogbench")      # seven experiments
result = evaluation.suites.run(model, tokenizer, ablate=True)              # offline suites per domain, with intervals
result = evaluation.harness.run(model, tokenizer, tasks=["arc_easy"])      # lm-evaluation-harness
lm = evaluation.MiCRoLM("my-micro", ablate="social")                       # a model for the harness' own functions
scorer = evaluation.CandidateScorer(model, tokenizer)                      # log-likelihood of candidate answers
"""

from typing import TYPE_CHECKING, Any

from micro.evaluation import cogbench, harness, suites
from micro.evaluation.candidates import CandidateScorer, Score

if TYPE_CHECKING:
    from micro.evaluation.micro_lm import MiCRoLM as MiCRoLM

__all__ = ["CandidateScorer", "Score", "cogbench", "harness", "suites"]


def __getattr__(name: str) -> Any:
    if name == "MiCRoLM":  # a subclass of a class of lm-eval, which is loaded with it
        from micro.evaluation.micro_lm import MiCRoLM

        return MiCRoLM
    raise AttributeError(f"module 'micro.evaluation' has no attribute {name!r}")
