"""A weight inside a fixed mask: pruned, or a parent of which a part may change.

    W' = mask · W                        (outside="zero")
    W' = mask · own + (1 − mask) · W     (outside="parent", W frozen, own started as a copy of W)

Fixed masks of pruned weights: Frankle and Carbin 2018, "The Lottery Ticket Hypothesis" (arXiv:1803.03635); a
sparse change of a frozen parent: Guo et al. 2020, "Parameter-Efficient Transfer Learning with Diff Pruning"
(arXiv:2012.07463).
"""

from __future__ import annotations

import numpy as np

from tether import ops
from tether.errors import ShapeMismatch, TetherError, received
from tether.forms.form import Form, base_expression, part, shape_of_base, start_value
from tether.weights.expression import Expression
from tether.weights.leaves import MAX_CONSTANT, Constant

__all__ = ["masked"]


class Masked(Form):
    """What `tether.forms.masked` makes: the expression, and weights of its own."""

    def __init__(self, mask: object, outside: str) -> None:
        if outside not in ("zero", "parent"):
            raise TetherError(f"Outside the mask is 'zero' or the frozen 'parent'. {received(outside=outside)}")
        array = np.asarray(mask)
        if array.dtype != bool and not (array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all()):
            raise TetherError(f"A mask is an array of booleans, or of zeros and ones. {received(mask=mask)}")
        self.mask, self.outside = array.astype(bool), outside

    def __call__(self, base: Expression) -> Expression:
        base = base_expression(self, base)
        shape = shape_of_base(self, base)
        try:
            fits = np.broadcast_shapes(self.mask.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ShapeMismatch(
                f"A mask has the shape of its weight, or one that broadcasts to it: {base.notation()} has shape "
                f"{shape}. {received(mask_shape=self.mask.shape)}"
            )
        mask: Expression
        if self.mask.size <= MAX_CONSTANT:
            mask = Constant.of(self.mask)
        else:  # too large for a config: stored, once
            mask = part(base, "mask", self.mask, dtype="bool", trainable=False)
        if self.outside == "zero":
            return ops.where(mask, base, 0.0)
        return ops.where(mask, part(base, "own", start_value(base)), base.stop_gradient())


def masked(mask: object, outside: str = "zero") -> Masked:
    """A weight that is itself only inside a fixed mask.

    With `outside="zero"` entries outside are zero and get no gradient (pruning). With `outside="parent"` entries
    outside are the base's, frozen, and those inside are the form's own, which start at the base's: the result
    starts equal to the base, and only the masked part trains.

    Args:
        mask: An array of booleans, or of zeros and ones, of the weight's shape or one that broadcasts to it.
        outside: `"zero"` or `"parent"`.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        TetherError: Another array or word; at use, a mask that does not fit the base.

    Example:
    ```python
    kernel = tether.weight_of(layer, "kernel")
    tether.tie(layer, kernel=tether.forms.masked(abs(kernel.numpy()) > 0.01)(kernel))
    ```
    """
    return Masked(mask, outside)
