"""A function of the user's, applied to expressions: by its registered name, never by its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tether import keras_seam
from tether.errors import InvalidConfig, TetherError, received
from tether.weights.expression import Expression, Node, Shape, Tensor, Term, as_expression
from tether.weights.operators.registry import register

_OPS = "keras.ops."


def _find(name: Any) -> Callable[..., Any]:
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


def _name_of(function: Any) -> str:
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


@register
class Apply(Node):
    """`function(*operands)`, for a function of `keras.ops` calls."""

    name, arity, accepts = "apply", None, ("function",)

    @classmethod
    def check_parameters(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The name of a function that is registered here."""
        function = given.get("function")
        _find(function)
        return {"function": function}

    def _spec(self, shapes: tuple[Shape, ...], dtypes: tuple[str, ...]) -> Any:
        function = _find(self.parameters["function"])
        inputs = [
            keras.KerasTensor(shape, dtype=dtype if dtype not in ("int", "float") else keras.config.floatx())
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        try:
            output = function(*inputs)
        except Exception as error:
            raise TetherError(
                f"The shape of {self.notation()} could not be found: {error} "
                "A function for `apply` is written with `keras.ops`, which also take symbolic tensors."
            ) from error
        if not isinstance(output, keras.KerasTensor) or None in output.shape:
            raise TetherError(f"A function for `apply` returns one tensor of a known shape. {received(output=output)}")
        return output

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The shape of what the function returns for symbolic tensors."""
        dtypes = tuple(operand.dtype or keras.config.floatx() for operand in self.operands)
        return tuple(self._spec(shapes, dtypes).shape)

    def infer_dtype(self, *dtypes: str) -> str | None:
        """The dtype of what the function returns, once the shapes are known."""
        shapes = tuple(operand.shape for operand in self.operands)
        known = tuple(shape for shape in shapes if shape is not None)
        return str(self._spec(known, dtypes).dtype) if len(known) == len(shapes) else None

    def compute(self, *values: Tensor) -> Tensor:
        """What the function returns."""
        return _find(self.parameters["function"])(*values)

    def format(self, *terms: Term) -> Term:
        """`function(a, b)`."""
        short = self.parameters["function"].rpartition(">")[2].removeprefix(_OPS)
        return Term(f"{short}({', '.join(term.text for term in terms)})")


def apply(function: Callable[..., Any], *xs: Any) -> Expression:
    """A registered function of expressions."""
    return Apply(*map(as_expression, xs), function=_name_of(function))
