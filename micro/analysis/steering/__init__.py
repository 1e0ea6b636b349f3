"""What steering changes, which cells answer to prompts, and what the routers read (model.md 9.4).

The names are in :mod:`micro.analysis`.
"""
