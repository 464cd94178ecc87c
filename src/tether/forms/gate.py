"""A trained mixture of a base and a weight of one's own: a soft choice of how much to share.

    W' = g · W + (1 − g) · own,   g = sigmoid(z),   own started as a copy of W

The learned mixing of highway networks (Srivastava et al. 2015, arXiv:1505.00387), applied to weights in the place
of activations.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from tether import ops
from tether.errors import TetherError, received
from tether.forms.form import Form, base_expression, part, rows_and_columns, shape_of_base, start_value
from tether.weights.expression import Expression

__all__ = ["gate"]


class Gate(Form):
    """What `tether.forms.gate` makes: the expression, and weights of its own."""

    def __init__(self, start: object, per: str, split: int | None) -> None:
        if not isinstance(start, (float, np.floating)) or not 0 < start < 1:
            raise TetherError(
                f"A gate starts between 0 (all own) and 1 (all base), not at them. {received(start=start)}"
            )
        if per not in ("weight", "output"):
            raise TetherError(f"A gate is one number per 'weight', or one per 'output'. {received(per=per)}")
        self.start, self.per, self.split = float(start), per, split

    def __call__(self, base: Expression) -> Expression:
        """The mixture, written as the base and a share of the difference: it starts at the base to the last bit."""
        base = base_expression(self, base)
        shape = shape_of_base(self, base)
        columns: Any = ()
        if self.per == "output":
            columns = rows_and_columns(shape, self.split)[1] if len(shape) > 1 else shape
        z = part(base, "gate", np.full(columns, math.log(self.start / (1 - self.start))))
        own = part(base, "own", start_value(base))
        return base + ops.apply(keras.ops.sigmoid, -z) * (own - base)


def gate(*, start: float = 0.5, per: str = "weight", split: int | None = None) -> Gate:
    """A mixture of a weight and one's own copy of it, whose proportion is trained.

    It starts equal to the base. The copy moves first: as long as both are equal, the proportion has no gradient.

    Args:
        start: The share of the base at the start, between 0 and 1.
        per: `"weight"` for one proportion, `"output"` for one for each output.
        split: How many leading axes of a kernel are inputs; see `rows_and_columns`.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        TetherError: A start outside (0, 1), or another `per`.

    Example:
    ```python
    child = tether.inherit(parent, kernel=tether.forms.gate(start=0.9, per="output"))
    ```
    """
    return Gate(start, per, split)
