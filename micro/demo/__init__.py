"""The whole of MiCRo on a real backbone in minutes: upcycle, three stages, routing, ablation, steering, a report."""

from micro.demo.plan import FULL, TINY, DemoPlan
from micro.demo.run import run_demo
from micro.demo.tiny import tiny_checkpoint

__all__ = ["FULL", "TINY", "DemoPlan", "run_demo", "tiny_checkpoint"]
