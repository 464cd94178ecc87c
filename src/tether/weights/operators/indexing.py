"""Operators that read entries by number: numbers that never change, and numbers that are stored or come with a call.

`Take` has its numbers as a parameter, in the text of the expression. `Gather` has them as an operand, which is itself
an expression: a depth or a choice (an argument), or the codes of a codebook (stored whole numbers).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, as_int, as_ints, received
from tether.types import Array, Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import (
    Expression,
    Node,
    Shape,
    Stored,
    Term,
    _ways,
    as_expression,
    leaves,
    program,
    register,
    rewritten,
)
from tether.weights.leaves import Argument, Constant, bindings

MAX_WRITTEN = 1024
"""More numbers than these are no text of a config: they are stored, as a weight or an expression of one."""


class _Entries(Node):
    """Entries of the first operand along an axis."""

    @staticmethod
    def _axis(axis: object) -> int:
        return as_int(axis, "axis")

    def _place(self, shape: Shape) -> int:
        """The axis, counted from the front."""
        axis, rank = self.parameters["axis"], len(shape)
        if not -rank <= axis < rank:
            raise ShapeMismatch(f"{self.operands[0].notation()} has {rank} axes, shape {shape}. {received(axis=axis)}")
        return int(axis) % rank

    def _refuse_outside(self, numbers: np.ndarray, size: int) -> None:
        outside = numbers[(numbers < -size) | (numbers >= size)]
        if outside.size:
            raise ShapeMismatch(
                f"{self.operands[0].notation()} has {size} entries on axis {self.parameters['axis']}. "
                f"{received(index=int(outside[0]))}"
            )


@register
class Take(_Entries):
    """Chosen entries, in any order, more than once if wanted: their numbers are part of the expression's text."""

    name, accepts = "take", ("indices", "axis")

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """Integers: the entries' numbers, and the axis."""
        return {"indices": as_ints(given.get("indices"), "indices"), "axis": cls._axis(given.get("axis", 0))}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """As many entries along the axis as there are numbers."""
        axis = self._place(shapes[0])
        self._refuse_outside(np.array(self.parameters["indices"], "int64"), shapes[0][axis])
        return (*shapes[0][:axis], len(self.parameters["indices"]), *shapes[0][axis + 1 :])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The other axes."""
        place = self._place(self.operands[0].shape or ())
        return (*operands[0][:place], links.label(len(self.parameters["indices"])), *operands[0][place + 1 :])

    def compute(self, *values: Tensor) -> Tensor:
        size = values[0].shape[self.parameters["axis"]]
        indices = np.array([index % size for index in self.parameters["indices"]], dtype="int32")
        return keras.ops.take(values[0], indices, axis=self.parameters["axis"])


@register
class Gather(_Entries):
    """Entries whose numbers are the second operand: stored, or given with a call.

    A number that does not exist is an error where it can be read, in eager mode. In a compiled graph the entry is NaN
    (of whole numbers: 0), so that no other entry's value stands for it.
    """

    name, arity, accepts, indices = "gather", 2, ("axis",), (1,)

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The axis."""
        return {"axis": cls._axis(given.get("axis", 0))}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """The shape of the numbers in the place of the axis."""
        axis = self._place(shapes[0])
        number = self.operands[1]
        if isinstance(number, Constant):
            known = np.asarray(number.number if number.array is None else number.array)
            self._refuse_outside(known, shapes[0][axis])
        return (*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])

    def infer_dtype(self, *dtypes: str) -> str | None:
        if "int" not in dtypes[1]:
            raise TetherError(f"The numbers of entries are whole. {received(dtype=dtypes[1])}")
        return dtypes[0]

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The entry's axes, and those of the numbers where the axis of the entries was."""
        place = self._place(self.operands[0].shape or ())
        return (*operands[0][:place], *operands[1], *operands[0][place + 1 :])

    def compute(self, *values: Tensor) -> Tensor:
        value, number = values
        axis = self._place(tuple(value.shape))
        size = int(value.shape[axis])
        if isinstance(number, int):
            self._refuse_outside(np.array([number]), size)
            return value[(slice(None),) * axis + (number % size,)]
        can_be_read = keras_seam.is_concrete(number) and not keras_seam.lies_elsewhere(number)
        if can_be_read and not keras_seam.is_compiling():
            self._refuse_outside(np.asarray(keras.ops.convert_to_numpy(number)), size)
        number = keras.ops.cast(number, "int32")
        number = keras.ops.where(keras.ops.less(number, 0), keras.ops.add(number, size), number)
        found = keras.ops.take(value, keras.ops.clip(number, 0, max(size - 1, 0)), axis=axis)
        exists = keras.ops.logical_and(keras.ops.greater_equal(number, 0), keras.ops.less(number, size))
        exists = keras.ops.reshape(exists, (*number.shape, *(1,) * (len(value.shape) - axis - 1)))
        dtype = keras.backend.standardize_dtype(found.dtype)
        other = float("nan") if keras_seam.is_float(dtype) else 0
        return keras.ops.where(exists, found, keras.ops.cast(other, dtype))

    def format(self, *terms: Term) -> Term:
        """`w[depth]`, as NumPy writes it."""
        before = ":, " * (self.parameters["axis"] if self.parameters["axis"] > 0 else 0)
        if self.parameters["axis"] < 0:
            return Term(f"take({terms[0].text}, {terms[1].text}, axis={self.parameters['axis']})")
        return Term(f"{terms[0].inside(100)}[{before}{terms[1].text}]")

    def operand_shape(self, shape: Shape) -> Shape | None:
        return None

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The operand with the entry replaced that is read now; with every one, where nothing says which is read."""
        whole, number = self.operands
        if number.shape != () or whole.shape is None or number.weights_used():
            return None
        axis = self._place(whole.shape)
        size = whole.shape[axis]
        entry = keras.ops.expand_dims(keras.ops.convert_to_tensor(value), axis)
        given = [leaf for leaf in leaves(number) if isinstance(leaf, Argument)]
        if any(each.default is None and each.key not in bindings() for each in given):
            return [keras.ops.tile(entry, [size if place == axis else 1 for place in range(len(whole.shape))]), None]
        known: Any = number.bound() if isinstance(number, Argument) else number.value
        if not all(weight.is_built for weight in whole.weights_used()):
            return None
        if not isinstance(known, int) and not keras_seam.is_concrete(known):  # of a graph: one that exists changes
            now = keras.ops.convert_to_tensor(whole.value)
            places = keras.ops.reshape(
                keras.ops.arange(size, dtype="int32"), (size, *(1,) * (len(now.shape) - axis - 1))
            )
            number = keras.ops.cast(known, "int32")
            number = keras.ops.where(keras.ops.less(number, 0), keras.ops.add(number, size), number)
            return [keras.ops.where(keras.ops.equal(places, number), keras.ops.cast(entry, now.dtype), now), None]
        known = known if isinstance(known, int) else int(keras_seam.to_numpy(known, in_step=True))
        self._refuse_outside(np.array([known]), size)
        now = keras.ops.convert_to_tensor(whole.value)
        start = [0] * len(now.shape)
        start[axis] = known % size
        return [keras.ops.slice_update(now, start, keras.ops.cast(entry, now.dtype)), None]


def refuse_entries(weight: Stored, value: Array, source: str) -> None:
    """Refuses a value for stored numbers of entries, if one of them does not exist in a table that they are read from.

    Raises:
        ShapeMismatch: A number is outside of the axis.
    """
    for use in weight.uses:
        for step in program(use.expression):
            node = step.expression
            if not isinstance(node, Gather) or weight not in node.operands[1].weights_used():
                continue
            given = Constant(array=np.asarray(value))

            def instead(_: int, leaf: Expression, given: Constant = given) -> Constant | None:
                return given if leaf is weight else None

            numbers = rewritten(node.operands[1], instead)
            shape = node.operands[0].shape
            if shape is None or any(leaf is not weight for leaf in node.operands[1].weights_used()):
                continue
            try:
                node._refuse_outside(np.asarray(numbers.numpy()), shape[node._place(shape)])
            except ShapeMismatch as error:
                raise ShapeMismatch(f"{source} has other numbers for {weight.name!r}. {error}") from None


def readings(expression: Expression) -> list[dict[Argument, object]]:
    """What to bind so that each entry is read once that an argument without a default names; nothing if none does.

    It is for whoever needs a value outside of the call that binds the argument: the penalty of a regularizer.
    """
    sizes: dict[Argument, int] = {}
    for step in program(expression):
        node = step.expression
        if isinstance(node, Gather) and isinstance(node.operands[1], Argument):
            number, shape = node.operands[1], node.operands[0].shape
            if number.default is None and number.key not in bindings() and number.shape == () and shape is not None:
                size = shape[node.parameters["axis"]]
                sizes[number] = min(size, sizes.get(number, size))
    found: list[dict[Argument, object]] = [{}]
    for number, size in sizes.items():
        found = [{**given, number: place} for given in found for place in range(size)]
    return found


def take(x: object, indices: object, axis: int = 0) -> Expression:
    """The entries of `x` with these numbers along an axis.

    The gradient of an entry is the sum over all places that read it.

    Args:
        x: A weight, an expression, a number or an array.
        indices: Their numbers, which may repeat and count from the end if they are below zero. A list of whole numbers
            is part of the expression, and does not change; one of more than 1,024 numbers is stored as
            `tether.ops.integers` does, since it would be written into the config of every layer that uses it. An
            expression of whole numbers is read when the value is: an argument of the call, or stored numbers.
        axis: The axis.

    Returns:
        The expression: of the shape of `x`, with the shape of the indices in the place of the axis.

    Raises:
        ShapeMismatch: A number is outside of the axis, or `x` lacks the axis. Of numbers that are not known when the
            expression is written, this is raised when the value is computed, in eager mode. In a compiled graph an
            entry that does not exist is NaN (of whole numbers: 0), never another entry.
        TetherError: The indices are no whole numbers.

    Example:
    ```python
    table = tether.Weight((100, 16), name="table")
    digits = tether.ops.take(table, [3, 1, 4])
    assert digits.shape == (3, 16)

    codes = tether.ops.integers(np.random.randint(0, 100, (32, 8)))
    kernel = tether.ops.take(table, codes).reshape(32, 128)  # 32 x 8 numbers of one byte, and the table
    ```
    """
    x = as_expression(x)
    if isinstance(indices, Expression):
        return Gather(x, indices, axis=axis)
    if isinstance(indices, keras.KerasTensor) or keras.ops.is_tensor(indices):
        as_expression(indices)  # raises, with what to write instead
    found = np.asarray(indices)
    if found.dtype.kind not in "iu" and found.size:
        raise TetherError(
            "The numbers of entries are whole numbers: a list of them, or an expression (`tether.ops.integers` stores "
            f"them). {received(indices=indices)}"
        )
    if found.size > MAX_WRITTEN:
        return Gather(x, _ways["integers"](found), axis=axis)
    if found.ndim != 1:
        return Gather(x, as_expression(found.astype("int32") if found.ndim else int(found)), axis=axis)
    return Take(x, indices=tuple(found.tolist()), axis=axis)


__all__ = ["Gather", "Take", "readings", "refuse_entries", "take"]
