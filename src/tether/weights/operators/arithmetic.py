"""Elementwise operators and matrix products, and operators that change a gradient and not the value."""

from __future__ import annotations

import math

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, received
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Node, Shape, Term, as_expression, provide, register
from tether.weights.leaves import Constant

# --------------------------------------------------------------------------- arithmetic
# Arithmetic under NumPy's broadcasting.


SUM, PRODUCT, UNARY = 10, 20, 60


def result_type(*dtypes: str) -> str:
    """Keras's promotion; `"int"` and `"float"` stand for Python numbers and are weak."""
    weak = {"int": int, "float": float}
    return str(keras.backend.result_type(*(weak.get(dtype, dtype) for dtype in dtypes)))


class Binary(Node):
    """An operator of two operands, elementwise under broadcasting."""

    arity = 2
    symbol: str
    binding: int
    associative: bool = True

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The broadcast of both shapes."""
        return tuple(np.broadcast_shapes(*shapes))

    def infer_dtype(self, *dtypes: str) -> str:
        return result_type(*dtypes)

    def format(self, *terms: Term) -> Term:
        """`a + b`, with parentheses where they change the meaning."""
        left, right = terms
        tighter = self.binding if self.associative else self.binding + 1
        return Term(f"{left.inside(self.binding)} {self.symbol} {right.inside(tighter)}", self.binding)

    def _constant(self) -> tuple[int, Constant] | None:
        """Which operand is a constant that leaves the other's shape as it is."""
        for place, operand in enumerate(self.operands):
            other = self.operands[1 - place]
            if isinstance(operand, Constant) and (operand.number is not None or other.shape == self.shape):
                return place, operand
        return None

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Axes that meet are one."""
        return links.broadcast(self.shape or (), *operands)

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The same shape, beside a number."""
        found = self._constant_number()
        return shape if found is not None else None

    def _constant_number(self) -> tuple[int, int | float] | None:
        for place, operand in enumerate(self.operands):
            if isinstance(operand, Constant) and operand.number is not None:
                return place, operand.number
        return None


@register
class Add(Binary):
    """The sum `a + b` of two expressions."""

    name, symbol, binding = "add", "+", SUM

    def compute(self, *values: Tensor) -> Tensor:
        return keras_seam.add(*values)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value less the constant."""
        found = self._constant()
        if found is None:
            return None
        place, constant = found
        rest = keras.ops.subtract(value, constant.tensor())
        return [None, rest] if place == 0 else [rest, None]


@register
class Subtract(Binary):
    """The difference `a - b` of two expressions."""

    name, symbol, binding, associative = "subtract", "-", SUM, False

    def compute(self, *values: Tensor) -> Tensor:
        return keras_seam.subtract(*values)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value plus the constant, or the constant less the value."""
        found = self._constant()
        if found is None:
            return None
        place, constant = found
        if place == 0:
            return [None, keras.ops.subtract(constant.tensor(), value)]
        return [keras.ops.add(value, constant.tensor()), None]


