"""How Keras layers use expressions."""

from tether import keras_seam
from tether.layers import liveness, quantization
from tether.layers.depth.bank import bank, unbank
from tether.layers.depth.repeat import Repeat
from tether.layers.family.call import Lambda, call
from tether.layers.family.route import route, routed
from tether.layers.records import reader, verification
from tether.layers.tying.tie import tie, weight_of
from tether.layers.tying.untie import materialize, untie

keras_seam.answers.update(
    is_tied=liveness.is_tied, live=liveness.live, differences=liveness.differences, still=liveness.still
)

_FROM_ABOVE = (quantization, reader, verification)
"""Imported for what they tell those below them."""

__all__ = ["Lambda", "Repeat", "bank", "call", "materialize", "route", "routed", "tie", "unbank", "untie", "weight_of"]
