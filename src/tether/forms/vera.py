"""VeRA: a low-rank sum whose thin matrices are random, frozen and shared; only two vectors are trained.

    W' = W + (A · d) @ (B · b),   A: rows × r and B: r × columns random, d: r started at 0.1, b: columns at zero

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454).
"""

from __future__ import annotations

import math

import keras
import numpy as np

from tether.errors import ShapeMismatch, as_ints, received
from tether.forms.dropout import as_rate, with_dropout
from tether.forms.form import (
    AddedForm,
    as_dtype,
    as_rank,
    from_matrix,
    part,
    part_dtype,
    rows_and_columns,
    shape_of_base,
)
from tether.types import Config
from tether.weights.expression import Expression
from tether.weights.weight import Weight

__all__ = ["vera"]


class Vera(AddedForm):
    """What `tether.forms.vera` makes: the expression, and weights of its own."""

    def __init__(
        self, rank: int, size: object, split: int | None, seed: int | None, dtype: str | None, dropout: float
    ) -> None:
        self.stored, self.dropout = as_dtype(dtype), as_rate(dropout)
        self.rank, self.split, self.seed = as_rank(rank), split, seed
        self.size = None if size is None else as_ints(size, "`size`")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ShapeMismatch(f"`size` is (rows, columns) of the largest weight. {received(size=size)}")
        self._bases: tuple[Weight, Weight] | None = None

    def delta(self, base: Expression) -> Expression:
        """`(A · d) @ (B · b)`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        n, m = math.prod(rows), math.prod(columns)
        a, b = self._slices(base, n, m)
        inner = part(base, "vera_d", np.full(self.rank, 0.1), dtype=self.stored)
        outer = part(base, "vera_b", np.zeros(m), dtype=self.stored)
        return with_dropout(from_matrix((a * inner) @ (b * outer), rows, columns), base, self.dropout, self.seed)

    def _slices(self, base: Expression, rows: int, columns: int) -> tuple[Expression, Expression]:
        """The part of the shared bases that a weight of this size uses; the first weight makes them."""
        n, m = self.size or (rows, columns)
        if rows > n or columns > m:
            raise ShapeMismatch(
                f"This vera form shares frozen bases for {n} rows and {m} columns, and {base.notation()} is larger. "
                f"Give the form the largest size before its first use: `tether.forms.vera({self.rank}, "
                f"size=({max(n, rows)}, {max(m, columns)}))`. {received(rows=rows, columns=columns)}"
            )
        if self._bases is None:
            self.size = (n, m)
            start = [keras.initializers.HeUniform(None if self.seed is None else self.seed + k) for k in (0, 1)]
            kept: Config = {"dtype": part_dtype(base), "trainable": False, "role": "fixed"}
            self._bases = (
                Weight((n, self.rank), start[0], name="vera_bases.a", **kept),
                Weight((self.rank, m), start[1], name="vera_bases.b", **kept),
            )
        a, b = self._bases
        return (a if rows == n else a[:rows]), (b if columns == m else b[:, :columns])


def vera(
    rank: int,
    *,
    size: object = None,
    split: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    dropout: float = 0.0,
) -> Vera:
    """Two trained vectors between frozen random matrices that all weights share, added to a weight (VeRA).

    Unlike other forms, one object is one family: the first weight that it is applied to makes the frozen bases A
    and B, and all others use the same two (a smaller one their first rows and columns). The vectors d, of shape
    `(rank,)`, and b, of shape `(columns,)`, are each weight's own. The sum starts equal to the base.

    Args:
        rank: The inner size of the product; it costs nothing but the bases, so it is usually large.
        size: `(rows, columns)` of the largest weight that will share the bases; left out, that of the first.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        seed: Of the random bases, and of the dropout.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.
        dropout: On the input of the product, in training; see `low_rank`.

    Returns:
        The form, to be added to bases of two or more axes; each sum has its base's shape.

    Raises:
        TetherError: A rank, size or dropout that makes no sense; at use, a base of fewer than two axes, or one that is
            larger than the shared bases.

    Example:
    ```python
    small = tether.forms.vera(64, size=(512, 512))
    for dense in (layer, parent):
        tether.tie(dense, kernel=tether.weight_of(dense, "kernel").stop_gradient() + small)
    ```
    """
    return Vera(rank, size, split, seed, dtype, dropout)