@register
class Multiply(Binary):
    """The product `a * b`, element by element."""

    name, symbol, binding = "multiply", "*", PRODUCT

    def compute(self, *values: Tensor) -> Tensor:
        return keras_seam.multiply(*values)

    def format(self, *terms: Term) -> Term:
        """`a * b`, with parentheses where people need them."""
        left, right = terms
        # `a * (b @ c)` keeps its parentheses: beside `@` people do not read from left to right.
        keeps = isinstance(self.operands[1], (MatMul, Divide)) or (right.binding == PRODUCT and " @ " in right.text)
        right_text = f"({right.text})" if keeps and right.binding < 100 else right.inside(self.binding)
        return Term(f"{left.inside(self.binding)} * {right_text}", self.binding)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value divided by the constant, unless that has a zero."""
        found = self._constant()
        if found is None:
            return None
        place, constant = found
        if np.any(np.asarray(constant.number if constant.array is None else constant.array) == 0):
            return None
        rest = keras.ops.divide(value, constant.tensor())
        return [None, rest] if place == 0 else [rest, None]


@register
class Divide(Binary):
    """The quotient `a / b`, element by element."""

    name, symbol, binding, associative = "divide", "/", PRODUCT, False

    def infer_dtype(self, *dtypes: str) -> str:
        """Keras's promotion, at least to a float."""
        return result_type(*dtypes, "float")

    def compute(self, *values: Tensor) -> Tensor:
        return keras.ops.true_divide(*values)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value times the constant that it is divided by."""
        found = self._constant()
        if found is None or found[0] == 0:
            return None
        return [keras.ops.multiply(value, found[1].tensor()), None]


@register
class MatMul(Node):
    """`a @ b`, over the last two axes."""

    name, arity = "matmul", 2

    def infer_shape(self, *shapes: Shape) -> Shape:
        """Rows of the first, columns of the second; leading axes broadcast."""
        a, b = shapes
        if not a or not b or a[-1] != b[max(len(b) - 2, 0)]:
            left, right = self.operands
            raise ShapeMismatch(
                f"The shapes in {self.notation()} do not fit: {left.notation()} has shape {a} and {right.notation()} "
                f"has shape {b}. The last size of the first must equal the last but one of the second."
            )
        rows = a[-2:-1]
        columns = b[-1:] if len(b) > 1 else ()
        return (*np.broadcast_shapes(a[:-2], b[:-2]), *rows, *columns)

    def infer_dtype(self, *dtypes: str) -> str:
        return result_type(*dtypes)

    def compute(self, *values: Tensor) -> Tensor:
        return keras_seam.matmul(*values)

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Rows of the first, columns of the second; the inner axis is in neither."""
        a, b = operands
        links.same(a[-1], b[max(len(b) - 2, 0)])
        columns = b[-1:] if len(b) > 1 else ()
        batch = len(self.shape or ()) - len(a[-2:-1]) - len(columns)
        return (*links.broadcast((self.shape or ())[:batch], a[:-2], b[:-2]), *a[-2:-1], *columns)

    def format(self, *terms: Term) -> Term:
        left, right = terms
        left_text = left.inside(PRODUCT) if not isinstance(self.operands[0], Binary) else left.inside(100)
        return Term(f"{left_text} @ {right.inside(PRODUCT + 1)}", PRODUCT)


@register
class Negative(Node):
    """The negative of each number."""

    name = "negative"

    def infer_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def compute(self, *values: Tensor) -> Tensor:
        return keras.ops.negative(values[0])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        return operands[0]

    def format(self, *terms: Term) -> Term:
        return Term(f"-{terms[0].inside(UNARY)}", UNARY)

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        return [keras.ops.negative(value)]


def add(x1: object, x2: object) -> Expression:
    """`x1 + x2` under NumPy's broadcasting.

    Args:
        x1: A weight, an expression, a number or an array.
        x2: The same. Its shape has to broadcast with that of `x1`.

    Returns:
        The expression, of the shape to which both broadcast. It equals what the operator `+` gives.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight((3, 4), "ones", name="w")
    b = tether.Weight((4,), "ones", name="b")
    total = tether.ops.add(w, b)
    assert total == w + b and total.shape == (3, 4)
    ```
    """
    return Add(as_expression(x1), as_expression(x2))


def subtract(x1: object, x2: object) -> Expression:
    """`x1 - x2` under NumPy's broadcasting.

    Args:
        x1: A weight, an expression, a number or an array.
        x2: The same. Its shape has to broadcast with that of `x1`.

    Returns:
        The expression, of the shape to which both broadcast. It equals what the operator `-` gives.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight((3, 4), "ones", name="w")
    b = tether.Weight((4,), "ones", name="b")
    difference = tether.ops.subtract(w, b)
    assert difference == w - b and difference.shape == (3, 4)
    ```
    """
    return Subtract(as_expression(x1), as_expression(x2))


def multiply(x1: object, x2: object) -> Expression:
    """`x1 * x2`, elementwise, under NumPy's broadcasting.

    Args:
        x1: A weight, an expression, a number or an array.
        x2: The same. Its shape has to broadcast with that of `x1`.

    Returns:
        The expression, of the shape to which both broadcast. It equals what the operator `*` gives.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight((3, 4), "ones", name="w")
    b = tether.Weight((4,), "ones", name="b")
    product = tether.ops.multiply(w, b)
    assert product == w * b and product.shape == (3, 4)
    ```
    """
    return Multiply(as_expression(x1), as_expression(x2))


def divide(x1: object, x2: object) -> Expression:
    """`x1 / x2`, elementwise, under NumPy's broadcasting.

    Args:
        x1: A weight, an expression, a number or an array.
        x2: The same. Its shape has to broadcast with that of `x1`.

    Returns:
        The expression, of the shape to which both broadcast. It equals what the operator `/` gives.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight((3, 4), "ones", name="w")
    b = tether.Weight((4,), "ones", name="b")
    quotient = tether.ops.divide(w, b)
    assert quotient == w / b and quotient.shape == (3, 4)
    ```
    """
    return Divide(as_expression(x1), as_expression(x2))


