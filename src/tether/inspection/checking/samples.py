"""Which weights have equal values: found by samples, then proven block by block. Nothing is copied whole.

Two weights are compared in every arrangement of their axes in which their shapes agree, up to one factor. Samples are
taken at the same places of each arrangement, so a transposed copy has an equal sample.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5py
import ml_dtypes
import numpy as np

from tether.files.keras.archive import opened_values, reading
from tether.inspection.facts import Facts
from tether.types import Array

Shape = tuple[int, ...]
Axes = tuple[int, ...]

SAMPLE = 512
"""How many elements stand for a weight until something is found."""
FEWEST = 16
"""A weight of fewer elements may be equal to another by chance, or because people start it by hand."""
LEVELS = 8
"""So many different numbers a sample has to have: zeros, ones and identities are started alike on purpose."""
MOST_AXES = 5
BLOCK = 1 << 20
"""Elements that are compared at a time."""


class Readable(Protocol):
    """Something with values that can be read in parts."""

    shape: Shape

    def at(self, places: tuple[Array, ...]) -> Array:
        """The elements at some places, given by an array for each axis."""

    def block(self, parts: tuple[slice, ...]) -> Array:
        """One block of the value, as an array."""


class InMemory:
    """The values of a tensor, through a NumPy array that is made when they are read."""

    def __init__(self, shape: Sequence[int], read: Callable[[], Array]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self._read = read

    def at(self, places: tuple[Array, ...]) -> Array:
        """The elements at some places, given by an array for each axis."""
        return np.asarray(self._read()[places])

    def block(self, parts: tuple[slice, ...]) -> Array:
        """One block of the value, as an array."""
        return np.asarray(self._read()[parts])


@dataclass(frozen=True)
class Sample:
    """Elements of a weight at fixed places, in one arrangement of its axes."""

    index: int
    """Of the weight, in the list that was given."""
    axes: Axes
    elements: Array


@dataclass(frozen=True)
class Likeness:
    """Two weights that are alike: `second` is about `scale * first.transpose(axes)`."""

    first: int
    second: int
    axes: Axes
    scale: float
    correlation: float

    @property
    def in_order(self) -> bool:
        """Whether the axes are in the same order."""
        return self.axes == tuple(range(len(self.axes)))


def samples(values: Sequence[Readable]) -> Iterator[list[Sample]]:
    """The samples of weights that could be arrangements of each other, group by group."""
    groups: dict[Shape, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        if math.prod(value.shape) >= FEWEST and len(value.shape) <= MOST_AXES:
            groups[tuple(sorted(value.shape))].append(index)
    for shape, members in groups.items():
        if len(members) > 1:
            yield [sample for index in members for sample in _samples_of(index, values[index], shape)]


def _samples_of(index: int, value: Readable, shape: Shape) -> list[Sample]:
    found: list[Sample] = []
    places = _places(shape)
    for axes in itertools.permutations(range(len(shape))):
        if tuple(value.shape[axis] for axis in axes) == shape:
            at: list[Array] = [places[0]] * len(shape)
            for place, axis in zip(places, axes, strict=True):
                at[axis] = place
            elements = np.asarray(value.at(tuple(at)), dtype="float64")
            if not found and (len(np.unique(elements)) < LEVELS or not np.isfinite(elements).all()):
                return []
            found.append(Sample(index, axes, elements))
    return found


def _places(shape: Shape) -> tuple[Array, ...]:
    """The places of a sample, the same for every weight of these sizes."""
    size = math.prod(shape)
    rng = np.random.default_rng(size)
    flat = np.arange(size) if size <= SAMPLE else np.unique(rng.integers(0, size, SAMPLE))
    return tuple(np.unravel_index(flat, shape))


def alike(values: Sequence[Readable], least: float, pairs: Callable[[int, int], bool]) -> Iterator[Likeness]:
    """The pairs of weights whose samples correlate at least so much, the second after the first in the list.

    Args:
        values: The weights.
        least: The least absolute correlation.
        pairs: Whether two of them, by their places in the list, are to be compared.
    """
    for group in samples(values):
        bases = list({sample.index: sample for sample in reversed(group)}.values())[::-1]
        if len(bases) < 2:
            continue
        correlations = _unit([sample.elements for sample in bases]) @ _unit([sample.elements for sample in group]).T
        best: dict[tuple[int, int], Likeness] = {}
        for row, column in np.argwhere(np.abs(correlations) >= least):
            base, other = bases[row], group[column]
            if base.index < other.index and pairs(base.index, other.index):
                found = _likeness(base, other, float(correlations[row, column]))
                known = best.get((base.index, other.index))
                if known is None or abs(found.correlation) > abs(known.correlation) + 1e-9:
                    best[base.index, other.index] = found
        yield from best.values()


def _unit(rows: list[Array]) -> Array:
    centred = np.stack([row - row.mean() for row in rows])
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)


def _likeness(base: Sample, other: Sample, correlation: float) -> Likeness:
    # base.transpose(b) ~ other.transpose(o), so other ~ base.transpose(b).transpose(inverse of o)
    axes = tuple(base.axes[place] for place in np.argsort(other.axes))
    largest = int(np.argmax(np.abs(base.elements)))
    scale = float(other.elements[largest] / base.elements[largest])
    return Likeness(base.index, other.index, axes, scale, correlation)


def is_equal(first: Readable, second: Readable, likeness: Likeness, tolerance: float) -> bool:
    """Whether `second` is `scale * first.transpose(axes)` everywhere; to the bit if the scale is 1."""
    rows = max(1, BLOCK // max(1, math.prod(second.shape[1:])))
    everything = [slice(None)] * len(second.shape)
    for start in range(0, second.shape[0], rows):
        part = slice(start, start + rows)
        theirs = everything.copy()
        theirs[likeness.axes[0]] = part
        a = first.block(tuple(theirs)).transpose(likeness.axes)
        b = second.block((part, *everything[1:]))
        if likeness.scale == 1:
            same = np.array_equal(a, b)
        else:
            a, b = likeness.scale * a.astype("float64"), b.astype("float64")
            same = bool(np.all(np.abs(a - b) <= tolerance * np.maximum(np.abs(a), np.abs(b))))
        if not same:
            return False
    return True


def sample_tolerance(*dtypes: str) -> float:
    """The relative error of a product in the coarsest of these dtypes."""
    bits = {"bfloat16": 2**-7, "float16": 2**-9, "float64": 1e-12}
    return max((bits.get(dtype, 1e-6) for dtype in dtypes), default=1e-6)


def deviation(value: Readable) -> float:
    """The standard deviation of some thousands of a weight's elements."""
    size = math.prod(value.shape)
    flat = np.arange(size) if size <= 8 * SAMPLE else np.random.default_rng(size).integers(0, size, 8 * SAMPLE)
    return float(np.std(np.asarray(value.at(np.unravel_index(flat, value.shape)), dtype="float64")))


