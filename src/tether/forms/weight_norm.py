"""Weight normalisation: a kernel's length and direction as two weights.

    W' = g · V / ‖V‖,   one length per output: the norm goes over all axes but the last

Salimans and Kingma 2016, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
Neural Networks" (arXiv:1602.07868).
"""

from __future__ import annotations

import keras
import numpy as np

from tether.errors import ShapeMismatch, as_int, received
from tether.forms.form import (
    Float32Node,
    Form,
    as_array,
    base_expression,
    part,
    rows_and_columns,
    shape_of_base,
    start_value,
)
from tether.types import Array, Config, Tensor
from tether.weights.axes import Axes, Links
from tether.weights.expression import Expression, Shape, Term, register

__all__ = ["weight_norm"]

TINY = 1e-30
"""The least squared norm: an output whose weights are all zero has the direction zero, and a finite gradient."""


class _OverNorms(Float32Node):
    """A direction `v` and lengths `g`; norms go over the leading axes, and may count as constants in the gradient."""

    arity, accepts = 2, ("rows", "detached")
    __slots__ = ()

    @classmethod
    def check_parameters(cls, given: Config) -> Config:
        """How many leading axes the norm goes over, and 1 for a detached norm."""
        return {"rows": as_int(given.get("rows"), "rows"), "detached": as_int(given.get("detached", 0), "detached")}

    def infer_shape(self, *shapes: Shape) -> Shape:
        """That of the direction, if there is one length for each of its outputs."""
        (v, g), rows = shapes, self.parameters["rows"]
        if not 0 < rows < len(v) or g != v[rows:]:
            raise ShapeMismatch(
                f"A magnitude has one length for each output: norms over {rows} leading axes of {v} need lengths of "
                f"shape {v[max(rows, 0) :]}. {received(shape=g)}"
            )
        return v

    def ratio(self, v: Tensor, g: Tensor) -> Tensor:
        """What each output of the direction is multiplied with: `g / ‖v‖`."""
        axes = tuple(range(self.parameters["rows"]))
        norms = keras.ops.sqrt(keras.ops.maximum(keras.ops.sum(keras.ops.square(v), axis=axes), TINY))
        if self.parameters["detached"]:
            norms = keras.ops.stop_gradient(norms)
        return keras.ops.divide(g, norms)


@register
class NormRatio(_OverNorms):
    """`g / ‖v‖`: a number for each output."""

    name = "norm_ratio"
    __slots__ = ()

    def infer_shape(self, *shapes: Shape) -> Shape:
        return super().infer_shape(*shapes)[self.parameters["rows"] :]

    def axes_from(self, links: Links, *operands: Axes) -> Axes | None:
        """Those of the outputs."""
        return links.broadcast(self.shape or (), operands[1], operands[0][self.parameters["rows"] :])

    def compute_wide(self, *values: Tensor) -> Tensor:
        return self.ratio(*values)


@register
class Magnitude(_OverNorms):
    """`g * v / ‖v‖`."""

    name = "magnitude"
    __slots__ = ()

    def compute_wide(self, *values: Tensor) -> Tensor:
        return keras.ops.multiply(values[0], self.ratio(*values))

    def expanded(self) -> Expression:
        """The direction times what each of its outputs is multiplied with."""
        return self.operands[0] * NormRatio(*self.operands, **self.parameters)

    def format(self, *terms: Term) -> Term:
        """`magnitude(g, v)`: the length, then what has the direction."""
        return Term(f"magnitude({terms[1].text}, {terms[0].text})")

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value itself has the direction, its norms are the lengths."""
        array = as_array(value)
        return [self.start(array, 0), self.start(norms_of(array, self.parameters["rows"]), 1)]


def norms_of(array: Array, rows: int) -> Array:
    """Euclidean norms over the leading axes."""
    return np.asarray(np.sqrt(np.sum(np.square(array), axis=tuple(range(rows)))))


class WeightNorm(Form):
    """What `tether.forms.weight_norm` makes: the expression, and weights of its own."""

    def __call__(self, base: Expression) -> Expression:
        """`g · V / ‖V‖`, where V is the base."""
        base = base_expression(self, base)
        shape = shape_of_base(self, base)
        rows = len(rows_and_columns(shape, len(shape) - 1, of=base.notation())[0])
        return Magnitude(base, part(base, "g", norms_of(start_value(base), rows)), rows=rows, detached=0)


def weight_norm() -> WeightNorm:
    """A weight's length per output trained apart from its direction.

    The base itself is what is stored as the direction V, of shape `(..., outputs)`; the lengths g, of shape
    `(outputs,)`, are the form's own and start at the base's norms, so the result starts equal to the base. It can
    be assigned, as can PyTorch's: V takes the value and g its norms.

    Returns:
        The form: called with a base of shape `(..., outputs)`, it returns the expression, of that shape.

    Raises:
        TetherError: At use, a base of fewer than two axes, or of no known shape.

    Example:
    ```python
    kernel = tether.Weight((784, 64), name="kernel")
    layer = tether.tie(keras.layers.Dense(64), kernel=tether.forms.weight_norm()(kernel))
    ```
    """
    return WeightNorm()
