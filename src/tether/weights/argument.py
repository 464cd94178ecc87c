"""A leaf without storage that is bound when the layer is called: a choice, a depth, a computed tensor."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from tether.errors import ShapeMismatch, TetherError, UnboundArgument, received
from tether.weights.checks import as_dtype, as_int
from tether.weights.expression import MAX_AXES, MAX_ELEMENTS, Expression, Shape, Tensor, Term

_bound = threading.local()


class Argument(Expression):
    """A value that an expression is given at call time.

    Two arguments of one name, shape and dtype are the same argument, also in two files.

    Args:
        name: What it is called in notation and in files.
        shape: The shape of the tensor that will be bound, `()` for a number.
        dtype: Its dtype; the floating-point default of Keras if left out.

    Example:
    ```python
    strength = tether.weights.Argument("strength")
    layer = tether.tie(keras.layers.Dense(4), kernel=base + strength * delta)
    with tether.weights.bind({strength: 0.5}):
        y = layer(x)
    ```
    """

    __slots__ = ("__weakref__", "_dtype", "_shape", "name")
    name: str
    _shape: Shape
    _dtype: str

    def __init__(self, name: Any, shape: Shape = (), dtype: str | None = None) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise TetherError(f"An argument's name is an identifier. {received(name=name)}")
        sizes = tuple(as_int(size, "a size") for size in shape)
        if any(size < 0 for size in sizes) or len(sizes) > MAX_AXES or math.prod(sizes) > MAX_ELEMENTS:
            raise TetherError(f"An argument's shape has sizes of 0 or more, within reason. {received(shape=shape)}")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_shape", sizes)
        object.__setattr__(self, "_dtype", as_dtype(keras.config.floatx() if dtype is None else dtype))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Expressions are immutable. {received(attribute=name)}")

    @property
    def shape(self) -> Shape:
        """The shape of what will be bound."""
        return self._shape

    @property
    def dtype(self) -> str:
        """The dtype of what will be bound."""
        return self._dtype

    def tensor(self) -> Tensor:
        """What is bound now.

        Raises:
            UnboundArgument: Nothing is.
        """
        bindings: dict[Argument, Tensor] = getattr(_bound, "values", {})
        if self not in bindings:
            raise UnboundArgument(
                f"The argument {self.name!r} has no value here. Bind it around the call: "
                f"`with tether.weights.bind({{argument: value}}): ...`."
            )
        return bindings[self]

    def format(self) -> Term:
        """Its name."""
        return Term(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Argument) and (self.name, self._shape, self._dtype) == (
            other.name,
            other._shape,
            other._dtype,
        )

    def __hash__(self) -> int:
        return hash((self.name, self._shape, self._dtype))

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> Any:
        return (Argument, (self.name, self._shape, self._dtype))


@contextlib.contextmanager
def bind(values: Mapping[Argument, Any]) -> Iterator[None]:
    """Binds arguments for the calls inside the block, on this thread; inner bindings win.

    Args:
        values: A tensor, an array or a number for each argument, of the argument's shape.

    Raises:
        ShapeMismatch: A value has another shape.
        TetherError: A key is no argument.
    """
    before: dict[Argument, Tensor] = getattr(_bound, "values", {})
    tensors = {}
    for argument, value in values.items():
        if not isinstance(argument, Argument):
            raise TetherError(f"Only an Argument can be bound. {received(argument=argument)}")
        tensor = keras.ops.convert_to_tensor(value, dtype=argument.dtype)
        if tuple(tensor.shape) != argument.shape:
            raise ShapeMismatch(
                f"The argument {argument.name!r} has shape {argument.shape}. {received(shape=tuple(tensor.shape))}"
            )
        tensors[argument] = tensor
    _bound.values = {**before, **tensors}
    try:
        yield
    finally:
        _bound.values = before


def bindings() -> dict[Argument, Tensor]:
    """All arguments bound on this thread."""
    return getattr(_bound, "values", {})
