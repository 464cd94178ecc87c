"""Leaves of an expression that store nothing: an argument, bound at the call, and a constant."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np

from tether import keras_seam
from tether.errors import (
    NUMERIC,
    ChosenForEach,
    NotATensor,
    ShapeMismatch,
    TetherError,
    UnboundArgument,
    as_dtype,
    as_int,
    received,
)
from tether.types import Array, Function, Tensor
from tether.weights.expression import MAX_AXES, MAX_ELEMENTS, Expression, Shape, Term, provide

# --------------------------------------------------------------------------- arguments
# A leaf without storage that is bound when the layer is called: a choice, a depth, a computed tensor.


Key = tuple[str, Shape, str]

MAX_CHOICES = 10_000


class _Bound(threading.local):
    """What is bound on this thread: there from the start, so that `torch.compile` does not see it come to be."""

    def __init__(self) -> None:
        self.values: dict[Key, Tensor | int] = {}


_bound = _Bound()


class Argument(Expression):
    """A value that an expression is given at call time.

    A layer that is tied to an expression with an argument takes it as a keyword of its call:
    `layer(x, strength=0.5)`. Two arguments of one name, shape and dtype are bound together.

    Args:
        name: What it is called in notation, in files and in the layer's call.
        shape: The shape of the tensor that will be bound, `()` for a number.
        dtype: Its dtype; the floating-point default of Keras if left out.
        default: A number that it is as long as nothing is bound. Left out, it must be bound.
        choices: Names for the numbers 0, 1, 2, ...: the argument is then an index, which may also be given by name.

    Example:
    ```python
    base, delta = (tether.Weight((16, 4), "glorot_uniform", name=name) for name in ("base", "delta"))
    strength = tether.weights.Argument("strength", default=1.0)
    layer = tether.tie(keras.layers.Dense(4), kernel=base + strength * delta)
    y = layer(rows, strength=0.5)
    ```
    """

    __slots__ = ("__weakref__", "_dtype", "_shape", "choices", "default", "name")
    name: str
    default: int | float | None
    choices: tuple[str, ...] | None
    _shape: Shape
    _dtype: str

    def __init__(
        self,
        name: object,
        shape: Shape = (),
        dtype: str | None = None,
        *,
        default: object = None,
        choices: object = None,
    ) -> None:
        if not isinstance(name, str) or not name.isidentifier():
            raise TetherError(f"An argument's name is an identifier. {received(name=name)}")
        sizes = tuple(as_int(size, "a size") for size in shape)
        if any(size < 0 for size in sizes) or len(sizes) > MAX_AXES or math.prod(sizes) > MAX_ELEMENTS:
            raise TetherError(f"An argument's shape has sizes of 0 or more, within reason. {received(shape=shape)}")
        set_slot = object.__setattr__
        set_slot(self, "name", name)
        set_slot(self, "_shape", sizes)
        set_slot(self, "_dtype", as_dtype(keras.config.floatx() if dtype is None else dtype))
        set_slot(self, "choices", None if choices is None else self._checked_choices(choices))
        set_slot(self, "default", None)
        if default is not None:
            if sizes:
                raise TetherError(f"Only an argument of shape () can have a default. {received(shape=shape)}")
            set_slot(self, "default", self.number(default))

    def _checked_choices(self, choices: object) -> tuple[str, ...]:
        if self._shape or not self._dtype.startswith(("int", "uint")):
            raise TetherError(f"An argument with choices is one integer. {received(shape=self._shape)}")
        if not isinstance(choices, (list, tuple)) or not choices or len(choices) > MAX_CHOICES:
            raise TetherError(f"Choices are a list of 1 to {MAX_CHOICES} names. {received(choices=choices)}")
        if not all(isinstance(choice, str) and choice for choice in choices) or len(set(choices)) != len(choices):
            raise TetherError(f"Choices are names, each another one. {received(choices=choices)}")
        return tuple(choices)

    def number(self, value: Any) -> int | float:
        """A Python number for the argument: an index for the name of a choice, 0 or 1 for a bool.

        Raises:
            TetherError: It is not a number, or not one of the choices.
        """
        if isinstance(value, str) and self.choices is not None and value in self.choices:
            return self.choices.index(value)
        if isinstance(value, (bool, np.bool_)):
            value = int(value)
        whole = self._dtype.startswith(("int", "uint"))
        right = isinstance(value, (int, np.integer) if whole else (int, float, np.integer, np.floating))
        if right and (self.choices is None or 0 <= value < len(self.choices)):
            return int(value) if whole else float(value)
        if self.choices is not None:
            listed = ", ".join(f"{place} ({name})" for place, name in enumerate(self.choices))
            raise TetherError(f"The argument {self.name!r} is one of: {listed}. {received(**{self.name: value})}")
        raise TetherError(f"The argument {self.name!r} is a number of dtype {self._dtype}. {received(value=value)}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Expressions are immutable. {received(attribute=name)}")

    @property
    def shape(self) -> Shape:
        """The shape of what will be bound."""
        return self._shape

    @property
    def dtype(self) -> str:
        """The dtype of what will be bound."""
        return self._dtype

    @property
    def key(self) -> Key:
        """What it is bound by: name, shape and dtype."""
        return (self.name, self._shape, self._dtype)

    def bound(self) -> Tensor | int:
        """What is bound now, or the default: a tensor, or an integer that is known while the backend compiles.

        Raises:
            UnboundArgument: Nothing is bound, and there is no default.
        """
        found = bindings().get(self.key, self.default)
        if found is None:
            raise UnboundArgument(
                f"The argument {self.name!r} has no value here. Give it in the call of the layer that is tied to it, "
                f"`layer(x, {self.name}=value)`, or bind it around the call: "
                "`with tether.weights.bind({argument: value}): ...`. The turns of a `tether.Repeat` have a value each: "
                "to untie or materialize them take them apart first, `repeat.layers()`."
            )
        return found

    def tensor(self) -> Tensor:
        """What is bound now, or the default, as a tensor."""
        return keras.ops.convert_to_tensor(self.bound(), dtype=self._dtype)

    def format(self) -> Term:
        """Its name."""
        return Term(self.name)

    def _identity(self) -> tuple[object, ...]:
        return (*self.key, self.default, self.choices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Argument) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        return (_rebuild_argument, self._identity())


class Choice(Argument):
    """An argument that names one of several options: for the whole call, or for each example or token of it.

    Bound to a number or a name it is an argument like others. Bound to a tensor of whole numbers whose axes are the
    leading axes of a layer's input, each example (or token) has an option of its own; a tensor of floats with one more
    axis, of as many entries as there are options, has the weights of a mixture. A layer that applies its weight by
    plan computes with that; a single value the expression does not have then.

    Args:
        name: What it is called in notation, in files and in the layer's call.
        choices: Names for the numbers 0, 1, 2, ...
        default: The choice where none is made.
        none: The name for -1, which is none of the options; left out, one of the options must be chosen.
    """

    __slots__ = ("none",)
    none: str | None
    choices: tuple[str, ...]

    def __init__(self, name: object, choices: object, *, default: object = 0, none: str | None = None) -> None:
        if none is not None and not none:
            raise TetherError(f"What -1 is called is a name. {received(none=none)}")
        object.__setattr__(self, "none", none)
        super().__init__(name, (), "int32", default=default, choices=choices)
        if none in self.choices:
            raise TetherError(f"One of the options is called as -1 is, {none!r}. {received(choices=choices)}")

    def number(self, value: Any) -> int | float:
        """A Python number for the choice: -1 for none."""
        if self.none is not None and (value == self.none or (value == -1 and not isinstance(value, (bool, str)))):
            return -1
        return super().number(value)

    def bound(self) -> Any:
        """The one choice of a call.

        Raises:
            UnboundArgument: Nothing is bound.
            ChosenForEach: There is one for each example, and the value was asked for.
        """
        found: Any = super().bound()
        if is_for_each(found):
            raise ChosenForEach(
                f"The argument {self.name!r} has a value for each example here, of shape {tuple(found.shape)}, so the "
                f"weight has no single value. The kernels and biases of Dense, EinsumDense and Conv1D to Conv3D, the "
                "tables of embeddings, the weights of recurrent cells and the scales of normalizations are computed "
                f"with for each example; for others, and for a value, make one choice: `{self.name}=0`."
            )
        return found

    def checked(self, value: object) -> Tensor | int:
        """What a call gives for it, as it is bound.

        Raises:
            TetherError: A number that is known is none of the options, or the dtype is none of whole numbers or floats.
            ShapeMismatch: Weights of a mixture are not as many as the options.
        """
        tensor = keras.ops.convert_to_tensor(value)
        dtype, count = keras.backend.standardize_dtype(tensor.dtype), len(self.choices)
        if keras_seam.is_float(dtype):
            if not len(tensor.shape) or tensor.shape[-1] != count:
                raise ShapeMismatch(
                    f"The weights of a mixture have an axis of the {count} options at the end; one option is named by "
                    f"a whole number. {received(shape=tuple(tensor.shape))}"
                )
            return tensor
        if not dtype.startswith(("int", "uint")):
            raise TetherError(f"A choice is made by whole numbers. {received(dtype=dtype)}")
        can_be_read = keras_seam.is_concrete(tensor) and not keras_seam.lies_elsewhere(tensor)
        if can_be_read and not keras_seam.is_compiling():
            known = keras_seam.on_host(tensor)
            outside = known[(known >= count) | (known < (0 if self.none is None else -1))]
            if outside.size:
                super().number(int(outside.flat[0]))  # raises
        return keras.ops.cast(tensor, "int32")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return (*super()._identity(), self.none, "each")

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        return (_rebuild_choice, (self.name, self.choices, self.default, self.none))


class Slots(Choice):
    """A choice among a fixed number of places, whose names come and go: the expression, and what is compiled, stay.

    Args:
        name: What it is called in notation, in files and in the layer's call.
        names: The name of each place; `None` where it is free.
        none: The name for -1, which is none of the places, and which is chosen where a call makes no choice.
    """

    __slots__ = ("names",)
    names: list[str | None]

    def __init__(self, name: object, names: object, *, none: str | None = "none") -> None:
        if not isinstance(names, (list, tuple)) or not all(isinstance(each, str) or each is None for each in names):
            raise TetherError(f"Each slot has a name, or none. {received(names=names)}")
        given = [each for each in names if each is not None]
        if len(set(given)) < len(given) or none is None or none in given:
            raise TetherError(f"Each slot has another name, and none that of -1, {none!r}. {received(names=names)}")
        object.__setattr__(self, "names", list(names))
        super().__init__(name, [str(place) for place in range(len(names))], default=-1, none=none)

    def number(self, value: Any) -> int | float:
        """A Python number for the choice: that of the slot for a name."""
        if isinstance(value, str) and value != self.none:
            if value in self.names:
                return self.names.index(value)
            present = ", ".join(name for name in self.names if name is not None) or "none"
            raise TetherError(f"No slot has the name {value!r}. There are: {present}.")
        return super().number(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        return (*super()._identity(), "slots")

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        return (_rebuild_slots, (self.name, tuple(self.names), self.none))


def is_for_each(value: object) -> bool:
    """Whether what is bound to a choice is one for each example, and not one for the call."""
    return not isinstance(value, (int, float)) and value is not None and len(getattr(value, "shape", ())) > 0


def _rebuild_choice(name: str, choices: object, default: object, none: str | None) -> Choice:
    return Choice(name, choices, default=default, none=none)


def _rebuild_slots(name: str, names: tuple[str | None, ...], none: str) -> Slots:
    return Slots(name, names, none=none)


def _rebuild_argument(name: str, shape: Shape, dtype: str, default: object, choices: object) -> Argument:
    return Argument(name, shape, dtype, default=default, choices=choices)


@contextlib.contextmanager
def bind(values: Mapping[Argument, object]) -> Iterator[None]:
    """Binds arguments for the calls inside the block, on this thread; inner bindings win.

    Args:
        values: A tensor, an array or a number for each argument, of the argument's shape; for one with
            choices also the name of one.

    Raises:
        ShapeMismatch: A value has another shape.
        TetherError: A key is no argument, or a value is none of the choices.

    Example:
    ```python
    strength = tether.weights.Argument("strength")
    w = strength * tether.Weight((2,), "ones", name="w")
    with tether.weights.bind({strength: 0.5}):
        assert w.numpy().tolist() == [0.5, 0.5]
    ```
    """
    before = bindings()
    given = {}
    for argument, value in values.items():
        if not isinstance(argument, Argument):
            raise TetherError(f"Only an Argument can be bound. {received(argument=argument)}")
        given[argument.key] = _checked(argument, value)
    _bound.values = {**before, **given}
    try:
        yield
    finally:
        _bound.values = before


def _checked(argument: Argument, value: object) -> Tensor | int:
    """A number that is known now stays one if it is an index; everything else becomes a tensor."""
    if isinstance(value, (str, bool, int, float, np.generic)) and not argument.shape:
        value = argument.number(value)
        if isinstance(value, int):
            return value
    if isinstance(argument, Choice):
        return argument.checked(value)
    tensor = keras.ops.convert_to_tensor(value)
    if keras.backend.standardize_dtype(tensor.dtype) != argument.dtype:
        tensor = keras.ops.cast(tensor, argument.dtype)
    if tuple(tensor.shape) != argument.shape:
        raise ShapeMismatch(
            f"The argument {argument.name!r} has shape {argument.shape}. {received(shape=tuple(tensor.shape))}"
        )
    return tensor


def bindings() -> dict[Key, Tensor | int]:
    """What is bound on this thread, by the arguments' keys."""
    return _bound.values


