"""A weight that cannot become zero or negative: a scale, a rate, a mixture's weight.

    W' = softplus(X) = log(1 + exp(X)),   X the base

Dugas et al. 2001, "Incorporating Second-Order Functional Knowledge for Better Option Pricing" (NIPS 13), where
softplus comes from; it has no arXiv number.
"""

from __future__ import annotations

import keras
import numpy as np

from tether.forms.form import Float32Node, Form, as_array, base_expression
from tether.types import Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Shape, register

__all__ = ["positive"]


@register
class Softplus(Float32Node):
    """Each number `x` as `log(1 + exp(x))`."""

    name = "softplus"
    __slots__ = ()

    def infer_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def compute_wide(self, *values: Tensor) -> Tensor:
        return keras.ops.softplus(values[0])

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        return operands[0]

    def operand_shape(self, shape: Shape) -> Shape | None:
        return shape

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """`log(exp(v) - 1)`, in a form that neither overflows nor cancels."""
        array = as_array(value)
        if not np.all((array > 0) & np.isfinite(array)):
            raise self.out_of_range("finite numbers above zero", least=float(np.min(array)), most=float(np.max(array)))
        return [self.start(array + np.log(-np.expm1(-array)))]


class Positive(Form):
    """What `tether.forms.positive` makes: the expression, and weights of its own."""

    def __call__(self, base: Expression) -> Expression:
        return Softplus(base_expression(self, base))


def positive() -> Positive:
    """A weight made positive by softplus. The base itself is what is stored, of any shape.

    A base whose shape comes from the tie starts so that the result is what the layer's initializer gave, if that
    is positive ("ones", say). Any positive value can be assigned.

    Returns:
        The form: called with a base, it returns the expression, of the base's shape.

    Raises:
        NotInvertible: When a value is assigned that is not positive everywhere.

    Example:
    ```python
    gamma = tether.forms.positive()(tether.Weight(name="gamma"))
    norm = tether.tie(keras.layers.LayerNormalization(), gamma=gamma)
    ```
    """
    return Positive()
