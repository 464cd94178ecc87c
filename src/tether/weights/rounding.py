"""Rounding a float array to integers on a grid, and the expression that stands for what it was.

    q = round(w / scale),    w ≈ scale · q,    |w - scale · q| <= scale / 2

One scale for each channel, or for each block of inputs of each channel: the largest absolute value there, divided by
the largest integer (127 of 8 bits, 7 of 4 bits). The grid is symmetric, so zero stays zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from tether.weights.expression import Expression, Shape
from tether.weights.operators.quantized import Dequantize, Unpack
from tether.weights.weight import Weight

Array = np.ndarray[Any, Any]

LARGEST = {"int8": 127, "int4": 7}
"""The largest integer of each mode."""


@dataclass(frozen=True)
class Rounded:
    """Integers as they are stored, their scale, and how they are read."""

    codes: Array
    scale: Array
    mode: str
    axis: int
    """For 4 bits: the axis along which two integers share a byte."""
    size: int
    """For 4 bits: how many integers there are along it."""
    shape: Shape

    def expression(self, of: Weight, dtype: str) -> Expression:
        """What the array was, over two new weights that do not train, beside the one that they stand for."""
        codes = Weight.beside(of, self.mode, self.codes, dtype="int8", trainable=False, role="integers")
        scale = Weight.beside(of, "scale", self.scale, dtype="float32", trainable=False, role="scale")
        integers: Expression = codes if self.mode == "int8" else Unpack(codes, axis=self.axis, size=self.size)
        shape = None if integers.shape == self.shape else self.shape
        return Dequantize(integers, scale, dtype=dtype, shape=shape)


def rounded(array: Array, mode: str, inputs: tuple[int, ...], block: int | None = None) -> Rounded:
    """The array on the grid of a mode.

    Args:
        array: Floats.
        mode: `"int8"` or `"int4"`.
        inputs: The axes over which one scale goes: at least one.
        block: Of 4 bits, how many inputs have a scale of their own at most; `None` for one scale a channel.
    """
    shape = tuple(array.shape)
    value, axis = array.astype("float32"), max(inputs)
    over = inputs
    count = math.prod(shape[a] for a in inputs)
    if mode == "int4" and block is not None and inputs == tuple(range(inputs[0], axis + 1)):
        blocks = _blocks(count, block)
        if blocks > 1:
            value = value.reshape(*shape[: inputs[0]], blocks, count // blocks, *shape[axis + 1 :])
            axis = inputs[0] + 1
            over = (axis,)
    largest = np.max(np.abs(value), axis=over, keepdims=True, initial=0.0)
    scale = (largest / LARGEST[mode]).astype("float32")
    codes = np.rint(value / np.where(scale > 0, scale, np.float32(1)))
    codes = np.clip(codes, -LARGEST[mode], LARGEST[mode]).astype("int8")
    size = codes.shape[axis]
    if mode == "int4":
        packed, _, _ = keras.quantizers.pack_int4(keras.ops.convert_to_tensor(codes, dtype="int8"), axis=axis)
        codes = np.array(keras.ops.convert_to_numpy(packed))
    return Rounded(codes, scale, mode, axis, size, shape)


def _blocks(count: int, block: int) -> int:
    """How many blocks of equal size, of at most so many inputs.

    There are no more than a quarter beyond the fewest: Keras stores a zero point of one byte beside each scale of four.
    Where the inputs have no such divisor there is one block.
    """
    fewest = -(-count // block)
    return next((blocks for blocks in range(fewest, fewest * 5 // 4 + 1) if blocks and count % blocks == 0), 1)
