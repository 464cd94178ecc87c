"""Tether shares and combines the weights of Keras layers.

What a layer computes with is an expression over stored weights. Sharing is two layers whose
expressions name the same stored weight. Combining is an expression that names several.
"""

from tether import inspection, ops, weights
from tether.errors import TetherError
from tether.layers import Lambda, materialize, tie, untie, weight_of
from tether.weights import Expression, Weight, sharing

__all__ = [
    "Expression",
    "Lambda",
    "TetherError",
    "Weight",
    "inspection",
    "materialize",
    "ops",
    "sharing",
    "tie",
    "untie",
    "weight_of",
    "weights",
]
