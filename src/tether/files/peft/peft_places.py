"""Where a PEFT folder's modules are in a model: which weight a parameter of a module is, and in which layout.

PEFT's base is PyTorch's: a `Linear` stores outputs first, a convolution outputs, inputs, window; Tether has Keras's
layout, with outputs last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from tether.errors import ShapeMismatch, Unsupported
from tether.files.loading.matching import dotted
from tether.files.tensors.dialects import Names, Naming
from tether.kinds import letters_of
from tether.layers.family.named import Named, named_weights
from tether.types import Array
from tether.weights.expression import Shape

PREFIX = "base_model.model."
"""What the name of each tensor of a folder begins with."""
LEAVES = {
    "weight": "weight",
    "kernel": "weight",
    "embeddings": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
}
"""Which parameter of a PyTorch module a variable of this name is."""


@dataclass(frozen=True)
class PeftPlace:
    """A weight of the model that may have a part, and what a PEFT folder calls its module and the parameter in it."""

    named: Named
    modules: tuple[str, ...]
    leaf: str
    inputs: int | None
    whole: bool = True
    """Whether the parameter is the weight and nothing else: not so where query, key and value are one tensor."""

    @property
    def is_convolution(self) -> bool:
        """Whether it is the kernel of a convolution, which PyTorch keeps with its window last."""
        return isinstance(self.named.layer, keras.layers.Layer) and _is_convolution(self.named.layer)

    @property
    def is_table(self) -> bool:
        """Whether it is the table of an embedding, which PyTorch has in the same layout."""
        return isinstance(self.named.layer, keras.layers.Embedding)

    @property
    def split(self) -> int:
        """How many leading axes of the weight are inputs."""
        return self.inputs or _leading_inputs(self.named.layer) or len(self.named.shape) - 1

    def rows(self, inputs: int, outputs: int) -> int:
        """How many leading axes of the weight are inputs, if it has as many inputs and outputs as a file says."""
        shape = self.named.shape
        fits = [n for n in range(1, len(shape)) if (math.prod(shape[:n]), math.prod(shape[n:])) == (inputs, outputs)]
        if self.is_convolution:
            fits = [n for n in fits if n == len(shape) - 1]
        if not fits or (self.inputs is not None and self.inputs not in fits):
            raise ShapeMismatch(
                f"{self.named.name} has shape {shape}; the adapter's factors make {(inputs, outputs)}, inputs first."
            )
        return fits[0] if self.inputs is None else self.inputs


def _leading_inputs(layer: keras.Layer) -> int | None:
    """How many leading axes of the kernel of an EinsumDense are inputs, as its equation says."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return None
    _, kernel, outputs = letters_of(layer.equation)
    return sum(letter not in outputs for letter in kernel) or None


def _is_convolution(layer: keras.Layer) -> bool:
    return isinstance(layer, (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D))


def as_stored(place: PeftPlace) -> tuple[Shape, Callable[[Array], Array], Callable[[Array], Array]]:
    """The shape of a whole weight in PyTorch, how it is turned to the model's, and back."""
    shape = place.named.shape
    if place.leaf != "weight" or len(shape) < 2 or place.is_table:
        stored = (math.prod(shape),) if place.leaf == "bias" else shape
        return stored, lambda array: array.reshape(shape), lambda array: array.reshape(stored)
    if place.is_convolution:
        window = len(shape) - 2
        order = (*range(2, window + 2), 1, 0)
        back = (window + 1, window, *range(window))
        stored = tuple(shape[axis] for axis in back)
        return stored, lambda array: array.transpose(order), lambda array: np.ascontiguousarray(array.transpose(back))
    inputs = place.split
    stored = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
    return (
        stored,
        lambda array: array.T.reshape(shape),
        lambda array: np.ascontiguousarray(array.reshape(stored[::-1]).T),
    )


def refuse_pieces(place: PeftPlace) -> None:
    """Refuses a module whose parameter is another than one weight of the model, inputs and outputs apart."""
    if not place.whole:
        raise Unsupported(
            f"{place.modules[0]!r} has {place.named.name!r} in a layout that adapters cannot be taken over from or to: "
            "several weights in one tensor, or axes in another order."
        )


def peft_places_of(model: keras.Layer, names: Names) -> list[PeftPlace]:
    """The weights of a model that have a module, each by what it is called there."""
    found = named_weights(model)
    naming = Naming(names, frozenset(dotted(named.name) for named in found))
    places = []
    for named in found:
        for tensor in naming.of(dotted(named.name))[:1]:
            split = [each.rpartition(".") for each in tensor.names]
            leaf = LEAVES.get(split[0][2], split[0][2])
            modules = tuple(dict.fromkeys(module for module, _, _ in naming.ordered(split)))
            places.append(PeftPlace(named, modules, leaf, tensor.leading_inputs, tensor.is_whole))
    return places
