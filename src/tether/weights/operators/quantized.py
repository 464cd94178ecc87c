"""Integers that stand for a weight: rounded to a grid, whose steps are stored beside them."""

from __future__ import annotations

import math
from typing import Any

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, received
from tether.weights.checks import as_dtype, as_int, as_ints
from tether.weights.expression import Expression, Node, Shape, Tensor, Term
from tether.weights.operators import arithmetic, structure
from tether.weights.operators.registry import register


@register
class Unpack(Node):
    """Integers from -8 to 7 out of bytes that hold two each, next to each other along an axis."""

    name, accepts = "unpack", ("axis", "size")

    @classmethod
    def check_parameters(cls, given: dict[str, Any]) -> dict[str, Any]:
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
        """That of the bytes."""
        if dtypes[0] != "int8":
            raise InvalidConfig(f"Integers of 4 bits are packed into int8. {received(dtype=dtypes[0])}")
        return dtypes[0]

    def compute(self, *values: Tensor) -> Tensor:
        """The integers."""
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
    def check_parameters(cls, given: dict[str, Any]) -> dict[str, Any]:
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
