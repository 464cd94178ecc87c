"""A function of the user's, applied to expressions: by its registered name, never by its code."""

from __future__ import annotations

import functools

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, received
from tether.types import Config, Function, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Node, Shape, Term, as_expression, register
from tether.weights.leaves import Constant

_OPS = "keras.ops."
_NUMBER_BY_NUMBER = {
    "abs", "absolute", "add", "arctan", "ceil", "clip", "cos", "divide", "elu", "equal", "erf", "exp", "expm1",
    "floor", "gelu", "greater", "greater_equal", "hard_sigmoid", "leaky_relu", "less", "less_equal", "log", "log1p",
    "log_sigmoid", "logical_and", "logical_not", "logical_or", "maximum", "minimum", "multiply", "negative",
    "not_equal", "power", "reciprocal", "relu", "round", "rsqrt", "selu", "sigmoid", "sign", "silu", "sin",
    "softplus", "softsign", "sqrt", "square", "subtract", "swish", "tan", "tanh", "true_divide", "where",
}  # fmt: skip
"""Functions of `keras.ops` that make each number of the result from one number of each argument."""


def _find(name: object) -> Function:
    if not isinstance(name, str):
        raise InvalidConfig(f"A function is named by a string. {received(function=name)}")
    if name.startswith(_OPS):
        attribute = name.removeprefix(_OPS)
        function = None if attribute.startswith("_") or "." in attribute else getattr(keras.ops, attribute, None)
    else:
        function = keras_seam.registered_function(name)
    if not callable(function) or isinstance(function, type):
        raise InvalidConfig(
            f"No function is registered as {name!r}. Decorate it with "
            "`@keras.saving.register_keras_serializable()` and import its module before loading."
        )
    return function


def _name_of(function: object) -> str:
    name = getattr(function, "__name__", "")
    if not name.startswith("_") and getattr(keras.ops, name, None) is function:
        return _OPS + name
    registered = keras.saving.get_registered_name(function) if name else ""
    if not registered or keras_seam.registered_function(registered) is not function:
        raise TetherError(
            "`apply` takes a function that a file can name: one of `keras.ops`, or one decorated with "
            f"`@keras.saving.register_keras_serializable()`. {received(function=function)}"
        )
    return str(registered)


@functools.lru_cache(maxsize=256)
def _traced(function: Function, operands: tuple[Constant | tuple[Shape, str], ...], floatx: str) -> object:
    """What a function returns for constants and for tensors of a shape and a dtype: a symbolic tensor, or a type.

    Remembered, because an expression whose weights got their shapes late is asked for its dtype again and again; so
    `floatx`, which a function may read, is given too.
    """
    returned: list[object] = []

    def call(*tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        returned[:] = [function(*(o.tensor() if isinstance(o, Constant) else next(rest) for o in operands))]
        return returned[0]

    specs = [keras.KerasTensor(o[0], dtype=o[1]) for o in operands if not isinstance(o, Constant)]
    output = keras_seam.trace(call, *specs)
    return output if keras.ops.is_tensor(returned[0]) else type(returned[0])


@register
class Apply(Node):
    """`function(*operands)`, for a function of `keras.ops` calls."""

    name, arity, accepts = "apply", None, ("function",)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The name of a function that is registered here."""
        function = given.get("function")
        _find(function)
        return {"function": function}

    def _spec(self, shapes: tuple[Shape, ...], dtypes: tuple[str, ...]) -> keras.KerasTensor:
        floatx = keras.config.floatx()
        numbers = {"int": "int32", "float": floatx}
        operands = tuple(
            operand if isinstance(operand, Constant) else (shape, numbers.get(dtype, dtype))
            for operand, shape, dtype in zip(self.operands, shapes, dtypes, strict=True)
        )
        try:
            output = _traced(_find(self.parameters["function"]), operands, floatx)
        except Exception as error:
            raise TetherError(
                f"The shape of {self.notation()} could not be found: {type(error).__name__}: {error} A function for "
                "`apply` computes with what it is given and with `keras.ops`, on tensors that have a shape and no "
                "values yet."
            ) from error
        if not isinstance(output, keras.KerasTensor) or None in output.shape:
            raise TetherError(f"A function for `apply` returns one tensor of a known shape. {received(output=output)}")
        return output

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The shape of what the function returns for tensors without values."""
        dtypes = tuple(operand.dtype or keras.config.floatx() for operand in self.operands)
        return tuple(self._spec(shapes, dtypes).shape)

    def infer_dtype(self, *dtypes: str) -> str | None:
        """The dtype of what the function returns, once the shapes are known."""
        shapes = tuple(operand.shape for operand in self.operands)
        known = tuple(shape for shape in shapes if shape is not None)
        return str(self._spec(known, dtypes).dtype) if len(known) == len(shapes) else None

    def compute(self, *values: Tensor) -> Tensor:
        """What the function returns.

        Raises:
            ShapeMismatch: Its shape depends on the values.
        """
        value = _find(self.parameters["function"])(*values)
        found = tuple(value.shape)
        if self.shape is not None and None not in found and found != self.shape:
            raise ShapeMismatch(
                f"{self.notation()} has shape {self.shape}, as the function returned it for tensors without values, "
                f"and now it returned another: a shape must not depend on values. {received(shape=found)}"
            )
        return value

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Axes that meet are one, of a function that is known to go number by number."""
        if self.parameters["function"].removeprefix(_OPS) not in _NUMBER_BY_NUMBER:
            return None
        return links.broadcast(self.shape or (), *operands)

    def format(self, *terms: Term) -> Term:
        short = self.parameters["function"].rpartition(">")[2].removeprefix(_OPS)
        return Term(f"{short}({', '.join(term.text for term in terms)})")


def apply(function_: Function, *xs: object) -> Expression:
    """`function_(*xs)`, for a function of ordinary Keras code that a file can name.

    Args:
        function_: A function of `keras.ops`, or one decorated with
            `@keras.saving.register_keras_serializable()`. It gets tensors (a Python number stays one) and returns
            one tensor whose shape follows from their shapes. Once, it is run on tensors without values.
        *xs: Its arguments: weights, expressions, arrays and numbers, of the shapes that it takes.

    Returns:
        The expression, of the shape that the function returns.

    Raises:
        TetherError: The function is a lambda, is not registered, or fails for these shapes.

    Example:
    ```python
    w = tether.Weight((8, 4), name="w")
    layer = tether.tie(keras.layers.Dense(4), kernel=tether.ops.apply(keras.ops.tanh, w))
    ```
    """
    return Apply(*map(as_expression, xs), function=_name_of(function_))
