"""How Keras layers use expressions."""

from tether.layers.call import call
from tether.layers.lambda_layer import Lambda
from tether.layers.route import route
from tether.layers.tie import tie, weight_of
from tether.layers.untie import materialize, untie

__all__ = ["Lambda", "call", "materialize", "route", "tie", "untie", "weight_of"]
