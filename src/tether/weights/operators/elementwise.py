"""Functions of each number of a value, of two values number by number, and of all numbers along axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, NotATensor, NotInvertible, ShapeMismatch, as_int, as_ints, received
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Node, Shape, Term, as_expression, provide, register
from tether.weights.operators.arithmetic import Binary, result_type

POWER = 70
"""How tightly `**` binds: more than a sign."""
LARGEST = 1000
"""An exponent beyond that makes zero or infinity of every number."""


def _named(given: Config, table: Config) -> str:
    """The name of a function, which a table has."""
    name = given.get("function")
    if not isinstance(name, str) or name not in table:
        raise InvalidConfig(f"The function is one of {', '.join(map(repr, table))}. {received(function=name)}")
    return name


class _Invertible(Node):
    """A function of one operand that takes values of some kind only, or all."""

    def infer_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        return operands[0]

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape

    def _checked(self, value: Tensor, right: Tensor, expected: str) -> Tensor:
        """The value, if all of it is right."""
        if not bool(keras.ops.convert_to_numpy(keras.ops.all(right))):
            array = np.asarray(keras_seam.to_numpy(keras.ops.cast(value, "float32"), in_step=True))
            raise NotInvertible(
                f"{self.notation()} takes only {expected}, so this value cannot be assigned to it. "
                f"{received(least=float(array.min()), most=float(array.max()))}"
            )
        return value

    @property
    def _of_floats(self) -> bool:
        dtype = self.operands[0].dtype
        return dtype is not None and keras_seam.is_float(dtype)


# --------------------------------------------------------------------------- of one operand


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": keras.ops.absolute,
    "exp": keras.ops.exp,
    "log": keras.ops.log,
    "sqrt": keras.ops.sqrt,
}


@register
class Elementwise(_Invertible):
    """A function of each number: one of a fixed table, by its name."""

    name, accepts = "elementwise", ("function",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The function is one of the table."""
        return {"function": _named(given, _FUNCTIONS)}

    def infer_dtype(self, *dtypes: str) -> str:
        """At least a float, but for the absolute value."""
        return dtypes[0] if self.parameters["function"] == "abs" else result_type(*dtypes, "float")

    def compute(self, *values: Tensor) -> Tensor:
        return _FUNCTIONS[self.parameters["function"]](values[0])

    def format(self, *terms: Term) -> Term:
        """`exp(a)`."""
        return Term(f"{self.parameters['function']}({terms[0].text})")

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The logarithm of what is above zero, the exponential, or the square of what is not below zero."""
        function = self.parameters["function"]
        if function == "abs" or not self._of_floats:
            return None
        if function == "log":
            return [keras.ops.exp(value)]
        if function == "exp":
            return [keras.ops.log(self._checked(value, keras.ops.greater(value, 0), "numbers above zero"))]
        return [
            keras.ops.square(self._checked(value, keras.ops.greater_equal(value, 0), "numbers that are not below zero"))
        ]


@register
class Power(_Invertible):
    """`a ** 2`: each number to the power of one that is fixed."""

    name, accepts = "power", ("exponent",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The exponent is a finite number; a whole one is an integer."""
        exponent = given.get("exponent")
        if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not -LARGEST < exponent < LARGEST:
            raise InvalidConfig(
                f"An exponent is a number between {-LARGEST} and {LARGEST}. {received(exponent=exponent)}"
            )
        return {"exponent": int(exponent) if float(exponent).is_integer() else exponent}

    @property
    def _factor(self) -> int | float:
        """The exponent, as a float where the result of integers would be none."""
        exponent = self.parameters["exponent"]
        return float(exponent) if exponent < 0 else exponent

    def infer_dtype(self, *dtypes: str) -> str:
        return result_type(*dtypes, type(self._factor).__name__)

    def compute(self, *values: Tensor) -> Tensor:
        return keras.ops.power(values[0], self._factor)

    def format(self, *terms: Term) -> Term:
        return Term(f"{terms[0].inside(POWER + 1)} ** {self.parameters['exponent']!r}", POWER)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The root: of every number if the exponent is odd, of those above zero if it is no whole number."""
        exponent = self.parameters["exponent"]
        odd = isinstance(exponent, int)
        if not self._of_floats or (odd and exponent % 2 == 0):
            return None
        if exponent < 0:
            value = self._checked(value, keras.ops.not_equal(value, 0), "numbers other than zero")
        if not odd:
            value = self._checked(value, keras.ops.greater_equal(value, 0), "numbers that are not below zero")
        root = keras.ops.power(keras.ops.absolute(value), 1.0 / exponent)
        return [keras.ops.multiply(keras.ops.sign(value), root)]


# --------------------------------------------------------------------------- of two operands

_EXTREMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "maximum": keras.ops.maximum,
    "minimum": keras.ops.minimum,
}


@register
class Extreme(Binary):
    """The larger, or the smaller, of two numbers, place by place."""

    name, accepts = "extreme", ("function",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The function is one of the table."""
        return {"function": _named(given, _EXTREMES)}

    def compute(self, *values: Tensor) -> Tensor:
        return _EXTREMES[self.parameters["function"]](*values)

    def format(self, *terms: Term) -> Term:
        """`maximum(a, 0.0)`."""
        return Term(f"{self.parameters['function']}({', '.join(term.text for term in terms)})")