def matmul(x1: object, x2: object) -> Expression:
    """`x1 @ x2`: `(..., n, k)` and `(..., k, m)` give `(..., n, m)`.

    Args:
        x1: A weight, an expression, a number or an array, of shape `(..., n, k)`, or `(k,)`.
        x2: The same, of shape `(..., k, m)`, or `(k,)`. Leading axes broadcast.

    Returns:
        The expression, of shape `(..., n, m)`; an axis that an operand of one axis would have had is left out.

    Raises:
        ShapeMismatch: The inner sizes differ, or the leading axes do not broadcast.

    Example:
    ```python
    a, b = tether.Weight((8, 2), name="a"), tether.Weight((2, 4), name="b")
    layer = tether.tie(keras.layers.Dense(4), kernel=tether.ops.matmul(a, b))
    assert tether.ops.matmul(a, b).shape == (8, 4)
    ```
    """
    return MatMul(as_expression(x1), as_expression(x2))


def negative(x: object) -> Expression:
    """The negative of each number of `x`.

    Args:
        x: A weight, an expression, a number or an array, of any shape.

    Returns:
        The expression `-x`, of the shape of `x`.

    Raises:
        TypeError: `x` is none of these.

    Example:
    ```python
    w = tether.Weight((2,), "ones", name="w")
    assert tether.ops.negative(w) == -w
    assert tether.ops.negative(w).numpy().tolist() == [-1, -1]
    ```
    """
    return Negative(as_expression(x))


# --------------------------------------------------------------------------- gradients
# The same value with another gradient.


class _Same(Node):
    """The value of its operand."""

    def infer_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        return operands[0]

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        return [value]


@register
class StopGradient(_Same):
    """No gradient through this use."""

    name, elementwise_cost, stops_gradient = "stop_gradient", False, True

    def compute(self, *values: Tensor) -> Tensor:
        """The value, cut off from its gradient."""
        return keras.ops.stop_gradient(values[0])

    def format(self, *terms: Term) -> Term:
        return Term(f"{terms[0].inside(100)}.stop_gradient()")


@register
class ScaleGradient(_Same):
    """The gradient through this use, multiplied by a number."""

    name, accepts = "scale_gradient", ("scale",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The scale is a finite number."""
        scale = given.get("scale")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise InvalidConfig(f"A gradient's scale is a finite number. {received(scale=scale)}")
        return {"scale": float(scale)}

    def compute(self, *values: Tensor) -> Tensor:
        """The value, with its gradient scaled."""
        # x + scale * 0, with the gradient of scale * x: the value stays x to the last bit.
        still = keras.ops.stop_gradient(values[0])
        return keras.ops.add(still, keras.ops.multiply(self.parameters["scale"], keras.ops.subtract(values[0], still)))

    def format(self, *terms: Term) -> Term:
        return Term(f"{terms[0].inside(100)}.scale_gradient({self.parameters['scale']:g})")


def stop_gradient(x: object) -> Expression:
    """`x`; no gradient flows through this use of it.

    Args:
        x: A weight, an expression, a number or an array, of any shape.

    Returns:
        The expression, of the shape and value of `x`. A weight of which every use is stopped does not train.

    Raises:
        TypeError: `x` is none of these.

    Example:
    ```python
    base = tether.Weight((8, 4), name="base")
    change = tether.Weight((8, 4), "zeros", name="change")
    layer = tether.tie(keras.layers.Dense(4, use_bias=False), kernel=tether.ops.stop_gradient(base) + change)
    layer.build((None, 8))
    assert [variable.path for variable in layer.trainable_weights] == ["change"]
    ```
    """
    x = as_expression(x)
    return x if isinstance(x, StopGradient) else StopGradient(x)


def scale_gradient(x: object, scale: float) -> Expression:
    """`x`; the gradient through this use of it is multiplied by `scale`.

    Args:
        x: A weight, an expression, a number or an array, of any shape.
        scale: A number.

    Returns:
        The expression, of the shape and value of `x`, to the last bit.

    Raises:
        InvalidConfig: The scale is no finite number.

    Example:
    ```python
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(4), kernel=codec)
    decode = tether.tie(keras.layers.Dense(8), kernel=tether.ops.scale_gradient(codec.T, 0.1))
    ```
    """
    return ScaleGradient(as_expression(x), scale=scale)


provide(add=add, subtract=subtract, multiply=multiply, divide=divide, matmul=matmul, negative=negative)
provide(stop_gradient=stop_gradient, scale_gradient=scale_gradient)
