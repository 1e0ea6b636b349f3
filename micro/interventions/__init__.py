"""Reading and changing activations inside a forward pass.

    from micro import interventions as iv

    with model.intervene(iv.zero("heads", experts="logic", heads=[1]), iv.read("block_output", layers=3)) as run:
        model(input_ids)
    run["block_output"]  # Reading

Nothing sticks to a module: when the block ends, the model is what it was; an empty block changes no bit. Actions act in
the order given, so a ``read`` behind a ``zero`` sees zeros. ``points(model)`` lists the places of a model; ``variants``
puts several interventions on one input side by side, in a model or an engine; the engine takes the same actions
(``engine.generate(..., interventions=[...], all_experts=True)``), and K lists of them for K rows behind a prefix that
is read once (``engine.generate([prompt] * K, interventions=side_by_side(lists), shared_prefix=n)``).
"""

from micro.interventions.actions import Action, moments, read, replace, resample, scale, shift, zero
from micro.interventions.points import POINTS, Point
from micro.interventions.readings import Moments, Reading
from micro.interventions.session import Findings, Session, intervene
from micro.interventions.table import PointInfo, PointTable, points
from micro.interventions.variants import side_by_side, variants

__all__ = [
    "POINTS",
    "Action",
    "Findings",
    "Moments",
    "Point",
    "PointInfo",
    "PointTable",
    "Reading",
    "Session",
    "intervene",
    "moments",
    "points",
    "read",
    "replace",
    "resample",
    "scale",
    "shift",
    "side_by_side",
    "variants",
    "zero",
]
