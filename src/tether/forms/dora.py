"""DoRA: a low-rank sum, rescaled to trained lengths.

    W' = m · (W + s · A B) / ‖W + s · A B‖,   one length m per output, started at ‖W‖;
    the norm goes over the inputs and counts as a constant in the gradient

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), section 4.3 for the gradient.
"""

from __future__ import annotations

from tether.forms.dropout import as_rate, with_dropout, without_dropout
from tether.forms.form import Form, base_expression, part, rows_and_columns, shape_of_base, start_value
from tether.forms.low_rank import LowRank, factors_of, low_rank, stored_behind
from tether.forms.weight_norm import Magnitude, norms_of
from tether.weights.algebra import split_sum
from tether.weights.expression import Expression
from tether.weights.operators.arithmetic import Add, Subtract
from tether.weights.weight import Weight

__all__ = ["dora"]


class Dora(Form):
    """What `tether.forms.dora` makes: the expression, and weights of its own."""

    def __init__(self, direction: LowRank, dropout: float = 0.0) -> None:
        self.direction, self.dropout = direction, as_rate(dropout)

    def __call__(self, base: Expression) -> Expression:
        """`m · V / ‖V‖`, where V is the low-rank sum."""
        base = base_expression(self, base)
        return base + self.delta(base) if self.dropout else self._rescaled(base)

    def delta(self, base: Expression) -> Expression:
        """What the result has more than the base."""
        return with_dropout(self._rescaled(base) - base, base, self.dropout, self.direction.seed)

    def _rescaled(self, base: Expression) -> Expression:
        rows, _ = rows_and_columns(shape_of_base(self, base), self.direction.split, of=base.notation())
        direction = self.direction(base)
        lengths = part(base, "magnitude", norms_of(start_value(direction), len(rows)), dtype=self.direction.stored)
        return Magnitude(direction, lengths, rows=len(rows), detached=1)


def lengths_of(added: Expression) -> tuple[float, Weight, Weight, Weight] | None:
    """The scale, factors and lengths of a DoRA, alone or as what it adds to its base; `None` if it is no such."""
    added = without_dropout(added)
    if isinstance(added, Subtract) and isinstance(added.operands[0], Magnitude):
        added = added.operands[0]
    if not isinstance(added, Magnitude):
        return None
    direction, lengths = added.operands
    found = split_sum(direction) if isinstance(direction, Add) else None
    low = factors_of(found.added[0]) if found is not None and len(found.added) == 1 else None
    own = stored_behind(lengths)
    return None if low is None or own is None else (*low, own)


def dora(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    start: object = "zeros",
    split: int | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    dropout: float = 0.0,
) -> Dora:
    """A low-rank sum that is rescaled to a trained length per output (DoRA).

    Its own weights are the two factors of `low_rank` and the lengths `m`, of the shape of the outputs, which
    start at the norms of the sum: the result starts equal to the base, up to rounding.

    Args:
        rank: The inner size of the product.
        alpha: The product's scale is `alpha / rank`; left out, it is 1.
        rank_stabilized: Whether the scale is `alpha / √rank` instead.
        start: Where the product starts; see `low_rank`.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.
        seed: Of the random start of the first factor, and of the dropout.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.
        dropout: On the input of all that the form changes, in training; see `low_rank`. The base has its input whole.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        TetherError: A rank, alpha, start or dropout that makes no sense; at use, a base of fewer than two axes.

    Example:
    ```python
    kernel = tether.weight_of(layer, "kernel")
    tether.tie(layer, kernel=tether.forms.dora(8, alpha=16)(kernel.stop_gradient()))
    ```
    """
    direction = low_rank(
        rank, alpha=alpha, rank_stabilized=rank_stabilized, start=start, split=split, seed=seed, dtype=dtype
    )
    return Dora(direction, dropout)
