"""Numbers and arrays in an expression: they are part of its text, not of what is stored or trained."""

from __future__ import annotations

from typing import Any

import keras
import ml_dtypes
import numpy as np

from tether import keras_seam
from tether.errors import NotATensor, TetherError, received
from tether.weights.checks import NUMERIC
from tether.weights.expression import Expression, Shape, Tensor, Term

MAX_ELEMENTS = 1 << 20
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
    array: np.ndarray[Any, Any] | None
    number: int | float | None
    _key: tuple[Any, ...]

    def __init__(self, *, number: int | float | None = None, array: np.ndarray[Any, Any] | None = None) -> None:
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "array", array)
        key = (
            ("number", type(number), repr(number))
            if array is None
            else (array.shape, str(array.dtype), array.tobytes())
        )
        object.__setattr__(self, "_key", key)

    @classmethod
    def of(cls, value: Any) -> Constant:
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
            value = keras.ops.convert_to_numpy(value)
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
        if array.size > MAX_ELEMENTS:
            raise TetherError(
                f"A constant of {array.size:,} elements is too large to be written into a config (at most "
                f"{MAX_ELEMENTS:,}). Store it once: `tether.Weight(array, trainable=False)`."
            )
        array.flags.writeable = False
        return cls(array=array)

    def __setattr__(self, name: str, value: Any) -> None:
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

    def __reduce__(self) -> Any:
        return (_rebuild, (self.number, self.array))


def _rebuild(number: int | float | None, array: np.ndarray[Any, Any] | None) -> Constant:
    return Constant(number=number, array=array)
