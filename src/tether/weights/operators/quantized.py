"""Integers that stand for a weight: rounded to a grid, whose steps are stored beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, as_dtype, as_int, as_ints, received
from tether.types import Array, Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Node, Shape, Stored, Term, register
from tether.weights.operators import arithmetic, structure


@register
class Unpack(Node):
    """Integers from -8 to 7 out of bytes that hold two each, next to each other along an axis."""

    name, accepts = "unpack", ("axis", "size")

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The axis, counted from the front, and how many integers there are along it."""
        axis, size = as_int(given.get("axis"), "axis"), as_int(given.get("size"), "size")
        if axis < 0 or size < 0:
            raise InvalidConfig(f"Axis and size are 0 or more. {received(axis=axis, size=size)}")
        return {"axis": axis, "size": size}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """Two integers for each byte along the axis, but for the last one of an odd number."""
        axis, size = self.parameters["axis"], self.parameters["size"]
        if axis >= len(shapes[0]) or shapes[0][axis] != (size + 1) // 2:
            raise ShapeMismatch(
                f"{self.operands[0].notation()} has shape {shapes[0]}; {size} integers of 4 bits on axis {axis} need "
                f"{(size + 1) // 2} bytes."
            )
        return (*shapes[0][:axis], size, *shapes[0][axis + 1 :])

    def infer_dtype(self, *dtypes: str) -> str:
        if dtypes[0] != "int8":
            raise InvalidConfig(f"Integers of 4 bits are packed into int8. {received(dtype=dtypes[0])}")
        return dtypes[0]

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The bytes' axes; along the packed one, two integers in each byte, if they are even."""
        axis, size = self.parameters["axis"], self.parameters["size"]
        packed = links.label(size) if size % 2 else (*operands[0][axis], *links.label(2))
        return (*operands[0][:axis], packed, *operands[0][axis + 1 :])

    def compute(self, *values: Tensor) -> Tensor:
        if 0 in (self.shape or ()):
            return keras.ops.zeros(self.shape, "int8")
        return keras.quantizers.unpack_int4(values[0], self.parameters["size"], axis=self.parameters["axis"])


@register
class Dequantize(Node):
    """`integers * scale`: the values that integers stand for, in a float dtype and possibly in another shape.

    The scale broadcasts to the integers: it has one number for each output channel of a layer, or for each block
    of inputs of each channel. Blocks are an axis of the stored integers, which `shape` joins again.
    """

    name, arity, accepts = "dequantize", 2, ("dtype", "shape")

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """A dtype of floats, and sizes if the shape is not that of the integers."""
        dtype, shape = as_dtype(given.get("dtype")), given.get("shape")
        if not keras_seam.is_float(dtype):
            raise InvalidConfig(f"Integers stand for floats. {received(dtype=dtype)}")
        if shape is not None:
            shape = as_ints(shape, "shape")
            if any(size < 0 for size in shape):
                raise InvalidConfig(f"A shape has sizes of 0 or more. {received(shape=shape)}")
        return {"dtype": dtype, "shape": shape}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the integers, or the one that was given, of as many elements."""
        codes, scale = shapes
        shape = codes if self.parameters["shape"] is None else self.parameters["shape"]
        fits = len(codes) == len(scale) and all(n in (1, size) for n, size in zip(scale, codes, strict=True))
        if not fits or math.prod(shape) != math.prod(codes):
            raise ShapeMismatch(
                f"A scale has the axes of its integers, of their sizes or of size 1, and the result as many elements. "
                f"{received(integers=codes, scale=scale, shape=shape)}"
            )
        return tuple(shape)

    def infer_dtype(self, *dtypes: str) -> str:
        """The dtype of the floats."""
        codes, scale = dtypes
        if (
            "int" not in codes.rstrip("0123456789")
            or codes == "int"
            or not keras_seam.is_float(scale)
            or scale == "float"
        ):
            raise InvalidConfig(f"What is dequantised are stored integers and a scale. {received(dtypes=dtypes)}")
        return str(self.parameters["dtype"])

    def compute(self, *values: Tensor) -> Tensor:
        """The product. Under autocast the scale has the dtype of the layer, which the product keeps."""
        codes, scale = values
        given = keras.backend.standardize_dtype(scale.dtype)
        value = keras.ops.multiply(keras.ops.cast(codes, given), scale)
        if self.parameters["shape"] is not None:
            value = keras.ops.reshape(value, self.parameters["shape"])
        return keras.ops.cast(value, self.parameters["dtype"]) if given == self.operands[1].dtype else value

    def expanded(self) -> Expression:
        """The product, in the operators of arithmetic: a planner moves the scale to the side where it costs less."""
        product = arithmetic.multiply(structure.cast(self.operands[0], self.parameters["dtype"]), self.operands[1])
        return product if self.parameters["shape"] is None else structure.reshape(product, self.parameters["shape"])

    def format(self, *terms: Term) -> Term:
        """`dequantize(a, scale)`, with the shape if it is another than that of the integers."""
        shape = self.parameters["shape"]
        return Term(f"dequantize({terms[0].text}, {terms[1].text}){'' if shape is None else f'.reshape{shape}'}")


# --------------------------------------------------------------------------- rounding
# Rounding a float array to integers on a grid, and the expression that stands for what it was.
#
#     q = round(w / scale),    w ≈ scale · q,    |w - scale · q| <= scale / 2
#
# One scale for each channel, or for each block of inputs of each channel: the largest absolute value there, divided
# by the largest integer (127 of 8 bits, 7 of 4 bits). The grid is symmetric, so zero stays zero.


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

    def expression(self, of: Stored, dtype: str) -> Expression:
        """What the array was, over two new weights that do not train, beside the one that they stand for."""
        codes = of.beside(of, self.mode, self.codes, dtype="int8", trainable=False, role="integers")
        scale = of.beside(of, "scale", self.scale, dtype="float32", trainable=False, role="scale")
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
        codes = np.array(keras_seam.to_numpy(packed, in_step=True))
    return Rounded(codes, scale, mode, axis, size, shape)


def _blocks(count: int, block: int) -> int:
    """How many blocks of equal size, of at most so many inputs.

    There are no more than a quarter beyond the fewest: Keras stores a zero point of one byte beside each scale of four.
    Where the inputs have no such divisor there is one block.
    """
    fewest = -(-count // block)
    return next((blocks for blocks in range(fewest, fewest * 5 // 4 + 1) if blocks and count % blocks == 0), 1)