# --------------------------------------------------------------------------- along axes

_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": keras.ops.sum,
    "mean": keras.ops.mean,
    "max": keras.ops.max,
    "min": keras.ops.min,
}


@register
class Reduction(Node):
    """The sum, the mean, the largest or the smallest of the numbers along axes."""

    name, accepts = "reduction", ("function", "axis", "keepdims")

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """A function of the table, axes (or all), and whether they stay with the size 1."""
        axis, keepdims = given.get("axis"), given.get("keepdims", False)
        if not isinstance(keepdims, bool):
            raise InvalidConfig(f"`keepdims` is True or False. {received(keepdims=keepdims)}")
        if axis is not None:
            axis = as_ints(axis, "axis") if isinstance(axis, (list, tuple)) else as_int(axis, "axis")
        return {"function": _named(given, _REDUCTIONS), "axis": axis, "keepdims": keepdims}

    def _axes(self, shape: Shape) -> tuple[int, ...]:
        given, rank = self.parameters["axis"], len(shape)
        if given is None:
            return tuple(range(rank))
        axes = tuple(given if isinstance(given, tuple) else (given,))
        found = {axis % rank for axis in axes if -rank <= axis < rank}
        if len(found) != len(axes):
            raise ShapeMismatch(
                f"{self.notation()} needs axes of {self.operands[0].notation()}, each once, which has shape {shape}. "
                f"{received(axis=given)}"
            )
        return tuple(sorted(found))

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The sizes of the other axes."""
        (shape,) = shapes
        axes = self._axes(shape)
        if self.parameters["function"] in ("max", "min") and any(shape[axis] == 0 for axis in axes):
            raise ShapeMismatch(f"{self.notation()} would be that of no numbers. {received(shape=shape)}")
        kept = self.parameters["keepdims"]
        return tuple(1 if axis in axes else size for axis, size in enumerate(shape) if kept or axis not in axes)

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The other axes."""
        axes, kept = self._axes(self.operands[0].shape or ()), self.parameters["keepdims"]
        rows = enumerate(operands[0])
        return tuple(() if axis in axes else row for axis, row in rows if kept or axis not in axes)

    def infer_dtype(self, *dtypes: str) -> str:
        """That of the operand: a mean is a float at least, and small integers are added in 32 bits."""
        if self.parameters["function"] == "mean":
            return result_type(*dtypes, "float")
        small = ("bool", "int8", "int16", "uint8", "uint16", "uint32")
        return "int32" if self.parameters["function"] == "sum" and dtypes[0] in small else result_type(*dtypes)

    def compute(self, *values: Tensor) -> Tensor:
        value = keras.ops.convert_to_tensor(values[0])
        dtype = keras.backend.standardize_dtype(value.dtype)
        wanted = self.infer_dtype(dtype)
        if wanted != dtype:
            value = keras.ops.cast(value, wanted)
        axes = self._axes(tuple(value.shape))
        if not axes:
            return value
        return _REDUCTIONS[self.parameters["function"]](value, axis=axes, keepdims=self.parameters["keepdims"])

    def format(self, *terms: Term) -> Term:
        """`sum(a, axis=0)`."""
        axis = "" if self.parameters["axis"] is None else f", axis={self.parameters['axis']}"
        kept = ", keepdims=True" if self.parameters["keepdims"] else ""
        return Term(f"{self.parameters['function']}({terms[0].text}{axis}{kept})")