# --------------------------------------------------------------------------- values that a loop has at hand
# A loop over depths is handed the entries of stacked weights one by one: in its body they are the value of the node
# that reads them. What the body assigns to such a node it hands back to the loop.


class Lent(keras_seam.ThreadScope):
    """The values of nodes that are at hand on this thread."""

    values: tuple[tuple[Expression, Tensor], ...] = ()
    written: dict[Expression, Tensor] | None = None


lent = Lent()


@contextlib.contextmanager
def lend(values: Mapping[Expression, Tensor]) -> Iterator[dict[Expression, Tensor]]:
    """Lets expressions have these values inside the block, instead of what is stored.

    Yields:
        What was assigned to them inside the block.
    """
    written: dict[Expression, Tensor] = {}
    with lent.set(values=(*lent.values, *values.items()), written=written):
        yield written


def lent_value(expression: Expression) -> Tensor | None:
    """The value that is lent to an expression, if one is."""
    for known, value in reversed(lent.values):
        if known is expression or known == expression:
            return value
    return None


def write_lent(expression: Expression, value: Tensor) -> bool:
    """Takes a value for an expression that is lent one; whether it is."""
    written = lent.written
    if written is None or lent_value(expression) is None:
        return False
    written[expression] = value
    lent.values = (*lent.values, (expression, value))
    return True


