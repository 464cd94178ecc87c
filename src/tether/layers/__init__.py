"""How Keras layers use expressions."""

from tether import keras_seam
from tether.layers import training
from tether.layers.call import call
from tether.layers.lambda_layer import Lambda
from tether.layers.route import route
from tether.layers.tie import tie, weight_of
from tether.layers.untie import materialize, untie

keras_seam.answers.update(
    is_tied=training.is_tied, live=training.live, differences=training.differences, still=training.still
)

__all__ = ["Lambda", "call", "materialize", "route", "tie", "untie", "weight_of"]