# --------------------------------------------------------------------------- as people write them


def abs(x: object) -> Expression:
    """The absolute value of each number of `x`, as Python's `abs(x)` gives it too.

    Args:
        x: A weight, an expression, a number or an array, of any shape.

    Returns:
        The expression, of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is none of these.

    Example:
    ```python
    w = tether.Weight(np.array([-1.0, 2.0]), name="w")
    assert tether.ops.abs(w).numpy().tolist() == [1, 2]
    ```
    """
    return Elementwise(as_expression(x), function="abs")


def exp(x: object) -> Expression:
    """The exponential of each number of `x`. A value above zero can be assigned to it.

    Args:
        x: A weight, an expression, a number or an array, of any shape.

    Returns:
        The expression, of the shape of `x`.

    Raises:
        TypeError: `x` is none of these.

    Example:
    ```python
    logarithm = tether.Weight((4,), "zeros", name="logarithm")
    norm = tether.tie(keras.layers.LayerNormalization(), gamma=tether.ops.exp(logarithm))
    ```
    """
    return Elementwise(as_expression(x), function="exp")


def log(x: object) -> Expression:
    """The natural logarithm of each number of `x`. Every value can be assigned to it.

    Args:
        x: A weight, an expression, a number or an array, of any shape.

    Returns:
        The expression, of the shape of `x`.

    Raises:
        TypeError: `x` is none of these.

    Example:
    ```python
    share = tether.Weight((4,), "ones", name="share")
    assert tether.ops.log(share).numpy().tolist() == [0, 0, 0, 0]
    ```
    """
    return Elementwise(as_expression(x), function="log")


def sqrt(x: object) -> Expression:
    """The square root of each number of `x`. A value that is not below zero can be assigned to it.

    Args:
        x: A weight, an expression, a number or an array, of any shape.

    Returns:
        The expression, of the shape of `x`.

    Raises:
        TypeError: `x` is none of these.

    Example:
    ```python
    variance = tether.Weight(np.array([1.0, 4.0]), name="variance")
    assert tether.ops.sqrt(variance).numpy().tolist() == [1, 2]
    ```
    """
    return Elementwise(as_expression(x), function="sqrt")


def power(x: object, exponent: float) -> Expression:
    """`x ** exponent`, for a number as the exponent. Every value can be assigned to it if that is odd.

    Args:
        x: A weight, an expression, a number or an array, of any shape.
        exponent: A number. It is fixed; for one that trains write `tether.ops.apply(keras.ops.power, x, y)`.

    Returns:
        The expression, of the shape of `x`.

    Raises:
        TetherError: The exponent is no finite number.

    Example:
    ```python
    w = tether.Weight(np.array([1.0, 2.0]), name="w")
    assert tether.ops.power(w, 2) == w**2
    assert (w**2).numpy().tolist() == [1, 4]
    ```
    """
    if isinstance(exponent, (np.integer, np.floating)):
        exponent = exponent.item()
    if isinstance(exponent, bool) or not isinstance(exponent, (int, float)):
        raise NotATensor(
            "The exponent of `**` is a number. For an expression or an array in its place write "
            f"`tether.ops.apply(keras.ops.power, x, y)`. {received(exponent=exponent)}"
        )
    return Power(as_expression(x), exponent=exponent)


def _power(x: object, exponent: object) -> Expression:
    """What the operator `**` gives: its base is an expression."""
    if isinstance(exponent, Expression) and not isinstance(x, Expression):
        raise NotATensor(
            f"The exponent of `**` is a number, and {exponent.notation()} is an expression. Write "
            f"`tether.ops.exp(math.log(base) * ({exponent.notation()}))` for a number above zero as the base. "
            f"{received(base=x)}"
        )
    return power(x, exponent)  # type: ignore[arg-type]


def maximum(x1: object, x2: object) -> Expression:
    """The larger of two numbers, place by place, under NumPy's broadcasting.

    Args:
        x1: A weight, an expression, a number or an array.
        x2: The same. Its shape has to broadcast with that of `x1`.

    Returns:
        The expression, of the shape to which both broadcast.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight(np.array([-1.0, 2.0]), name="w")
    assert tether.ops.maximum(w, 0).numpy().tolist() == [0, 2]
    ```
    """
    return Extreme(as_expression(x1), as_expression(x2), function="maximum")