# --------------------------------------------------------------------------- constants
# Numbers and arrays in an expression: they are part of its text, not of what is stored or trained.


MAX_CONSTANT = 1 << 20
"""A constant is written into the config of every layer that uses it; a larger one is a weight."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name in `NUMERIC`."""
    return np.dtype(getattr(ml_dtypes, name, name))


class Constant(Expression):
    """A number or a small array, fixed for good.

    A Python number takes the dtype of what it is combined with, as in NumPy. An array keeps its own,
    except that NumPy's defaults become Keras's: float64 becomes `keras.config.floatx()`, and int64
    becomes int32 where the values allow it.
    """

    __slots__ = ("__weakref__", "_key", "array", "number")
    array: Array | None
    number: int | float | None
    _key: tuple[object, ...]

    def __init__(self, *, number: int | float | None = None, array: Array | None = None) -> None:
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "array", array)
        key = (
            ("number", type(number), repr(number))
            if array is None
            else (array.shape, str(array.dtype), array.tobytes())
        )
        object.__setattr__(self, "_key", key)

    @classmethod
    def of(cls, value: object) -> Constant:
        """A constant with a copy of the value.

        Raises:
            TypeError: The value is neither a number nor an array.
            TetherError: It is an array too large to be part of a config, or holds no numbers; or a tensor, where a
                layer is being called.
        """
        if isinstance(value, (bool, np.bool_)):
            return cls(array=np.array(value))
        if isinstance(value, (int, np.integer)):
            if not -(1 << 63) <= value < 1 << 63:
                raise TetherError(
                    f"An integer in an expression has at most 64 bits. {received(bits=int(value).bit_length())}"
                )
            return cls(number=int(value))
        if isinstance(value, (float, np.floating)):
            return cls(number=float(value))
        if isinstance(value, keras.Variable):
            raise TetherError(
                f"A keras.Variable cannot be part of an expression: its layer owns it. To share it, write "
                f"`tether.weight_of(layer, {value.name!r})`; for its present value, `variable.numpy()`."
            )
        if isinstance(value, keras.KerasTensor):
            raise NotATensor(
                "A symbolic tensor cannot be part of an expression. Give the weight to a layer of the graph: "
                "`tether.Lambda(lambda x, w: x @ w, w=w)(x)`, or `tether.tie(layer, kernel=w)`. In a layer of your own "
                "compute with its value, as in `keras.ops.matmul(x, w.value)`."
            )
        if keras.ops.is_tensor(value):
            if keras_seam.call_owners() or not keras_seam.is_concrete(value):
                raise TetherError(
                    "A tensor that a call computes with cannot be part of an expression: it would be a constant with "
                    "its present value. Compute with the weight's value, as in `x @ w.value`. An array that is fixed "
                    "for good is given as NumPy's."
                )
            value = keras_seam.to_numpy(value)
        if not isinstance(value, (np.ndarray, list, tuple)):
            raise TypeError(f"Neither a number nor an array. {received(type=type(value).__name__)}")
        try:
            array = np.array(value)
        except ValueError as error:
            raise TetherError(f"A constant is an array of numbers: {error}") from None
        if array.dtype == np.float64:
            array = array.astype(keras.config.floatx())
        if array.dtype == np.int64 and np.array_equal(array, array.astype(np.int32)):
            array = array.astype(np.int32)
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("="))
        if str(array.dtype) not in NUMERIC:
            raise TetherError(f"A constant holds numbers. {received(dtype=str(array.dtype))}")
        if array.size > MAX_CONSTANT:
            raise TetherError(
                f"A constant of {array.size:,} elements is too large to be written into a config (at most "
                f"{MAX_CONSTANT:,}). Store it once: `tether.Weight(array, trainable=False)`."
            )
        array.flags.writeable = False
        return cls(array=array)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Expressions are immutable. {received(attribute=name)}")

    @property
    def shape(self) -> Shape:
        """The shape, `()` for a number."""
        return () if self.array is None else self.array.shape

    @property
    def dtype(self) -> str:
        """The array's dtype; `"int"` or `"float"` for a number, which takes that of what it meets."""
        return type(self.number).__name__ if self.array is None else str(self.array.dtype)

    def tensor(self) -> Tensor:
        """The number itself, or the array on the backend."""
        return self.number if self.array is None else keras.ops.convert_to_tensor(self.array, dtype=self.dtype)

    def format(self) -> Term:
        """The number, the entries of a tiny array, or the shape of a larger one."""
        if self.array is None:
            text = repr(self.number)
            return Term(text, 100 if not text.startswith("-") else 60)
        if self.array.size <= 4:
            return Term(str(self.array.tolist()))
        return Term(f"array{list(self.array.shape)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return self.format().text

    def __reduce__(self) -> tuple[Function, tuple[object, ...]]:
        return (_rebuild_constant, (self.number, self.array))


def _rebuild_constant(number: int | float | None, array: Array | None) -> Constant:
    return Constant(number=number, array=array)


provide(constant=Constant.of)
