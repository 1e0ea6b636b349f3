"""CogBench: seven experiments of cognitive psychology that a language model plays by completing text.

    result = run(model, tokenizer, experiments=["horizon", "two_step"], preset="clean", output="out")
    print(result)                                   # behaviour and performance, S_BRE with intervals
    score("balloon", "balloon.csv")                 # a table that any engine produced
    run(model, tokenizer, step_by_step=True)        # the model reasons before it answers

Mechanics and metrics: Coda-Forno et al. 2024 (CogBench); prompts and code are our own. ``preset="published"`` keeps the
known slips of the published pipeline for comparison with its numbers, ``"clean"`` does not.
"""

from micro.evaluation.cogbench.agents import Agent, ModelAgent, RandomAgent
from micro.evaluation.cogbench.baselines import HUMAN, METRICS, RANDOM, human_values
from micro.evaluation.cogbench.bre import SBRE, relative_error, s_bre
from micro.evaluation.cogbench.experiment import Experiment, Query
from micro.evaluation.cogbench.registry import EXPERIMENTS
from micro.evaluation.cogbench.result import CogBenchResult
from micro.evaluation.cogbench.run import play, run, summarise
from micro.evaluation.cogbench.scoring import Score, score
from micro.evaluation.cogbench.step_by_step import REASONING_TOKENS, Reasoned, reasoned

__all__ = [
    "EXPERIMENTS",
    "HUMAN",
    "METRICS",
    "RANDOM",
    "REASONING_TOKENS",
    "SBRE",
    "Agent",
    "CogBenchResult",
    "Experiment",
    "ModelAgent",
    "Query",
    "RandomAgent",
    "Reasoned",
    "Score",
    "human_values",
    "play",
    "reasoned",
    "relative_error",
    "run",
    "s_bre",
    "score",
    "summarise",
]