def minimum(x1: object, x2: object) -> Expression:
    """The smaller of two numbers, place by place, under NumPy's broadcasting.

    Args:
        x1: A weight, an expression, a number or an array.
        x2: The same. Its shape has to broadcast with that of `x1`.

    Returns:
        The expression, of the shape to which both broadcast.

    Raises:
        ShapeMismatch: The shapes do not broadcast.

    Example:
    ```python
    w = tether.Weight(np.array([-1.0, 2.0]), name="w")
    assert tether.ops.minimum(w, 0).numpy().tolist() == [-1, 0]
    ```
    """
    return Extreme(as_expression(x1), as_expression(x2), function="minimum")


Axis = int | Sequence[int] | None
"""One axis, several, or all."""


def _reduction(function: str, x: object, axis: Any, keepdims: bool) -> Expression:
    axis = tuple(axis) if isinstance(axis, list) else axis
    return Reduction(as_expression(x), function=function, axis=axis, keepdims=keepdims)


def sum(x: object, axis: Axis = None, keepdims: bool = False) -> Expression:
    """The sum of the numbers along axes; also the method `x.sum(axis)`.

    Args:
        x: A weight, an expression, a number or an array.
        axis: An axis, or several; left out, all.
        keepdims: Whether the axes stay, with the size 1.

    Returns:
        The expression, without these axes.

    Raises:
        ShapeMismatch: `x` has no such axis.
        TetherError: The axis is none.

    Example:
    ```python
    w = tether.Weight((3, 4), "ones", name="w")
    assert w.sum(0).numpy().tolist() == [3, 3, 3, 3]
    centred = w - tether.ops.sum(w, axis=0, keepdims=True) / 3
    ```
    """
    return _reduction("sum", x, axis, keepdims)


def mean(x: object, axis: Axis = None, keepdims: bool = False) -> Expression:
    """The mean of the numbers along axes; also the method `x.mean(axis)`.

    Args:
        x: A weight, an expression, a number or an array.
        axis: An axis, or several; left out, all.
        keepdims: Whether the axes stay, with the size 1.

    Returns:
        The expression, without these axes, of floats.

    Raises:
        ShapeMismatch: `x` has no such axis.
        TetherError: The axis is none.

    Example:
    ```python
    w = tether.Weight((8, 4), name="w")
    layer = tether.tie(keras.layers.Dense(4), kernel=w - w.mean(0))
    ```
    """
    return _reduction("mean", x, axis, keepdims)


def max(x: object, axis: Axis = None, keepdims: bool = False) -> Expression:
    """The largest of the numbers along axes; also the method `x.max(axis)`.

    Args:
        x: A weight, an expression, a number or an array.
        axis: An axis, or several; left out, all.
        keepdims: Whether the axes stay, with the size 1.

    Returns:
        The expression, without these axes.

    Raises:
        ShapeMismatch: `x` has no such axis, or no numbers along it.
        TetherError: The axis is none.

    Example:
    ```python
    w = tether.Weight(np.array([[1.0, 5.0], [3.0, 2.0]]), name="w")
    assert w.max(1).numpy().tolist() == [5, 3]
    ```
    """
    return _reduction("max", x, axis, keepdims)


def min(x: object, axis: Axis = None, keepdims: bool = False) -> Expression:
    """The smallest of the numbers along axes; also the method `x.min(axis)`.

    Args:
        x: A weight, an expression, a number or an array.
        axis: An axis, or several; left out, all.
        keepdims: Whether the axes stay, with the size 1.

    Returns:
        The expression, without these axes.

    Raises:
        ShapeMismatch: `x` has no such axis, or no numbers along it.
        TetherError: The axis is none.

    Example:
    ```python
    w = tether.Weight(np.array([[1.0, 5.0], [3.0, 2.0]]), name="w")
    assert w.min(1).numpy().tolist() == [1, 2]
    ```
    """
    return _reduction("min", x, axis, keepdims)


provide(abs=abs, exp=exp, log=log, sqrt=sqrt, power=_power, maximum=maximum, minimum=minimum)
provide(sum=sum, mean=mean, max=max, min=min)