def is_zero(value: Readable) -> bool:
    """Whether every element is zero; the first that is not ends the reading."""
    rows = max(1, BLOCK // max(1, math.prod(value.shape[1:])))
    rest = (slice(None),) * (len(value.shape) - 1)
    return not any(np.any(value.block((slice(start, start + rows), *rest))) for start in range(0, value.shape[0], rows))


# --------------------------------------------------------------------------- values in a file
# The values of a file's weights, read in parts while the file is open.


class _Dataset:
    """The values of one dataset of an HDF5 file."""

    def __init__(self, path: Path, dataset: h5py.Dataset, shape: Shape, dtype: str) -> None:
        self.shape = shape
        self._path, self._dataset, self._dtype = path, dataset, dtype

    def at(self, places: tuple[Array, ...]) -> Array:
        """The elements at some places; of the first axis, only the rows that have some are read."""
        rows, inverse = np.unique(places[0], return_inverse=True)
        return np.asarray(self._read(rows)[(inverse, *places[1:])])

    def block(self, parts: tuple[slice, ...]) -> Array:
        """One block of the value, as an array."""
        return self._read(parts)

    def _read(self, parts: object) -> Array:
        with reading(self._path):  # a piece that is packed may be damaged inside
            array = self._dataset[parts]
        known = getattr(ml_dtypes, self._dtype, None)  # HDF5 has no such numbers: Keras writes their bits
        return array.view(known) if known is not None and array.dtype != known else array


@contextlib.contextmanager
def opened_samples(path: Path, facts: Facts) -> Iterator[dict[str, Readable]]:
    """The values of a file by their places, as long as the file is open."""
    if path.name.endswith(".safetensors"):
        yield dict(_safetensors(path, facts))
        return
    with opened_values(path) as file:
        yield {weight.place: _Dataset(path, file[weight.place], weight.shape, weight.dtype) for weight in facts.weights}


def _safetensors(path: Path, facts: Facts) -> Iterator[tuple[str, Readable]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for weight in facts.weights:
        dtype = np.dtype(getattr(ml_dtypes, weight.dtype, None) or weight.dtype)
        start = 8 + length + header[weight.place]["data_offsets"][0]
        yield weight.place, InMemory(weight.shape, functools.partial(np.memmap, path, dtype, "r", start, weight.shape))
