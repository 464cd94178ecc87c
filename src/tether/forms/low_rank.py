"""LoRA: a sum of a base and a product of two thin matrices.

    W' = W + s · A B,   A: rows × r,  B: r × columns,   s = alpha / r   (alpha / √r if rank-stabilised)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685); rank-stabilised
scaling: Kalajdzievski 2023 (arXiv:2312.03732); the PiSSA start: Meng et al. 2024 (arXiv:2404.02948).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np

from tether.errors import ShapeMismatch, TetherError, received
from tether.forms.dropout import as_rate, with_dropout, without_dropout, without_mask
from tether.forms.form import (
    AddedForm,
    as_alpha,
    as_dtype,
    as_rank,
    from_matrix,
    kaiming,
    part,
    rows_and_columns,
    shape_of_base,
    start_value,
)
from tether.types import Array
from tether.weights.expression import Expression, Shape, program
from tether.weights.leaves import Constant
from tether.weights.operators.arithmetic import Add, MatMul, Multiply, Negative, Subtract
from tether.weights.operators.structure import Cast, Reshape
from tether.weights.weight import Weight

__all__ = ["low_rank"]


def factors_of(part: Expression) -> tuple[float, Weight, Weight] | None:
    """The number before the product, and the two stored factors, of a low-rank part; `None` if it is something else."""
    scale, product = number_before(without_dropout(part))
    pair = pair_of(product)
    return None if pair is None else (scale, *pair)


def products_of(part: Expression) -> list[tuple[float, Weight, Weight]] | None:
    """The number and the factors of each product of a part that is a sum of them; `None` if it is something else."""
    if isinstance(part, (Add, Subtract, Negative)):
        found = [products_of(operand) for operand in part.operands]
        if any(each is None for each in found):
            return None
        signs = [1.0, -1.0] if isinstance(part, Subtract) else [-1.0] if isinstance(part, Negative) else [1.0, 1.0]
        return [(sign * s, a, b) for sign, each in zip(signs, found, strict=True) for s, a, b in each or ()]
    single = factors_of(part)
    return None if single is None else [single]


def number_before(part: Expression) -> tuple[float, Expression]:
    """What numbers a part is multiplied with, and what it is without them and a dropout, before its last shape."""
    scale = 1.0
    while isinstance(part := without_mask(part), (Multiply, Reshape)):
        numbers = [each for each in part.operands if isinstance(each, Constant) and each.array is None]
        if isinstance(part, Multiply) and len(numbers) != 1:
            break
        scale *= float(numbers[0].number or 0.0) if numbers else 1.0
        part = next(each for each in part.operands if each not in numbers)
    return scale, part


def pair_of(product: Expression) -> tuple[Weight, Weight] | None:
    """The two stored factors of a product; `None` if it is something else."""
    if not isinstance(product, MatMul):
        return None
    a, b = map(stored_behind, product.operands)
    return (a, b) if a is not None and b is not None and (a.shape or ())[-1:] == (b.shape or ())[:1] else None


def ranks_of(part: Expression) -> set[int]:
    """The ranks of the products of two stored factors that an expression has in it."""
    pairs = (pair_of(step.expression) for step in program(part))
    return {int(pair[0].shape[-1]) for pair in pairs if pair is not None and pair[0].shape}


def stored_behind(expression: Expression) -> Weight | None:
    """The weight that an expression is in another shape or float dtype, as a form uses its own weights."""
    while isinstance(expression, (Reshape, Cast)):
        expression = expression.operands[0]
    return expression if isinstance(expression, Weight) else None


_RANDOM: dict[str, Callable[[int | None], keras.Initializer]] = {
    "zeros": kaiming,
    "gaussian": lambda seed: keras.initializers.RandomNormal(stddev=0.02, seed=seed),
    "orthogonal": lambda seed: keras.initializers.Orthogonal(seed=seed),
}
"""How the first factor starts where the second starts at zero."""
STARTS = (*_RANDOM, "pissa", "olora")


class LowRank(AddedForm):
    """What `tether.forms.low_rank` makes: the expression, and weights of its own."""

    def __init__(
        self,
        rank: int,
        alpha: float | None,
        rank_stabilized: bool,
        start: object,
        split: int | None,
        seed: int | None,
        dtype: str | None,
        dropout: float,
    ) -> None:
        self.dropout = as_rate(dropout)
        self.stored = as_dtype(dtype)
        self.rank, self.alpha, self.rank_stabilized = as_rank(rank), as_alpha(alpha), bool(rank_stabilized)
        self.start, self.split, self.seed = start, split, seed
        if isinstance(start, str) and start not in STARTS:
            raise TetherError(
                f"A low-rank part starts at {', '.join(map(repr, STARTS))}, or near an array. {received(start=start)}"
            )

    @property
    def scale(self) -> float:
        """The factor before the product."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def delta(self, base: Expression) -> Expression:
        """`s · A B`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        if isinstance(self.start, str) and self.start in _RANDOM:
            a = part(base, "lora_a", _RANDOM[self.start](self.seed), (*rows, self.rank), dtype=self.stored)
            b = part(base, "lora_b", "zeros", (self.rank, *columns), dtype=self.stored)
            return self._dropped(self._product(a, b, rows, columns), base)
        value = start_value(base)
        if isinstance(self.start, str):
            left, right = (self._basis if self.start == "olora" else self._factors)(value, rows, columns)
            trained = self._dropped(self._product(*self._parts(base, left, right), rows, columns), base)
            taken_off = part(base, "pissa_a", left, trainable=False), part(base, "pissa_b", right, trainable=False)
            return trained - self._product(*taken_off, rows, columns)
        target = np.asarray(self.start, dtype="float64")
        if target.shape != value.shape:
            raise ShapeMismatch(f"The start has the base's shape {value.shape}. {received(shape=target.shape)}")
        return self.near(base, target - value)

    def near(self, base: Expression, difference: Array) -> Expression:
        """`s · A B` beside a base, as near to a difference of its shape as the rank allows (a truncated SVD)."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        left, right = self._factors(difference, rows, columns)
        return self._dropped(self._product(*self._parts(base, left, right), rows, columns), base)

    def _dropped(self, product: Expression, base: Expression) -> Expression:
        return with_dropout(product, base, self.dropout, self.seed)

    def _parts(self, base: Expression, left: Array, right: Array) -> tuple[Expression, Expression]:
        return part(base, "lora_a", left, dtype=self.stored), part(base, "lora_b", right, dtype=self.stored)

    def _product(self, a: Expression, b: Expression, rows: Shape, columns: Shape) -> Expression:
        if len(columns) > 1:
            b = b.reshape(self.rank, math.prod(columns))
            product = from_matrix(a.reshape(math.prod(rows), self.rank) @ b, rows, columns)
        else:
            product = a @ b
        return product if self.scale == 1.0 else self.scale * product

    def _basis(self, value: Array, rows: Shape, columns: Shape) -> tuple[Array, Array]:
        """The first directions of the outputs, made orthonormal, and what the base has in them."""
        q, r = np.linalg.qr(value.reshape(math.prod(rows), math.prod(columns)).T)
        kept = min(self.rank, q.shape[1])
        left, right = np.zeros((r.shape[1], self.rank)), np.zeros((self.rank, q.shape[0]))
        left[:, :kept], right[:kept] = r[:kept].T, q[:, :kept].T
        return left.reshape(*rows, self.rank), right.reshape(self.rank, *columns)

    def _factors(self, value: Array, rows: Shape, columns: Shape) -> tuple[Array, Array]:
        """The best factors of this rank in the least-squares sense, with singular values shared equally.

        Raises:
            TetherError: No factors have that product: the scale is zero, or a number is not finite.
        """
        if self.scale == 0:
            raise TetherError(
                f"A low-rank part that starts near a value has an `alpha` other than 0. {received(alpha=0)}"
            )
        if not np.isfinite(value).all():
            raise TetherError(
                f"A low-rank part starts near finite numbers. {received(not_finite=int((~np.isfinite(value)).sum()))}"
            )
        u, s, v = np.linalg.svd(value.reshape(math.prod(rows), math.prod(columns)), full_matrices=False)
        kept = min(self.rank, len(s))
        root = np.zeros(self.rank)
        root[:kept] = np.sqrt(s[:kept] / abs(self.scale))
        left, right = np.zeros((u.shape[0], self.rank)), np.zeros((self.rank, v.shape[1]))
        left[:, :kept], right[:kept] = (
            u[:, :kept] * root[:kept],
            v[:kept] * math.copysign(1, self.scale) * root[:kept, None],
        )
        return left.reshape(*rows, self.rank), right.reshape(self.rank, *columns)


