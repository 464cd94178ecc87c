"""Tether shares and combines the weights of Keras layers.

What a layer computes with is an expression over stored weights. Sharing is two layers whose
expressions name the same stored weight. Combining is an expression that names several.
"""

from tether import adapters, files, forms, inspection, ops, transfer, weights
from tether.errors import TetherError
from tether.forms.low_rank import low_rank
from tether.layers import Lambda, call, extend, inherit, materialize, route, tie, untie, weight_of
from tether.weights import Expression, Weight, sharing

__all__ = [
    "Expression",
    "Lambda",
    "TetherError",
    "Weight",
    "adapters",
    "call",
    "extend",
    "files",
    "forms",
    "inherit",
    "inspection",
    "low_rank",
    "materialize",
    "ops",
    "route",
    "sharing",
    "tie",
    "transfer",
    "untie",
    "weight_of",
    "weights",
]
