"""What it costs to lose experts, sets of them, or cells; Shapley values; routes replayed and free (model.md 9.3).

The names are in :mod:`micro.analysis`; the package is not called ablation because ``analysis.ablation`` is a function.
"""
