"""Evaluation of models on tasks: CogBench's seven experiments.

result = evaluation.cogbench.run(model, tokenizer, output="cogbench")
evaluation.cogbench.score("two_step", "table.csv")
"""

from micro.evaluation import cogbench

__all__ = ["cogbench"]
