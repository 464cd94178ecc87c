"""Which weights a converter must not see as constants.

A converter computes what it can from constants when it converts: the transpose of a kernel, a slice, a product of two
factors. For a weight with one use that is well. If a weight is used in two ways, its file gets two copies; if a kernel
is a product of small factors, it gets the large kernel. So such weights are *held out*: the converter is given them as
further inputs, which it knows nothing about, and in what it made the inputs are turned into stored constants.
"""

from __future__ import annotations

from typing import Any

from tether import keras_seam
from tether.files.exporting.asking import Asked, bytes_of
from tether.layers.tying.state import state_of, stored_variables
from tether.layers.tying.tied import base_class
from tether.weights.weight import Weight

SMALL = 1024
"""Bytes below which a second copy of a weight does not matter."""


def held_out(asked: Asked) -> list[Any]:
    """The variables that several uses read in different ways, or that are smaller than what is made of them."""
    ways: dict[int, set[Any]] = {}
    grown: set[int] = set()
    for layer in keras_seam.contained_layers(asked.model):
        state = state_of(layer)
        for slot in state.slots if state is not None else ():
            stored = stored_variables(slot.view)
            way = (base_class(type(layer)), slot.tie.path[-1], slot.view.expression)
            for variable in stored:
                ways.setdefault(id(variable), set()).add(way)
            if bytes_of(slot.view) > sum(map(bytes_of, stored)):
                grown.update(map(id, stored))
        for weight in keras_seam.sublayers(layer) if state is None else ():
            for variable in weight.variables if isinstance(weight, Weight) else ():
                ways.setdefault(id(variable), set()).add(id(layer))  # it reads the weight in a way of its own
    held = grown | {variable for variable, found in ways.items() if len(found) > 1}
    return [variable for variable in all_large(asked) if id(variable) in held]


def all_large(asked: Asked) -> list[Any]:
    """Every variable of some size: for a model whose layers share in ways of their own."""
    return [variable for variable in asked.variables if bytes_of(variable) >= SMALL]


__all__ = ["all_large", "held_out"]
