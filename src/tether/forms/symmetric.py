"""A square weight that equals its transpose.

    W' = triu(X) + triu(X, 1)ᵀ,   X the base, of which only the upper triangle counts

Lezcano-Casado 2019, "Trivializations for Gradient-Based Optimization on Manifolds" (arXiv:1909.09501), as in
PyTorch's tutorial on parametrizations.
"""

from __future__ import annotations

import keras
import numpy as np

from tether.errors import NotInvertible, ShapeMismatch, received
from tether.forms.form import Form, as_array, base_expression
from tether.types import Tensor
from tether.weights.expression import Expression, Node, Shape, register

__all__ = ["symmetric"]


@register
class Symmetric(Node):
    """The upper triangle of a matrix, mirrored to the lower."""

    name = "symmetric"

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the operand, if it is a square matrix."""
        if len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1]:
            raise ShapeMismatch(
                f"Only a square matrix can be symmetric, and {self.operands[0].notation()} is none. "
                f"{received(shape=shapes[0])}"
            )
        return shapes[0]

    def compute(self, *values: Tensor) -> Tensor:
        """The upper triangle, and it again below."""
        return keras.ops.add(keras.ops.triu(values[0]), keras.ops.transpose(keras.ops.triu(values[0], 1)))

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The same shape, if it is square."""
        return self.infer_shape(shape)

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value itself, which has the upper triangle."""
        array = as_array(value)
        apart = float(np.max(np.abs(array - array.T), initial=0.0))
        if not apart <= 1e-6 * max(1.0, float(np.max(np.abs(array), initial=0.0))):
            raise NotInvertible(
                f"{self.notation()} takes only symmetric matrices, so this value cannot be assigned to it. Assign "
                f"`(value + value.T) / 2`. {received(largest_difference_from_its_transpose=apart)}"
            )
        return [value]


class SymmetricForm(Form):
    """What `tether.forms.symmetric` makes: the expression, and weights of its own."""

    def __call__(self, base: Expression) -> Expression:
        """The base's upper triangle, mirrored."""
        return Symmetric(base_expression(self, base))


def symmetric() -> SymmetricForm:
    """A square matrix made symmetric: the base's upper triangle, mirrored.

    The base itself is what is stored, of shape `(n, n)`; what it has below the diagonal has no effect and no
    gradient. Any symmetric value can be assigned.

    Returns:
        The form: called with a base of shape `(n, n)`, it returns the expression, of that shape.

    Raises:
        ShapeMismatch: At use, a base that is not square.
        NotInvertible: When a value is assigned that is not symmetric.

    Example:
    ```python
    kernel = tether.Weight((64, 64), name="kernel")
    layer = tether.tie(keras.layers.Dense(64), kernel=tether.forms.symmetric()(kernel))
    ```
    """
    return SymmetricForm()
