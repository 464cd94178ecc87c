"""Functions of expressions, named as in `keras.ops`.

They take weights, expressions, numbers and arrays, and return an expression: nothing is computed
until a layer is called or `.value` is read.

Example:
```python
embeddings = tether.ops.concatenate([frozen.stop_gradient(), free], axis=0)
layer = tether.tie(keras.layers.Embedding(1000, 64), embeddings=embeddings)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tether.types import Function
from tether.weights.expression import Expression, as_expression
from tether.weights.operators import arithmetic, choice, function, structure

__all__ = [
    "add", "apply", "cast", "choose", "concatenate", "divide", "einsum", "matmul", "multiply", "negative", "reshape",
    "scale_gradient", "stack", "stop_gradient", "subtract", "take", "transpose", "where",
]  # fmt: skip


def add(x1: Any, x2: Any) -> Expression:
    """`x1 + x2` under NumPy's broadcasting."""
    return arithmetic.add(as_expression(x1), as_expression(x2))


def subtract(x1: Any, x2: Any) -> Expression:
    """`x1 - x2` under NumPy's broadcasting."""
    return arithmetic.subtract(as_expression(x1), as_expression(x2))


def multiply(x1: Any, x2: Any) -> Expression:
    """`x1 * x2`, elementwise, under NumPy's broadcasting."""
    return arithmetic.multiply(as_expression(x1), as_expression(x2))


def divide(x1: Any, x2: Any) -> Expression:
    """`x1 / x2`, elementwise, under NumPy's broadcasting."""
    return arithmetic.divide(as_expression(x1), as_expression(x2))


def matmul(x1: Any, x2: Any) -> Expression:
    """`x1 @ x2`: `(..., n, k)` and `(..., k, m)` give `(..., n, m)`."""
    return arithmetic.matmul(as_expression(x1), as_expression(x2))


def negative(x: Any) -> Expression:
    """`-x`."""
    return arithmetic.negative(as_expression(x))


def transpose(x: Any, axes: Sequence[int] | None = None) -> Expression:
    """`x` with its axes permuted, reversed if `axes` is left out."""
    return structure.transpose(as_expression(x), None if axes is None else tuple(axes))


def reshape(x: Any, newshape: Sequence[int]) -> Expression:
    """`x` in another shape of as many elements; one size may be -1."""
    return structure.reshape(as_expression(x), newshape)


def take(x: Any, indices: Sequence[int], axis: int = 0) -> Expression:
    """The entries of `x` with these numbers along an axis."""
    return structure.take(as_expression(x), indices, axis)


def cast(x: Any, dtype: str) -> Expression:
    """`x` in another dtype."""
    return structure.cast(as_expression(x), dtype)


def concatenate(xs: Sequence[Any], axis: int = 0) -> Expression:
    """Values joined along an axis; the other sizes must agree."""
    return structure.concatenate(xs, axis)


def stack(xs: Sequence[Any], axis: int = 0) -> Expression:
    """Values of one shape joined along a new axis."""
    return structure.stack(xs, axis)


def choose(index: Any, options: Sequence[Any]) -> Expression:
    """One of several values of one shape, by a whole number: usually an argument with a default.

    The options that are not chosen get a gradient of zero.
    """
    return choice.choose(index, options)


def where(condition: Any, x1: Any, x2: Any) -> Expression:
    """`x1` where the condition holds (is not zero), `x2` elsewhere, under NumPy's broadcasting."""
    return structure.where(condition, x1, x2)


def einsum(subscripts: str, *operands: Any) -> Expression:
    """A contraction in Einstein's notation, such as `"ij,jk->ik"`: explicit output, no ellipsis."""
    return structure.einsum(subscripts, *operands)


def stop_gradient(x: Any) -> Expression:
    """`x`; no gradient flows through this use of it."""
    return arithmetic.stop_gradient(as_expression(x))


def scale_gradient(x: Any, scale: float) -> Expression:
    """`x`; the gradient through this use of it is multiplied by `scale`."""
    return arithmetic.scale_gradient(as_expression(x), scale)


def apply(function_: Function, *xs: Any) -> Expression:
    """`function_(*xs)`, for a function of ordinary Keras code that a file can name.

    Args:
        function_: A function of `keras.ops`, or one decorated with
            `@keras.saving.register_keras_serializable()`. It gets tensors (a Python number stays one) and returns
            one tensor whose shape follows from their shapes. Once, it is run on tensors without values.
        *xs: Its arguments.

    Raises:
        TetherError: The function is a lambda, is not registered, or fails for these shapes.
    """
    return function.apply(function_, *xs)
