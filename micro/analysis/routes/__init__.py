"""Who is routed where: usage, agreement, similarity of experts, selectivity (model.md 9.1, 9.2, 9.6, 9.7).

The names are in :mod:`micro.analysis`; the package is not called routing because ``analysis.routing`` is a function.
"""
