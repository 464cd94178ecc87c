"""BOFT: a base whose inputs are rotated by a butterfly: blocks, then blocks of what was far apart.

    W' = (M_m ⋯ M₁ W) · s,   Mᵢ = Pᵢ diag(R₁, …, R_k) Pᵢᵀ,   R as in OFT,   s: one number for each output, started at 1

P₁ is the identity; each further permutation brings together halves of blocks that are twice as far apart, so that few
small blocks make a rotation of all inputs. Liu et al. 2024, "Parameter-Efficient Orthogonal Finetuning via Butterfly
Factorization" (arXiv:2311.06243).
"""

from __future__ import annotations

import math

import numpy as np

from tether import ops
from tether.errors import ShapeMismatch, received
from tether.forms.form import (
    Form,
    as_dtype,
    as_rank,
    base_expression,
    from_matrix,
    part,
    rows_and_columns,
    shape_of_base,
)
from tether.forms.low_rank import stored_behind
from tether.forms.oft import Turn, as_block, blocks, turns_in
from tether.weights.expression import Expression
from tether.weights.operators.arithmetic import Multiply, Subtract
from tether.weights.weight import Weight

__all__ = ["boft"]


class Boft(Form):
    """What `tether.forms.boft` makes: the expression, and weights of its own."""

    def __init__(self, size: int, factors: int, split: int | None, dtype: str | None) -> None:
        self.stored = as_dtype(dtype)
        self.size, self.factors, self.split = as_block(size), as_rank(factors, "factors"), split

    def __call__(self, base: Expression) -> Expression:
        """`(M_m ⋯ M₁ W) · s`, in the base's shape."""
        base = base_expression(self, base)
        rows, columns = rows_and_columns(shape_of_base(self, base), self.split, of=base.notation())
        size, m = self.size, math.prod(columns)
        count = blocks(size, rows, base)
        if self.factors > 1 and (size % 2 or count % 2 ** (self.factors - 1)):
            raise ShapeMismatch(
                f"A butterfly of {self.factors} factors has blocks of an even size, and a multiple of "
                f"{2 ** (self.factors - 1)} of them; {base.notation()} has {count} blocks of {size}. "
                f"{received(size=size, factors=self.factors)}"
            )
        own = part(base, "boft_q", "zeros", (self.factors * count, size * (size - 1) // 2), dtype=self.stored)
        turns = Turn(own)
        result = base
        for factor in range(self.factors):
            turn = turns if self.factors == 1 else turns[factor * count : (factor + 1) * count]
            if factor == 0:
                turned = ops.einsum("kij,kjo->kio", turn, result.reshape(count, size, m))
            else:
                apart, half = 2**factor, size // 2
                turn = turn.reshape(count // apart, apart, 2, half, 2, half)
                turned = ops.einsum("ghaibj,gbhjo->gahio", turn, result.reshape(count // apart, 2, apart, half, m))
            result = result + from_matrix(turned.reshape(count * size, m), rows, columns)
        return result * part(base, "boft_s", np.ones(columns), dtype=self.stored)


def butterfly_of(part: Expression) -> tuple[Weight, Weight] | None:
    """The stored triangles and factors of a BOFT, alone or as what it adds to its base; `None` if it is no such."""
    product = part.operands[0] if isinstance(part, Subtract) else part
    if not isinstance(product, Multiply):
        return None
    turns, scale = turns_in(product.operands[0]), stored_behind(product.operands[1])
    own = stored_behind(turns[0].operands[0]) if len(turns) == 1 and turns[0].parameters["terms"] is None else None
    return None if own is None or scale is None else (own, scale)


def boft(size: int = 4, factors: int = 1, *, split: int | None = None, dtype: str | None = None) -> Boft:
    """A base whose inputs are rotated by a butterfly, and whose outputs are scaled (BOFT).

    The result starts equal to the base.

    Args:
        size: The size of the blocks; it divides the number of inputs.
        factors: How many rotations follow each other. With more than one the size is even, and the number of blocks a
            multiple of `2 ** (factors - 1)`.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        TetherError: A number that makes no sense; at use, a base of fewer than two axes, or of a number of inputs that
            cannot be divided so.

    Example:
    ```python
    child = tether.inherit(parent, kernel=tether.forms.boft(4, factors=2))
    ```
    """
    return Boft(size, factors, split, dtype)
