"""LoRA: a sum of a base and a product of two thin matrices.

    W' = W + s · A B,   A: rows × r,  B: r × columns,   s = alpha / r   (alpha / √r if rank-stabilised)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685); rank-stabilised
scaling: Kalajdzievski 2023 (arXiv:2312.03732); the PiSSA start: Meng et al. 2024 (arXiv:2404.02948).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tether.errors import ShapeMismatch, TetherError, received
from tether.forms.form import (
    AddedForm,
    as_alpha,
    as_rank,
    from_matrix,
    kaiming,
    part,
    rows_and_columns,
    shape_of_base,
    start_value,
)
from tether.weights.expression import Expression, Shape

__all__ = ["low_rank"]


class LowRank(AddedForm):
    """What `tether.forms.low_rank` makes: the expression, and weights of its own."""

    def __init__(self, rank: int, alpha: float | None, rank_stabilized: bool, start: Any, split: int | None, seed: Any):
        self.rank, self.alpha, self.rank_stabilized = as_rank(rank), as_alpha(alpha), bool(rank_stabilized)
        self.start, self.split, self.seed = start, split, seed
        if isinstance(start, str) and start not in ("zeros", "pissa"):
            raise TetherError(f"A low-rank part starts at 'zeros', 'pissa', or near an array. {received(start=start)}")

    @property
    def scale(self) -> float:
        """The factor before the product."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def delta(self, base: Expression) -> Expression:
        """`s · A B`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split)
        if isinstance(self.start, str) and self.start == "zeros":
            a = part(base, "lora_a", kaiming(self.seed), (*rows, self.rank))
            b = part(base, "lora_b", "zeros", (self.rank, *columns))
            return self._product(a, b, rows, columns)
        value = start_value(base)
        if isinstance(self.start, str):
            left, right = self._factors(value, rows, columns)
            a, b = part(base, "lora_a", left), part(base, "lora_b", right)
            taken_off = part(base, "pissa_a", left, trainable=False), part(base, "pissa_b", right, trainable=False)
            return self._product(a, b, rows, columns) - self._product(*taken_off, rows, columns)
        target = np.asarray(self.start, dtype="float64")
        if target.shape != value.shape:
            raise ShapeMismatch(f"The start has the base's shape {value.shape}. {received(shape=target.shape)}")
        left, right = self._factors(target - value, rows, columns)
        return self._product(part(base, "lora_a", left), part(base, "lora_b", right), rows, columns)

    def _product(self, a: Expression, b: Expression, rows: Shape, columns: Shape) -> Expression:
        if len(columns) > 1:
            b = b.reshape(self.rank, math.prod(columns))
            product = from_matrix(a.reshape(math.prod(rows), self.rank) @ b, rows, columns)
        else:
            product = a @ b
        return product if self.scale == 1.0 else self.scale * product

    def _factors(self, value: Any, rows: Shape, columns: Shape) -> tuple[Any, Any]:
        """The best factors of this rank in the least-squares sense, with singular values shared equally."""
        u, s, v = np.linalg.svd(value.reshape(math.prod(rows), math.prod(columns)), full_matrices=False)
        kept = min(self.rank, len(s))
        root = np.zeros(self.rank)
        root[:kept] = np.sqrt(s[:kept] / self.scale)
        left, right = np.zeros((u.shape[0], self.rank)), np.zeros((self.rank, v.shape[1]))
        left[:, :kept], right[:kept] = u[:, :kept] * root[:kept], v[:kept] * root[:kept, None]
        return left.reshape(*rows, self.rank), right.reshape(self.rank, *columns)


def low_rank(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    start: object = "zeros",
    split: int | None = None,
    seed: int | None = None,
) -> LowRank:
    """A trained product of two thin matrices, to be added to a weight (LoRA).

    Args:
        rank: The inner size `r` of the product.
        alpha: The scale is `alpha / rank`; left out, the scale is 1.
        rank_stabilized: Whether the scale is `alpha / √rank` instead (rsLoRA).
        start: `"zeros"`: B starts at zero, so the sum starts at the base. `"pissa"`: A and B start at the base's
            largest singular directions and the same product, frozen, is taken off again, so the sum starts at the
            base and trains where it matters most. An array of the base's shape: A B starts as the best
            approximation of the array minus the base, so the sum starts near the array (a truncated SVD).
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        seed: Of the random start of A.

    Returns:
        The form, to be added to a base of two or more axes: `(..., rows)` by `rank` and `rank` by `(columns, ...)`. The
        sum has the base's shape.

    Raises:
        TetherError: A rank or start that makes no sense; at use, a base of fewer than two axes.

    Example:
    ```python
    child = tether.inherit(parent, kernel=lambda w: w + tether.low_rank(8, alpha=16))
    ```
    """
    return LowRank(rank, alpha, rank_stabilized, start, split, seed)
