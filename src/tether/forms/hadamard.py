"""LoHa: a sum of a base and an elementwise product of two low-rank matrices, whose rank can be their ranks' product.

    W' = W + s · (A₁ B₁) ∘ (A₂ B₂),   Aᵢ: rows × r,  Bᵢ: r × columns,   s = alpha / r

Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
(arXiv:2108.06098).
"""

from __future__ import annotations

import math

from tether.forms.dropout import OutputDropout
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
)
from tether.forms.low_rank import number_before, pair_of
from tether.weights.expression import Expression
from tether.weights.operators.arithmetic import Multiply
from tether.weights.weight import Weight

__all__ = ["hadamard"]


class Hadamard(AddedForm):
    """What `tether.forms.hadamard` makes: the expression, and weights of its own."""

    def __init__(
        self,
        rank: int,
        alpha: float | None,
        split: int | None,
        seed: int | None,
        dtype: str | None,
        dropout: OutputDropout,
    ) -> None:
        self.stored, self.dropout = as_dtype(dtype), dropout
        self.rank, self.alpha, self.split, self.seed = as_rank(rank), as_alpha(alpha), split, seed

    def delta(self, base: Expression) -> Expression:
        """`s · (A₁ B₁) ∘ (A₂ B₂)`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        n, m = math.prod(rows), math.prod(columns)
        a1 = part(base, "loha_a1", kaiming(self.seed, 0), (n, self.rank), dtype=self.stored)
        b1 = part(base, "loha_b1", kaiming(self.seed, 1), (self.rank, m), dtype=self.stored)
        a2 = part(base, "loha_a2", kaiming(self.seed, 2), (n, self.rank), dtype=self.stored)
        b2 = part(base, "loha_b2", "zeros", (self.rank, m), dtype=self.stored)
        product = (a1 @ b1) * (a2 @ b2)
        if self.alpha is not None:
            product = self.alpha / self.rank * product
        return self.dropout.applied(from_matrix(product, rows, columns), base, rows, columns, self.seed)


def pairs_of(part: Expression) -> tuple[float, tuple[Weight, Weight], tuple[Weight, Weight]] | None:
    """The number before both products, and the stored factors of each; `None` if a part is something else."""
    scale, product = number_before(part)
    pairs = [pair_of(each) for each in product.operands] if isinstance(product, Multiply) else []
    if len(pairs) != 2 or pairs[0] is None or pairs[1] is None:
        return None
    return scale, pairs[0], pairs[1]


def hadamard(
    rank: int,
    *,
    alpha: float | None = None,
    split: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
) -> Hadamard:
    """An elementwise product of two trained low-rank matrices, to be added to a weight (LoHa, FedPara).

    It starts at zero, so the sum starts at the base.

    Args:
        rank: The inner size of both products; the sum can change by a matrix of rank `rank²`.
        alpha: The scale is `alpha / rank`; left out, it is 1.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        seed: Of the random starts, and of the dropouts.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.
        rank_dropout: The share of the part's outputs that are zero in a call with `training=True`, the same for all
            of its examples; the others are larger for it, so that the mean stays. (The name is PEFT's: no rank is
            dropped.)
        module_dropout: The share of calls with `training=True` in which the whole part is zero.

    Returns:
        The form, to be added to a base of any two or more axes; the sum has the base's shape.

    Raises:
        TetherError: A rank, alpha or dropout that makes no sense; at use, a base of fewer than two axes.

    Example:
    ```python
    child = tether.inherit(parent, kernel=lambda w: w.stop_gradient() + tether.forms.hadamard(4))
    ```
    """
    dropout = OutputDropout.asked(rank_dropout, module_dropout, rescaled=True)
    return Hadamard(rank, alpha, split, seed, dtype, dropout)
