"""The same value with another gradient."""

from __future__ import annotations

import math
from typing import Any

import keras

from tether.errors import InvalidConfig, received
from tether.weights.expression import Expression, Node, Shape, Tensor, Term
from tether.weights.operators.registry import register


class _Same(Node):
    """The value of its operand."""

    def infer_shape(self, *shapes: Shape) -> Shape:
        return shapes[0]

    def operand_shape(self, shape: Shape) -> Shape | None:
        """The same shape."""
        return shape

    def inverse(self, value: Tensor) -> list[Tensor | None] | None:
        """The value itself."""
        return [value]


@register
class StopGradient(_Same):
    """No gradient through this use."""

    name, elementwise_cost = "stop_gradient", False

    def compute(self, *values: Tensor) -> Tensor:
        """The value, cut off from its gradient."""
        return keras.ops.stop_gradient(values[0])

    def format(self, *terms: Term) -> Term:
        """`a.stop_gradient()`."""
        return Term(f"{terms[0].inside(100)}.stop_gradient()")


@register
class ScaleGradient(_Same):
    """The gradient through this use, multiplied by a number."""

    name, accepts = "scale_gradient", ("scale",)

    @classmethod
    def check_parameters(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The scale is a finite number."""
        scale = given.get("scale")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise InvalidConfig(f"A gradient's scale is a finite number. {received(scale=scale)}")
        return {"scale": float(scale)}

    def compute(self, *values: Tensor) -> Tensor:
        """The value, with its gradient scaled."""
        # x + scale * 0, with the gradient of scale * x: the value stays x to the last bit.
        still = keras.ops.stop_gradient(values[0])
        return keras.ops.add(still, keras.ops.multiply(self.parameters["scale"], keras.ops.subtract(values[0], still)))

    def format(self, *terms: Term) -> Term:
        """`a.scale_gradient(0.5)`."""
        return Term(f"{terms[0].inside(100)}.scale_gradient({self.parameters['scale']:g})")


def stop_gradient(x: Expression) -> Expression:
    """`x`, through which no gradient flows."""
    return x if isinstance(x, StopGradient) else StopGradient(x)


def scale_gradient(x: Expression, scale: float) -> Expression:
    """`x`, through which the gradient is multiplied by `scale`."""
    return ScaleGradient(x, scale=scale)
