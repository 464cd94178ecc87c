"""How the weights of a part are the tensors of a PEFT folder: outputs first, in the layouts of PyTorch.

`peft_saving` asks for them; `peft_parts` turns them the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tether.errors import Unsupported
from tether.files.loading.entries import Entry, entry_of
from tether.files.peft.peft_places import PREFIX, PeftPlace
from tether.forms.kronecker import Sizes, divided
from tether.forms.vera import DrawnByTorch
from tether.types import Array
from tether.weights.expression import Shape
from tether.weights.weight import Weight


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


__all__ = [
    "factor_of", "first_factor", "inputs_first", "inputs_scaled", "outputs_scaled", "second_factor", "seed_of",
    "side_by_side", "skew", "times",
    "transposed", "turned",
]  # fmt: skip
