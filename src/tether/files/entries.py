"""What a file of weights has: arrays, and ties over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NUMERIC, InvalidConfig, received
from tether.weights.codec import decode
from tether.weights.expression import Expression
from tether.weights.identity import sharing
from tether.weights.leaves import numpy_dtype
from tether.weights.weight import Weight

Array = np.ndarray[Any, Any]
Rows = Callable[[Array, int], None]
"""Fills an array with rows of a larger one, from a row on."""


@dataclass(frozen=True)
class Entry:
    """One array of a file, read when it is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Array]
    rows: Rows | None = None
    """The same in parts, if the file has it as an array of this shape and dtype."""

    def part(self, first: int, count: int) -> Array:
        """Some of its rows."""
        if self.rows is None:
            return self.read()[first : first + count]
        array = np.empty((count, *self.shape[1:]), numpy_dtype(self.dtype))
        self.rows(array, first)
        return array


def entry_of(variable: Any, name: str) -> Entry:
    """What a variable holds, as a file has it: in the dtype of the tensor that is really there."""

    def read() -> Array:
        return np.asarray(keras_seam.on_host(keras_seam.plain_tensor(keras_seam.raw_value(variable))))

    shape = tuple(int(n) for n in variable.shape)
    return Entry(name, shape, keras_seam.held_dtype(variable), read)


@dataclass(frozen=True)
class StoredTie:
    """What a layer that was tied computed with where the file has no entry, over other entries."""

    name: str
    expression: Expression
    weights: dict[Weight, Entry]
    """The entry of each weight in the expression; the weights here hold no values."""
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its value."""
        return tuple(self.expression.shape or ())

    def read(self) -> Array:
        """Its value."""
        mapping = [
            (weight.variable, keras.ops.convert_to_tensor(entry.read(), dtype=weight.dtype))
            for weight, entry in self.weights.items()
        ]
        with keras.StatelessScope(state_mapping=mapping):
            found = np.array(keras_seam.on_host(keras_seam.plain_tensor(self.expression.value)))
        return found.astype(numpy_dtype(self.dtype))


def stored_ties(notes: Mapping[str, Any], weights: Mapping[str, Entry]) -> dict[str, StoredTie]:
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
    entries = {weight: weights[uid] for uid, weight in known.items()}
    for place, tie in notes.items():
        if not isinstance(tie, dict) or set(tie) != {"dtype", "steps"} or tie["dtype"] not in NUMERIC:
            raise InvalidConfig(f"The file's tie at {place!r} has dtype and steps. {received(tie=tie)}")
        expression = decode(tie["steps"], known)
        used = {weight: entries[weight] for weight in expression.weights_used()}
        found[place] = StoredTie(place, expression, used, tie["dtype"])
    return found


__all__ = ["Array", "Entry", "Rows", "StoredTie", "entry_of", "stored_ties"]
