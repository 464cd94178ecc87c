"""Some rows of a table trained, the others left as they are: new tokens, or a few that matter.

    W'[i] = V[k] where i is the k-th of the given rows, else W[i];   V starts at W's rows

The other rows get no gradient, and no decay: they are not in what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from tether import ops
from tether.errors import InvalidConfig, ShapeMismatch, TetherError, received
from tether.forms.form import Form, as_dtype, base_expression, part, shape_of_base, start_value
from tether.forms.low_rank import stored_behind
from tether.types import Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Node, Shape, Term, as_expression, register
from tether.weights.operators.arithmetic import Subtract
from tether.weights.operators.structure import Where
from tether.weights.weight import Weight

__all__ = ["rows"]

MAX_ROWS = 1 << 16
"""Rows that a config names one by one."""


@register
class Placed(Node):
    """A table that is zero but for some rows, which are the operand's."""

    name, accepts = "placed", ("rows", "size")
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """The rows, each once, and how many the table has."""
        places, size = given.get("rows"), given.get("size")
        if type(size) is not int or size < 1:
            raise InvalidConfig(f"A table has a number of rows. {received(size=size)}")
        if (
            not isinstance(places, (list, tuple))
            or not 0 < len(places) <= MAX_ROWS
            or not all(type(place) is int and 0 <= place < size for place in places)
            or len(set(places)) != len(places)
        ):
            raise InvalidConfig(f"Rows are numbers from 0 to {size - 1}, each once. {received(rows=places)}")
        return {"rows": tuple(places), "size": size}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """As many rows as the table has."""
        if not shapes[0] or shapes[0][0] != len(self.parameters["rows"]):
            raise ShapeMismatch(f"{len(self.parameters['rows'])} rows are placed. {received(shape=shapes[0])}")
        return (self.parameters["size"], *shapes[0][1:])

    def compute(self, *values: Tensor) -> Tensor:
        places = np.asarray(self.parameters["rows"], "int32")[:, None]
        zeros = keras.ops.zeros((self.parameters["size"], *values[0].shape[1:]), values[0].dtype)
        return keras.ops.scatter_update(zeros, places, values[0])  # Keras's `scatter` goes row by row on PyTorch

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """The columns: rows that are placed are no axis of the table."""
        return (links.label(self.parameters["size"]), *operands[0][1:])

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The rows that were placed."""
        return [keras.ops.take(value, np.asarray(self.parameters["rows"], "int32"), axis=0)]

    def format(self, *terms: Term) -> Term:
        """The rows by number, as far as they are few."""
        places = self.parameters["rows"]
        listed = ", ".join(map(str, places[:4])) + (", …" if len(places) > 4 else "")
        return Term(f"rows({terms[0].text}, [{listed}])")


class Rows(Form):
    """What `tether.forms.rows` makes: the expression, and a weight of its own."""

    def __init__(self, indices: Sequence[int], dtype: str | None) -> None:
        found = np.asarray(indices)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu" or len(np.unique(found)) != len(found):
            raise TetherError(f"`indices` are the numbers of rows, each once. {received(indices=indices)}")
        self.indices, self.stored = tuple(int(index) for index in found), as_dtype(dtype)

    def __call__(self, base: Expression) -> Expression:
        """The own rows at their places, and the base, which gets no gradient, elsewhere."""
        base = base_expression(self, base)
        size = shape_of_base(self, base)[0]
        wrong = [index for index in self.indices if not 0 <= index < size]
        if wrong:
            raise ShapeMismatch(f"{base.notation()} has the rows 0 to {size - 1}. {received(indices=wrong)}")
        own = part(base, "rows", start_value(base)[list(self.indices)], dtype=self.stored)
        ones = as_expression(np.ones((len(self.indices), *(1 for _ in shape_of_base(self, base)[1:])), "float32"))
        mask, placed = (Placed(each, rows=self.indices, size=size) for each in (ones, own))
        return ops.where(mask, placed, base.stop_gradient())


def rows_of(part: Expression) -> tuple[Weight, tuple[int, ...]] | None:
    """The stored rows of a weight, or of what is added to one, and their places; `None` if it is something else."""
    if isinstance(part, Subtract):
        part = part.operands[0]
    placed = part.operands[1] if isinstance(part, Where) else None
    if not isinstance(placed, Placed):
        return None
    own = stored_behind(placed.operands[0])
    return None if own is None else (own, placed.parameters["rows"])


def rows(indices: Sequence[int], *, dtype: str | None = None) -> Rows:
    """Trained rows of a table: the rest of it is the base's, and stays as it is.

    The weight of its own has one row for each index and starts at the base's rows, so the result starts equal to the
    base. Only these rows are stored and trained.

    Args:
        indices: The numbers of the rows, each once.
        dtype: In which the rows are stored; left out, the base's dtype, but float32 for one of 16 bits.

    Returns:
        The form.

    Raises:
        TetherError: The indices are no whole numbers, or one comes twice.
        ShapeMismatch: At use, a row that the base does not have.

    Example:
    ```python
    tether.adapters.add(model, "words", {"*/embeddings": tether.forms.rows([7, 11, 13])})
    ```
    """
    return Rows(indices, dtype)
