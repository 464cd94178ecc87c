"""Several values made one: joined, stacked, chosen between, contracted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from tether.errors import InvalidConfig, ShapeMismatch, received
from tether.weights.checks import as_int
from tether.weights.constant import Constant
from tether.weights.expression import Expression, Node, Shape, Tensor, Term, as_expression
from tether.weights.operators.arithmetic import result_type
from tether.weights.operators.registry import register


class _Joined(Node):
    arity, accepts = None, ("axis",)

    @classmethod
    def check_parameters(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The axis is an integer."""
        return {"axis": as_int(given.get("axis", 0), "axis")}

    def infer_dtype(self, *dtypes: str) -> str:
        """Keras's promotion of all."""
        return result_type(*dtypes)

    def format(self, *terms: Term) -> Term:
        """`concatenate([a, b], axis=0)`."""
        return Term(f"{self.name}([{', '.join(term.text for term in terms)}], axis={self.parameters['axis']})")

    def _misfit(self, shapes: tuple[Shape, ...]) -> ShapeMismatch:
        parts = ", ".join(f"{o.notation()} has shape {s}" for o, s in zip(self.operands, shapes, strict=True))
        return ShapeMismatch(f"The shapes in {self.notation()} do not fit: {parts}.")


@register
class Concatenate(_Joined):
    """Joined along an axis."""

    name = "concatenate"

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The sizes along the axis add up."""
        axis, rank = self.parameters["axis"], len(shapes[0])
        if not -rank <= axis < rank or any(len(shape) != rank for shape in shapes):
            raise self._misfit(shapes)
        axis %= rank
        rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
        if len(rests) != 1:
            raise self._misfit(shapes)
        return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])

    def compute(self, *values: Tensor) -> Tensor:
        """The values, joined."""
        return keras.ops.concatenate(values, axis=self.parameters["axis"])

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value, cut where it was joined."""
        if any(isinstance(operand, Constant) for operand in self.operands):
            return None
        axis = self.parameters["axis"]
        cuts = np.cumsum([operand.shape[axis] for operand in self.operands])[:-1]  # type: ignore[index]
        return list(keras.ops.split(value, [int(cut) for cut in cuts], axis=axis))


@register
class Stack(_Joined):
    """Joined along a new axis."""

    name = "stack"

    def infer_shape(self, *shapes: Shape) -> Shape:
        """One more axis."""
        axis, rank = self.parameters["axis"], len(shapes[0]) + 1
        if not -rank <= axis < rank or len(set(shapes)) != 1:
            raise self._misfit(shapes)
        axis %= rank
        return (*shapes[0][:axis], len(shapes), *shapes[0][axis:])

    def compute(self, *values: Tensor) -> Tensor:
        """The values, stacked."""
        return keras.ops.stack(values, axis=self.parameters["axis"])

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The entries along the axis."""
        if any(isinstance(operand, Constant) for operand in self.operands):
            return None
        return list(keras.ops.unstack(value, axis=self.parameters["axis"]))


@register
class Where(Node):
    """Chosen elementwise by a condition."""

    name, arity = "where", 3

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The broadcast of all three shapes."""
        return tuple(np.broadcast_shapes(*shapes))

    def infer_dtype(self, *dtypes: str) -> str:
        """Keras's promotion of the two values."""
        return result_type(*dtypes[1:])

    def compute(self, *values: Tensor) -> Tensor:
        """The chosen values."""
        condition = keras.ops.cast(values[0], "bool")
        return keras.ops.where(condition, values[1], values[2])


MAX_LABELS = 52


@register
class Einsum(Node):
    """A contraction in Einstein's notation, with explicit output and no ellipsis."""

    name, arity, accepts = "einsum", None, ("equation",)

    @classmethod
    def check_parameters(cls, given: dict[str, Any]) -> dict[str, Any]:
        """An equation of letters, with explicit output."""
        equation = given.get("equation")
        if not isinstance(equation, str) or equation.count("->") != 1:
            raise InvalidConfig(f"An equation reads like 'ij,jk->ik'. {received(equation=equation)}")
        equation = equation.replace(" ", "")
        inputs, output = equation.split("->")
        labels = set(inputs) - {","}
        if not all(label.isascii() and label.isalpha() for label in labels | set(output)) or len(labels) > MAX_LABELS:
            raise InvalidConfig(f"An equation has letters, commas and '->'. {received(equation=equation)}")
        if not set(output) <= labels or len(set(output)) != len(output):
            raise InvalidConfig(
                f"The output has each label once, and all stand on the left. {received(equation=equation)}"
            )
        return {"equation": equation}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The sizes of the output's labels."""
        inputs, output = self.parameters["equation"].split("->")
        terms = inputs.split(",")
        sizes: dict[str, int] = {}
        for place, (term, shape) in enumerate(zip(terms, shapes, strict=False)):
            if len(term) != len(shape):
                raise ShapeMismatch(
                    f"In {self.notation()}, {term!r} names {len(term)} axes and "
                    f"{self.operands[place].notation()} has shape {shape}."
                )
            for label, size in zip(term, shape, strict=True):
                if sizes.setdefault(label, size) != size:
                    raise ShapeMismatch(f"In {self.notation()}, axis {label!r} has sizes {sizes[label]} and {size}.")
        if len(terms) != len(shapes):
            raise ShapeMismatch(
                f"{self.parameters['equation']!r} names {len(terms)} operands. {received(operands=len(shapes))}"
            )
        return tuple(sizes[label] for label in output)

    def infer_dtype(self, *dtypes: str) -> str:
        """Keras's promotion of all."""
        return result_type(*dtypes)

    def compute(self, *values: Tensor) -> Tensor:
        """The contraction."""
        return keras.ops.einsum(self.parameters["equation"], *values)

    def format(self, *terms: Term) -> Term:
        """`einsum('ij,jk->ik', a, b)`."""
        return Term(f"einsum({self.parameters['equation']!r}, {', '.join(term.text for term in terms)})")


def concatenate(xs: Sequence[Any], axis: int = 0) -> Expression:
    """Values joined along an axis."""
    return Concatenate(*map(as_expression, xs), axis=axis)


def stack(xs: Sequence[Any], axis: int = 0) -> Expression:
    """Values of one shape joined along a new axis."""
    return Stack(*map(as_expression, xs), axis=axis)


def where(condition: Any, x1: Any, x2: Any) -> Expression:
    """`x1` where the condition holds, `x2` elsewhere."""
    return Where(as_expression(condition), as_expression(x1), as_expression(x2))


def einsum(equation: str, *xs: Any) -> Expression:
    """A contraction of values."""
    return Einsum(*map(as_expression, xs), equation=equation)
