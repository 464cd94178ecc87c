"""A table that is stored as integers: rows are taken from these, and only what was taken becomes floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from tether.weights.checks import NUMERIC
from tether.weights.expression import Expression, Tensor
from tether.weights.operators.gradient import ScaleGradient, StopGradient
from tether.weights.operators.quantized import Unpack
from tether.weights.operators.structure import Cast


@dataclass(frozen=True)
class Coded:
    """An expression that only makes floats of stored integers."""

    stored: Expression
    dtype: str
    packed: tuple[int, int] | None
    """Of two integers in a byte the axis, and how many there are along it."""


def coded(expression: Expression) -> Coded | None:
    """How an expression makes floats of stored integers, if that is all that it does."""
    while isinstance(expression, (StopGradient, ScaleGradient)):  # through integers no gradient flows anyway
        expression = expression.operands[0]
    if not isinstance(expression, Cast):
        return None
    integers, dtype = expression.operands[0], str(expression.parameters["dtype"])
    if integers.dtype not in NUMERIC or "int" not in str(integers.dtype):
        return None
    if isinstance(integers, Unpack):
        return Coded(integers.operands[0], dtype, (integers.parameters["axis"], integers.parameters["size"]))
    return Coded(integers, dtype, None)


@dataclass(frozen=True)
class Integers:
    """The stored integers of a factor."""

    stored: Tensor
    how: Coded
    dtype: str
    """The dtype of the floats."""

    def take(self, numbers: Tensor, axis: int) -> Tensor:
        """The entries along an axis, as floats."""
        packed = self.how.packed
        if packed is not None and packed[0] == axis:
            return keras.ops.take(self.floats(), numbers, axis=axis)
        rows = keras.ops.take(self.stored, numbers, axis=axis)
        moved = len(numbers.shape) - 1
        return self._floats(rows, packed and (packed[0] + (moved if packed[0] > axis else 0), packed[1]))

    def floats(self) -> Tensor:
        """All entries as floats."""
        return self._floats(self.stored, self.how.packed)

    def _floats(self, stored: Tensor, packed: tuple[int, int] | None) -> Tensor:
        integers = stored if packed is None else keras.quantizers.unpack_int4(stored, packed[1], axis=packed[0])
        return keras.ops.cast(integers, self.dtype)


def as_floats(value: Any) -> Tensor:
    """A value of a plan that an operation of arithmetic takes."""
    return value.floats() if isinstance(value, Integers) else value
