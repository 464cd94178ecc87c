"""IA3: a weight's outputs (or inputs), each multiplied by a trained number.

    W' = W · s,   s started at one

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
(arXiv:2205.05638).
"""

from __future__ import annotations

import numpy as np

from tether.errors import ShapeMismatch, TetherError, as_int, as_ints, received
from tether.forms.form import ScalingForm, as_dtype, part, shape_of_base
from tether.forms.low_rank import stored_behind
from tether.weights.expression import Expression
from tether.weights.operators.arithmetic import Multiply, StopGradient, Subtract
from tether.weights.weight import Weight

__all__ = ["scale"]


class Scale(ScalingForm):
    """What `tether.forms.scale` makes: the expression, and weights of its own."""

    def __init__(self, axis: object, dtype: str | None) -> None:
        self.stored = as_dtype(dtype)
        if axis is None:
            self.axis: tuple[int, ...] = ()
        else:
            self.axis = as_ints(axis, "`axis`") if isinstance(axis, (list, tuple)) else (as_int(axis, "`axis`"),)

    def factor(self, base: Expression) -> Expression:
        """One number for each entry of the axes."""
        shape = shape_of_base(self, base)
        if any(not -len(shape) <= axis < len(shape) for axis in self.axis):
            raise ShapeMismatch(
                f"{base.notation()} has shape {shape}, so an axis is {-len(shape)} to {len(shape) - 1}. "
                f"{received(axis=self.axis)}"
            )
        axes = sorted(axis % len(shape) for axis in self.axis)
        if len(set(axes)) != len(axes):
            raise TetherError(f"`axis` names each axis once. {received(axis=self.axis)}")
        kept = shape[axes[0] :] if axes else ()
        first = len(shape) - len(kept)
        sizes = [size if first + place in axes else 1 for place, size in enumerate(kept)]
        return part(base, "scale", np.ones(sizes), dtype=self.stored)


def scaled_of(part: Expression) -> tuple[Expression, Weight] | None:
    """The base and the stored factors of a product, alone or as what it adds to its base; `None` if it is no such.

    Factors that no form has made are such beside a base that gets no gradient.
    """
    less = part.operands[1] if isinstance(part, Subtract) else None
    product = part if less is None else part.operands[0]  # type: ignore[attr-defined]
    if not isinstance(product, Multiply):
        return None
    base, own = product.operands[0], stored_behind(product.operands[1])
    if own is None or not base.weights_used() or (less is not None and less != base):
        return None
    return (base, own) if own.role == "part" or isinstance(base, StopGradient) else None


def scale(axis: int | tuple[int, ...] | None = -1, *, dtype: str | None = None) -> Scale:
    """A trained factor for each entry of an axis, to multiply a weight with (IA3). It starts at one.

    For the exact IA3 of a layer's outputs its bias takes the same vector, which is plain arithmetic:

    ```python
    kernel, bias = tether.weight_of(layer, "kernel"), tether.weight_of(layer, "bias")
    s = tether.Weight((16,), "ones", name="ia3")
    tether.tie(layer, kernel=kernel.stop_gradient() * s, bias=bias.stop_gradient() * s)
    ```

    Args:
        axis: The axis or axes that have factors: -1 for a kernel's outputs, 0 for the inputs of a Dense kernel
            (IA3 of a feed-forward layer), a tuple for one factor for each combination, None for a single number.
        dtype: In which the form's own weights are stored; left out, the base's dtype, but float32 for one of 16 bits.

    Returns:
        The form, to multiply a base with; the product has the base's shape.

    Raises:
        TetherError: At use, an axis that the base does not have.

    Example:
    ```python
    base = tether.Weight((8, 64), name="base")
    layer = tether.tie(keras.layers.Dense(64), kernel=base.stop_gradient() * tether.forms.scale())
    ```
    """
    return Scale(axis, dtype)
