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
    return function  # type: ignore[no-any-return]


def _name_of(function: Any) -> str:
    name = getattr(function, "__name__", "")
    if not name.startswith("_") and getattr(keras.ops, name, None) is function:
        return _OPS + name
    registered = keras.saving.get_registered_name(function) if callable(function) else name
    if not name or keras_seam.registered_function(registered) is not function:
        raise TetherError(
            "`apply` takes a function that a file can name: one of `keras.ops`, or one decorated with "
            f"`@keras.saving.register_keras_serializable()`. {received(function=function)}"
        )
    return str(registered)


@register
class Apply(Node):
    """`function(*operands)`, for a function of `keras.ops` calls."""

    name, arity = "apply", None

    @classmethod
    def check_parameters(cls, *, function: Any = None) -> dict[str, Any]:
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
        dtypes = tuple(operand.dtype or keras.config.floatx() for operand in self.operands)
        return tuple(self._spec(shapes, dtypes).shape)

    def infer_dtype(self, *dtypes: str) -> str:
        shapes = tuple(operand.shape for operand in self.operands)
        if any(shape is None for shape in shapes):
            return dtypes[0]
        return str(self._spec(shapes, dtypes).dtype)  # type: ignore[arg-type]

    def compute(self, *values: Tensor) -> Tensor:
        return _find(self.parameters["function"])(*values)

    def format(self, *terms: Term) -> Term:
        short = self.parameters["function"].rpartition(">")[2].removeprefix(_OPS)
        return Term(f"{short}({', '.join(term.text for term in terms)})")


def apply(function: Callable[..., Any], *xs: Any) -> Expression:
    """A registered function of expressions."""
    return Apply(*map(as_expression, xs), function=_name_of(function))