def low_rank(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    start: object = "zeros",
    split: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    dropout: float = 0.0,
) -> LowRank:
    """A trained product of two thin matrices, to be added to a weight (LoRA).

    Args:
        rank: The inner size `r` of the product.
        alpha: The scale is `alpha / rank`; left out, the scale is 1.
        rank_stabilized: Whether the scale is `alpha / √rank` instead (rsLoRA).
        start: `"zeros"`: A is uniform at random and B starts at zero, so the sum starts at the base; with
            `"gaussian"` A is normal, with `"orthogonal"` its columns are orthonormal. `"pissa"`: A and B start at the
            base's largest singular directions and the same product, frozen, is taken off again, so the sum starts at
            the base and trains where it matters most. `"olora"`: the same with an orthonormal basis of the base's
            first outputs (Büyükakyüz 2024, arXiv:2406.01775). An array of the base's shape: A B starts as the best
            approximation of the array minus the base, so the sum starts near the array (a truncated SVD).
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        seed: Of the random start of A, and of the dropout.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.
        dropout: The share of the numbers of the product's input that are zero in a call with `training=True`, the
            others being larger for it: the layer then computes `x W + s · drop(x) A B`. That is no weight, so the
            layer's kernel, a file and a merge have the weight without dropout. It goes with the kernels of Dense,
            EinsumDense and convolutions without groups; a tie of another layer refuses it. What is drawn next is
            stored with the weights.

    Returns:
        The form, to be added to a base of two or more axes: `(..., rows)` by `rank` and `rank` by `(columns, ...)`. The
        sum has the base's shape.

    Raises:
        TetherError: A rank, start or dropout that makes no sense; at use, a base of fewer than two axes, or a start
            near numbers that are not finite or with an `alpha` of 0.
        Unsupported: At the tie, if the layer cannot apply a dropout.

    Example:
    ```python
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(8, alpha=16))
    ```
    """
    return LowRank(rank, alpha, rank_stabilized, start, split, seed, dtype, dropout)
