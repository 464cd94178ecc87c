"""A child that goes on where its parent ends, as one layer: the parent's matrix, then a matrix of its own.

    W' = W S,   b' = b S + c

A product of matrices trained in the place of one: Arora, Cohen and Hazan 2018, "On the Optimization of Deep
Networks: Implicit Acceleration by Overparameterization" (arXiv:1802.06509).
"""

from __future__ import annotations

from collections.abc import Mapping

import keras

from tether.errors import Unsupported
from tether.forms.form import LayerForm, as_rank, kernel_of, part, resized, shape_of_base, units_of
from tether.weights.expression import Expression

__all__ = ["compose"]


class Compose(LayerForm):
    """What `tether.forms.compose` makes: the expression, and weights of its own."""

    def __init__(self, units: int, activation: object, use_bias: bool, kernel_initializer: object) -> None:
        self.units, self.activation, self.use_bias = as_rank(units, "units"), activation, bool(use_bias)
        self.kernel_initializer = kernel_initializer

    def layer(self, parent: keras.Layer) -> keras.Layer:
        """A layer like the parent, with the child's units and activation."""
        units_of("compose", parent)
        if parent.activation not in (None, keras.activations.linear):
            name = getattr(parent.activation, "__name__", type(parent.activation).__name__)
            raise Unsupported(
                f"{parent.name!r} ends in the activation {name!r}, after which its matrix and the child's are not one "
                f"matrix. Stack the layers: `keras.Sequential([parent, keras.layers.Dense({self.units})])`."
            )
        return resized(parent, self.units, activation=self.activation, needs_bias=self.use_bias)

    def weights(self, parent: Mapping[str, Expression]) -> dict[str, Expression]:
        """The parent's weights times a matrix of the child's own."""
        kernel, bias = kernel_of(self, parent), parent.get("bias")
        matrix = part(kernel, "compose", self.kernel_initializer, (shape_of_base(self, kernel)[-1], self.units))
        found: dict[str, Expression] = {"kernel": kernel @ matrix}
        if bias is not None:
            found["bias"] = bias @ matrix
        if self.use_bias:
            shape = (*(shape_of_base(self, bias)[:-1] if bias is not None else ()), self.units)
            own = part(kernel if bias is None else bias, "own", "zeros", shape)
            found["bias"] = own if bias is None else found["bias"] + own
        return found


def compose(
    units: int, *, activation: object = None, use_bias: bool = True, kernel_initializer: object = "glorot_uniform"
) -> Compose:
    """A child that computes `activation(parent(x) @ S + c)` as one layer of its parent's kind.

    For Dense, EinsumDense (its last output axis) and the convolutions, with no activation of the parent's.

    Args:
        units: The child's units: S has shape `(parent's units, units)`.
        activation: The child's activation.
        use_bias: Whether the child has a bias `c` of its own. The parent's is carried through S in any case.
        kernel_initializer: Starts S.

    Returns:
        The form, for `tether.inherit(parent, form)`.

    Raises:
        Unsupported: At use, another kind of layer, or a parent with an activation.

    Example:
    ```python
    child = tether.inherit(parent, tether.forms.compose(10, activation="softmax"))
    ```
    """
    return Compose(units, activation, use_bias, kernel_initializer)
