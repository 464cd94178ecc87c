"""LoKr: a sum of a base and a Kronecker product of a small matrix and a matrix that may be low-rank.

    W' = W + s · C ⊗ D,   C: rows₁ × columns₁,  D: rows₂ × columns₂ (or A B of rank r),
    rows = rows₁ · rows₂,  columns = columns₁ · columns₂,   s = alpha / r

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
(arXiv:2309.14859).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tether import ops
from tether.errors import TetherError, received
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
from tether.forms.low_rank import number_before, pair_of, stored_behind
from tether.weights.expression import Expression, Shape
from tether.weights.operators.structure import Einsum, Reshape
from tether.weights.weight import Weight

__all__ = ["kronecker"]


_PLAIN, _OF_WINDOW = "ab,cd->acbd", ("ab,wcd->wacbd", "ab,wcd->wcadb")


@dataclass(frozen=True)
class Sizes:
    """The sizes of both matrices: `(rows, columns)` of each."""

    small: tuple[int, int]
    large: tuple[int, int]
    inner: int | None
    """The inner size of the larger one, if it is a product."""
    window: Shape = ()
    """The window of a convolution, if only its channels are divided: it belongs to the larger matrix then."""
    turned: bool = False
    """Whether it is `D ⊗ C`, for each place of a window."""


class Kronecker(AddedForm):
    """What `tether.forms.kronecker` makes: the expression, and weights of its own."""

    def __init__(
        self,
        rank: int | None,
        alpha: float | None,
        factor: int | None,
        split: int | None,
        seed: int | None,
        dtype: str | None,
        dropout: OutputDropout,
    ) -> None:
        self.stored, self.dropout = as_dtype(dtype), dropout
        self.rank = None if rank is None else as_rank(rank)
        self.factor = None if factor is None else as_rank(factor, "factor")
        self.alpha, self.split, self.seed = as_alpha(alpha), split, seed
        if self.alpha is not None and self.rank is None:
            raise TetherError(
                f"The scale is alpha / rank, and no rank is given: multiply instead, as in `w + 0.5 * kronecker()`. "
                f"{received(alpha=alpha)}"
            )

    def delta(self, base: Expression) -> Expression:
        """`s · C ⊗ D`, in the base's shape."""
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        sizes = self.sizes(rows, columns)
        (n1, m1), (n2, m2), window = sizes.small, sizes.large, math.prod(sizes.window)
        small = part(base, "lokr_c", "zeros", (n1, m1), dtype=self.stored)
        large: Expression
        if sizes.inner is None:
            large = part(base, "lokr_d", kaiming(self.seed), (window * n2, m2), dtype=self.stored)
        else:
            a = part(base, "lokr_a", kaiming(self.seed, 0), (window * n2, sizes.inner), dtype=self.stored)
            large = a @ part(base, "lokr_b", kaiming(self.seed, 1), (sizes.inner, m2), dtype=self.stored)
        if sizes.window:
            product = ops.einsum(_OF_WINDOW[sizes.turned], small, large.reshape(window, n2, m2))
        else:
            product = ops.einsum(_PLAIN, small, large)
        product = product.reshape(window * n1 * n2, m1 * m2)
        if self.alpha is not None and self.rank is not None:
            product = self.alpha / self.rank * product
        return self.dropout.applied(from_matrix(product, rows, columns), base, rows, columns, self.seed)

    def sizes(self, rows: Shape, columns: Shape) -> Sizes:
        """The sizes of the matrices for a base of these rows and columns."""
        (n1, n2), (m1, m2) = divided(math.prod(rows), self.factor), divided(math.prod(columns), self.factor)
        whole = self.rank is None or 2 * self.rank >= max(n2, m2)
        return Sizes((n1, m1), (n2, m2), None if whole else self.rank)


def matrices_of(part: Expression) -> tuple[float, Sizes, list[Weight]] | None:
    """The number before a Kronecker product, its sizes, and the small and the large matrix or its two factors.

    `None` if a part is something else.
    """
    scale, product = number_before(part)
    equation = product.parameters["equation"] if isinstance(product, Einsum) else None
    if not isinstance(product, Einsum) or equation not in (_PLAIN, *_OF_WINDOW):
        return None
    small, large = product.operands
    *window, n2, m2 = large.shape or ()
    inner = large.operands[0] if isinstance(large, Reshape) and window else large
    pair, whole, first = pair_of(inner), stored_behind(inner), stored_behind(small)
    made = [whole] if whole is not None else [*pair] if pair is not None else []
    if first is None or not made:
        return None
    n1, m1 = small.shape or ()
    rank = int((made[0].shape or ())[-1]) if len(made) == 2 else None
    return scale, Sizes((n1, m1), (n2, m2), rank, tuple(window), equation == _OF_WINDOW[1]), [first, *made]


def divided(size: int, factor: int | None) -> tuple[int, int]:
    """A size as a product of a smaller and a larger number: as near to each other as they get, or with a factor."""
    if factor is not None and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = min(math.isqrt(size), factor or size)
    small = next(n for n in range(most, 0, -1) if size % n == 0)
    return small, size // small


def kronecker(
    rank: int | None = None,
    *,
    alpha: float | None = None,
    factor: int | None = None,
    split: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    rank_dropout: float = 0.0,
    rank_dropout_scale: bool = False,
    module_dropout: float = 0.0,
) -> Kronecker:
    """A Kronecker product of two trained matrices, to be added to a weight (LoKr).

    It starts at zero, so the sum starts at the base.

    Args:
        rank: The rank of the larger matrix, which is then a product; left out, or at least half its longer side,
            it is one matrix.
        alpha: The scale is `alpha / rank`; left out, it is 1.
        factor: The size of the smaller matrix on the axes that it divides, and at most its size on others; left
            out, both matrices are as near to each other's size as they get.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        seed: Of the random starts, and of the dropouts.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.
        rank_dropout: The share of the part's outputs that are zero in a call with `training=True`, the same for all
            of its examples. (The name is PEFT's: no rank is dropped.)
        rank_dropout_scale: Whether the other outputs are larger for it, so that the mean stays.
        module_dropout: The share of calls with `training=True` in which the whole part is zero.

    Returns:
        The form, to be added to a base of any two or more axes; the sum has the base's shape.

    Raises:
        TetherError: A number that makes no sense; at use, a base of fewer than two axes.

    Example:
    ```python
    child = tether.inherit(parent, kernel=lambda w: w.stop_gradient() + tether.forms.kronecker(4, factor=8))
    ```
    """
    dropout = OutputDropout.asked(rank_dropout, module_dropout, rescaled=rank_dropout_scale)
    return Kronecker(rank, alpha, factor, split, seed, dtype, dropout)
