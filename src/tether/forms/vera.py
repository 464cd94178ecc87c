"""VeRA: a low-rank sum whose thin matrices are random, frozen and shared; only two vectors are trained.

    W' = W + (A · d) @ (B · b),   A: rows × r and B: r × columns random, d: r started at 0.1, b: columns at zero

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454).
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from tether.errors import ShapeMismatch, TetherError, as_ints, received
from tether.forms.dropout import as_rate, with_dropout, without_dropout
from tether.forms.form import (
    AddedForm,
    as_dtype,
    as_rank,
    from_matrix,
    part,
    part_dtype,
    rows_and_columns,
    shape_of_base,
    torch_draws,
)
from tether.forms.low_rank import number_before, stored_behind
from tether.types import Array, Config
from tether.weights.expression import Expression, Shape
from tether.weights.operators.arithmetic import MatMul, Multiply
from tether.weights.operators.structure import Index
from tether.weights.weight import Weight

__all__ = ["vera"]

MAX_DRAWS = 1 << 26
"""Numbers that are drawn one after the other from one seed."""


@keras.saving.register_keras_serializable(package="tether", name="DrawnByTorch")
class DrawnByTorch(keras.initializers.Initializer):
    """The transpose of what PyTorch draws from a seed for a matrix: uniform, for a gain of √2.

    A file that says from which seed the frozen matrices are drawn need not have them. A float32 has the lower 24 bits
    of a draw.

    Args:
        seed: The generator's.
        skipped: How many numbers are drawn before.
    """

    def __init__(self, seed: int = 0, skipped: int = 0) -> None:
        if not all(type(n) is int for n in (seed, skipped)) or not 0 <= skipped < MAX_DRAWS:
            raise TetherError(f"A seed and a number of draws are whole numbers. {received(seed=seed, skipped=skipped)}")
        self.seed, self.skipped = seed, skipped

    def __call__(self, shape: Shape, dtype: str | None = None) -> Any:
        """The matrix."""
        return keras.ops.convert_to_tensor(self.drawn(tuple(shape)), dtype or keras.config.floatx())

    def drawn(self, shape: Shape) -> Array:
        """The matrix as an array."""
        count = math.prod(shape)
        if len(shape) != 2 or self.skipped + count > MAX_DRAWS:
            raise TetherError(f"A matrix is drawn, of at most {MAX_DRAWS} numbers. {received(shape=shape)}")
        draws = torch_draws(self.seed, self.skipped, count) & ((1 << 24) - 1)
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[0])
        values = draws.astype("float32") * np.float32(2.0**-24) * np.float32(2 * bound) - np.float32(bound)
        return np.ascontiguousarray(values.reshape(shape[::-1]).T)

    def get_config(self) -> Config:
        """The seed and what is drawn before."""
        return {"seed": self.seed, "skipped": self.skipped}


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
        self.starts: tuple[keras.Initializer, ...] | None = None
        """What the frozen bases start at; left out, at random."""
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
            seeds = [None if self.seed is None else self.seed + k for k in (0, 1)]
            start = self.starts or [keras.initializers.HeUniform(seed) for seed in seeds]
            kept: Config = {"dtype": part_dtype(base), "trainable": False, "role": "fixed"}
            self._bases = (
                Weight((n, self.rank), start[0], name="vera_bases.a", **kept),
                Weight((self.rank, m), start[1], name="vera_bases.b", **kept),
            )
        a, b = self._bases
        return (a if rows == n else a[:rows]), (b if columns == m else b[:, :columns])


def vectors_of(part: Expression) -> tuple[float, tuple[Weight, Weight], tuple[Weight, Weight]] | None:
    """The number before a VeRA, its frozen matrices, and its vectors; `None` if a part is something else."""
    scale, product = number_before(without_dropout(part))
    sides = product.operands if isinstance(product, MatMul) else ()
    pairs = [
        (_uncut(side.operands[0]), stored_behind(side.operands[1])) for side in sides if isinstance(side, Multiply)
    ]
    if len(pairs) != 2 or any(base is None or own is None or len(own.shape or ()) != 1 for base, own in pairs):
        return None
    (a, d), (b, e) = pairs
    return scale, (a, b), (d, e)  # type: ignore[return-value]


def _uncut(expression: Expression) -> Weight | None:
    return stored_behind(expression.operands[0] if isinstance(expression, Index) else expression)


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
