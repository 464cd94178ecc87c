"""Where a PEFT folder's modules are in a model: which weight a parameter of a module is, and in which layout.

PEFT's base is PyTorch's: a `Linear` stores outputs first, a convolution outputs, inputs, window; Tether has Keras's
layout, with outputs last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np

from tether.errors import ShapeMismatch, Unsupported
from tether.files.loading.entries import Entry, entry_of
from tether.files.loading.matching import dotted
from tether.files.tensors.dialects import Names, Naming
from tether.forms.kronecker import Sizes, divided
from tether.forms.vera import DrawnByTorch
from tether.kinds import letters_of
from tether.layers.family.named import Named, named_weights
from tether.types import Array
from tether.weights.expression import Shape
from tether.weights.weight import Weight

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


def first_factor(place: PeftPlace, name: str, weight: Weight) -> Entry:
    """`(*rows, r)` as `(r, rows)`, for a convolution `(r, channels, *window)`."""
    rank = (weight.shape or ())[-1]
    if place.is_convolution:
        return inputs_first(place, name, weight, (rank, place.named.shape[-2], *place.named.shape[:-2]))
    return turned(name, weight, (rank, math.prod(weight.shape or ()) // rank), lambda v: v.reshape(-1, rank).T)


def second_factor(place: PeftPlace, name: str, weight: Weight) -> Entry:
    """`(r, *columns)` as `(columns, r)`, for a convolution with a window of one."""
    rank, *columns = weight.shape or ()
    shape: tuple[int, ...] = (math.prod(columns), rank)
    if place.is_convolution:
        shape = (*shape, *(1 for _ in place.named.shape[:-2]))
    return turned(name, weight, shape, lambda array: array.reshape(rank, -1).T.reshape(shape))


def side_by_side(entries: Sequence[Entry], axis: int, factors: Sequence[float] = ()) -> Entry:
    """Tensors as one, each times a number."""
    scaled = [times(*pair) for pair in zip(entries, factors, strict=True)] if factors else entries
    if len(scaled) == 1:
        return scaled[0]
    first = entries[0]
    size = sum(entry.shape[axis] for entry in entries)

    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    return Entry(first.name, shape, first.dtype, lambda: np.concatenate([entry.read() for entry in scaled], axis))


def times(entry: Entry, factor: float) -> Entry:
    """A tensor times a number."""
    return entry if factor == 1 else replace(entry, read=lambda: (factor * entry.read()).astype(entry.read().dtype))


def skew(array: Array, shape: Shape) -> Array:
    """Skew-symmetric matrices from their upper triangles, the other way round."""
    size = shape[-1]
    upper = np.triu_indices(size, 1)
    whole = np.zeros((len(array), size, size), array.dtype)
    whole[:, *upper] = -array
    return (whole - whole.swapaxes(-1, -2)).reshape(*shape, size)


def transposed(name: str, weight: Weight) -> Entry:
    """A matrix with its axes exchanged."""
    rows, columns = weight.shape or ()
    return turned(name, weight, (columns, rows), lambda array: array.T)


def inputs_first(place: PeftPlace, name: str, weight: Weight, shape: Shape | None = None) -> Entry:
    """A matrix of inputs by others as others by inputs; for a convolution with the channels before the window."""
    others = (weight.shape or ())[-1]
    inputs = math.prod(weight.shape or ()) // others
    window = place.named.shape[:-2] if place.is_convolution else ()
    channels = inputs // math.prod(window)
    order = (len(window) + 1, len(window), *range(len(window)))
    stored = (others, inputs) if shape is None else shape
    return turned(name, weight, stored, lambda v: v.reshape(*window, channels, others).transpose(order).reshape(stored))


def turned(name: str, weight: Weight, shape: Shape, way: Callable[[Array], Array]) -> Entry:
    """A weight as a tensor of this name and shape."""
    held = entry_of(weight.variable, name)
    return Entry(name, shape, held.dtype, lambda: np.ascontiguousarray(way(held.read())))


def outputs_scaled(place: PeftPlace, own: Weight, strength: float) -> Entry | None:
    """The factors of a module's outputs; `None` if they are not such."""
    sizes, split = _spread(place, own)
    return _scaled(place, own, strength, sizes[split:], place.named.shape[split:], outputs=True)


def inputs_scaled(place: PeftPlace, own: Weight, strength: float) -> Entry | None:
    """The factors of a module's inputs, for a convolution of its channels; `None` if they are not such."""
    sizes, split = _spread(place, own)
    first = split - 1 if place.is_convolution else 0
    return _scaled(place, own, strength, sizes[first:split], place.named.shape[first:split], outputs=False)


def _scaled(
    place: PeftPlace, own: Weight, strength: float, sizes: Shape, side: Shape, *, outputs: bool
) -> Entry | None:
    if math.prod(own.shape or ()) != math.prod(sizes):
        return None  # other axes have factors too
    count = math.prod(side)
    shape: Shape = (count, 1) if outputs and not place.is_convolution else (1, count)
    if place.is_convolution:
        shape = (*shape, *(1 for _ in place.named.shape[:-2]))

    def way(array: Array) -> Array:
        spread = np.broadcast_to(array.reshape(sizes), side).reshape(shape)
        return spread if strength == 1 else (1 + strength * (spread - 1)).astype(array.dtype)

    return turned(f"{PREFIX}{place.modules[0]}.ia3_l", own, shape, way)


def _spread(place: PeftPlace, own: Weight) -> tuple[Shape, int]:
    """The sizes of factors for each axis of a kernel, and how many of these axes are inputs."""
    given, shape = own.shape or (), place.named.shape
    return (*(1 for _ in shape[len(given) :]), *given), place.split


def factor_of(found: Sequence[Sizes]) -> int:
    """The one number by which PEFT divides all modules' sizes as they are divided here."""
    pairs = [pair for sizes in found for pair in zip(sizes.small, sizes.large, strict=True)]
    for factor in (-1, *sorted({size for pair in pairs for size in pair})):
        if all(_divided_there(small * large, factor) == (small, large) for small, large in pairs):
            return factor
    raise Unsupported(
        "A LoKr folder of PEFT's has one `decompose_factor`, and none divides the sizes of all modules as they are "
        f"here: {', '.join(f'{small * large} = {small} * {large}' for small, large in dict.fromkeys(pairs))}. Make all "
        "parts with one `tether.forms.kronecker(rank, factor=...)`, and leave out modules that it does not divide."
    )


def _divided_there(size: int, factor: int) -> tuple[int, int]:
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    return divided(size, None if factor < 0 else factor)


def seed_of(a: Weight, b: Weight) -> int | None:
    """The seed that the frozen matrices of a VeRA were drawn from, as PyTorch draws them."""
    first, second = a.initializer, b.initializer
    if not isinstance(first, DrawnByTorch) or not isinstance(second, DrawnByTorch):
        return None
    alike = first.seed == second.seed and (first.skipped, second.skipped) == (0, math.prod(a.shape or ()))
    same = alike and all(np.array_equal(w.numpy(), w.initializer.drawn(tuple(w.shape or ()))) for w in (a, b))
    return first.seed if same else None
