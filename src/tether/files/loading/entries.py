"""What a file of weights has: arrays, and ties over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NUMERIC, InvalidConfig, received
from tether.types import Array
from tether.weights.codec import decode
from tether.weights.expression import Expression, Stored
from tether.weights.identity import sharing
from tether.weights.leaves import numpy_dtype
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- entries


Rows = Callable[[Array, int | tuple[int, ...]], None]
"""Fills an array with a part of a larger one: its rows from a number on, or what begins at a place on each axis."""


@dataclass(frozen=True)
class Entry:
    """One array of a file, read when it is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    rows: Rows | None = None
    """The same in parts, if the file has it as an array of this shape and dtype."""

    @property
    def size(self) -> int:
        """How many bytes the array has."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def part(self, first: int, count: int) -> Array:
        """Some rows of the array, read by themselves."""
        if self.rows is None:
            return self.read()[first : first + count]
        array = np.empty((count, *self.shape[1:]), numpy_dtype(self.dtype))
        self.rows(array, first)
        return array


def entry_of(variable: keras.Variable, name: str) -> Entry:
    """What a variable holds, as a file has it: in the dtype of the tensor that is really there."""

    def read() -> Array:
        return np.asarray(keras_seam.on_host(keras_seam.plain_tensor(keras_seam.raw_value(variable)), name))

    shape = tuple(int(n) for n in variable.shape)
    return Entry(name, shape, keras_seam.held_dtype(variable), read)


@dataclass(frozen=True)
class StoredTie:
    """What a layer that was tied computed with where the file has no entry, over other entries."""

    name: str
    expression: Expression
    weights: Mapping[Stored, Entry]
    """The entry of each weight in the expression; the weights here hold no values."""
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its value."""
        return tuple(self.expression.shape or ())

    def read(self) -> Array:
        """The value of the tie, computed from other entries."""
        mapping = [
            (weight.variable, keras.ops.convert_to_tensor(entry.read(), dtype=weight.dtype))
            for weight, entry in self.weights.items()
        ]
        with keras.StatelessScope(state_mapping=mapping):
            found = np.array(keras_seam.on_host(keras_seam.plain_tensor(self.expression.value)))
        return found.astype(numpy_dtype(self.dtype))


def stored_ties(notes: Mapping[str, object], weights: Mapping[str, Entry]) -> dict[str, StoredTie]:
    """The ties that a stranger's file may have noted.

    Args:
        notes: The dtype and the steps of each, by where it belongs.
        weights: The entries of the weights that they name, by uid.

    Raises:
        InvalidConfig: They are not what Tether writes.
    """
    found: dict[str, StoredTie] = {}
    if not notes:
        return found
    unfit = [entry.name for entry in weights.values() if entry.dtype not in NUMERIC]
    if unfit:
        raise InvalidConfig(f"The file's shared weight {unfit[0]!r} is of a dtype that no layer shares.")
    with sharing():
        known = {uid: Weight(entry.shape, dtype=entry.dtype, name="stored") for uid, entry in weights.items()}
    entries: dict[Stored, Entry] = {weight: weights[uid] for uid, weight in known.items()}
    for place, tie in notes.items():
        if not isinstance(tie, dict) or set(tie) != {"dtype", "steps"} or tie["dtype"] not in NUMERIC:
            raise InvalidConfig(f"The file's tie at {place!r} has dtype and steps. {received(tie=tie)}")
        expression = decode(tie["steps"], known)
        used = {weight: entries[weight] for weight in expression.weights_used()}
        found[place] = StoredTie(place, expression, used, tie["dtype"])
    return found


# --------------------------------------------------------------------------- differences
# How far apart two values are, and how far they may be.


_COARSE = 2.0**-7
"""The precision of bfloat16, the coarsest of the floats that weights are stored in."""


def difference_of(a: Array, b: Array) -> float | None:
    """The largest difference of two arrays of one shape, `nan` if one has a NaN where the other has none."""
    if np.array_equal(a, b):
        return None
    wide = "complex128" if a.dtype.kind == "c" else "float64"
    first, second = a.astype(wide), b.astype(wide)
    if np.array_equal(first, second, equal_nan=True):
        return None
    both = np.isnan(first) & np.isnan(second)
    with np.errstate(invalid="ignore"):  # of two infinities
        return float(np.max(np.where(both | (first == second), 0.0, np.abs(first - second))))


def tolerance_of(value: Array) -> float:
    """How far a computed value may be from one that another backend computed."""
    if not keras_seam.is_float(str(value.dtype)):
        return 0.0
    largest = float(np.max(np.abs(value.astype("float64")), initial=0.0))
    return (
        float(np.finfo(np.float32).eps if value.dtype.itemsize > 2 else _COARSE)
        * 8.0
        * max(1.0, largest if np.isfinite(largest) else 1.0)
    )


# --------------------------------------------------------------------------- the report
# What a load did: which weights were loaded from what, and what did not fit.


@dataclass(frozen=True)
class Loaded:
    """One stored weight, and what the file calls the values that were offered for it."""

    name: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} <- {', '.join(self.sources)}"


@dataclass(frozen=True)
class Conflict:
    """Values of one weight that differ: where they came from, by how much, and what was done."""

    name: str
    sources: tuple[str, ...]
    """The first two are the farthest apart that were compared."""
    difference: float
    taken: str

    def __str__(self) -> str:
        first, second, *more = self.sources
        others = f" (and {', '.join(more)})" if more else ""
        return f"{self.name}: {first!r} and {second!r}{others} differ by up to {self.difference:.3g}"


@dataclass(frozen=True)
class Report:
    """What was loaded, and what was not. Its text is for people.

    Example:
    ```python
    encode, decode = keras.layers.Dense(4, name="encode"), keras.layers.Dense(8, name="decode")
    tied = keras.Sequential([keras.Input((8,)), encode, decode])
    tied.save_weights("untied.weights.h5")
    tether.tie(decode, kernel=tether.weight_of(encode, "kernel").T)
    print(tether.files.load_untied(tied, "untied.weights.h5", resolve="mean"))
    # loaded 3: encode.kernel <- layers/dense/vars/0, layers/dense_1/vars/0; ...
    # conflicting 1: encode.kernel: 'layers/dense/vars/0' and 'layers/dense_1/vars/0' differ by up to 1.25; mean taken
    ```
    """

    loaded: tuple[Loaded, ...] = ()
    skipped: tuple[str, ...] = ()
    """What the file has and the model has no place for."""
    missing: tuple[str, ...] = ()
    """The model's weights that the file says nothing about: they are as they were."""
    conflicting: tuple[Conflict, ...] = ()

    def __str__(self) -> str:
        conflicts = [f"{conflict}; {conflict.taken} taken" for conflict in self.conflicting]
        lines = [
            _line("loaded", [str(each) for each in self.loaded]),
            _line("skipped", self.skipped),
            _line("missing", self.missing),
            _line("conflicting", conflicts),
        ]
        return "\n".join(line for line in lines if line)


def _line(title: str, items: list[str] | tuple[str, ...]) -> str:
    if not items and title != "loaded":
        return ""
    shown = "; ".join(items[:8]) + ("; ..." if len(items) > 8 else "")
    return f"{title} {len(items)}" + (f": {shown}" if items else "")


__all__ = [
    "Conflict",
    "Entry",
    "Loaded",
    "Report",
    "Rows",
    "StoredTie",
    "difference_of",
    "entry_of",
    "stored_ties",
    "tolerance_of",
]
