"""A weight trained whole, beside the one that it stands in for.

    W' = W + (V - W),   V: of the shape of W, started at W

What is added is the difference, so that it can be an adapter among others: switched, weighted, saved alone.
"""

from __future__ import annotations

from tether.forms.form import AddedForm, as_dtype, base_expression, part, shape_of_base, start_value
from tether.forms.low_rank import stored_behind
from tether.weights.expression import Expression
from tether.weights.leaves import Constant
from tether.weights.operators.arithmetic import Multiply, Subtract
from tether.weights.weight import Weight

__all__ = ["full"]


class Full(AddedForm):
    """What `tether.forms.full` makes: the expression, and a weight of its own."""

    def __init__(self, dtype: str | None) -> None:
        self.stored = as_dtype(dtype)

    def delta(self, base: Expression) -> Expression:
        """The own value minus the base's."""
        base = base_expression(self, base)
        shape_of_base(self, base)
        own = part(base, "full", start_value(base), dtype=self.stored)
        return 1.0 * (own - base)  # as one part: in `base + own - base` nothing would tell which weight is the base


def whole_of(part: Expression) -> Weight | None:
    """The stored value of a part that was trained whole, alone or less its base; `None` if it is something else."""
    if isinstance(part, Multiply) and isinstance(part.operands[0], Constant) and isinstance(part.operands[1], Subtract):
        part = part.operands[1]
    own = stored_behind(part.operands[0] if isinstance(part, Subtract) else part)
    return own if own is not None and own.role == "part" and own.shape == part.shape else None


def full(*, dtype: str | None = None) -> Full:
    """The difference of a value of the child's own to its parent's, to be added to a weight.

    The own value has the weight's shape and starts at it, so the sum starts equal to the base. It is for what an
    adapter trains whole, such as a new head (the `modules_to_save` of PEFT).

    Args:
        dtype: In which the own value is stored; left out, the base's dtype, but float32 for one of 16 bits.

    Returns:
        The form, to be added to a weight.

    Raises:
        UnknownShape: At use, a base of no known shape.

    Example:
    ```python
    tether.adapters.add(model, "task", {"*/query/kernel": tether.low_rank(8), "head/*": tether.forms.full()})
    ```
    """
    return Full(dtype)
