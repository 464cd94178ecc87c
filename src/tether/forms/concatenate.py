"""A child with more units than its parent: the parent's first, its own beside them.

    W' = [W, V],   b' = [b, c]

The growing columns of progressive networks: Rusu et al. 2016, "Progressive Neural Networks" (arXiv:1606.04671).
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

from tether import ops
from tether.errors import Unsupported
from tether.forms.form import LayerForm, as_rank, kernel_of, part, resized, shape_of_base, units_of
from tether.types import Function
from tether.weights.expression import Expression


class ConcatenateForm(LayerForm):
    """What `tether.forms.concatenate` makes: the expression, and weights of its own."""

    def __init__(self, units: int, kernel_initializer: object, bias_initializer: object) -> None:
        self.units = as_rank(units, "units")
        self.kernel_initializer, self.bias_initializer = kernel_initializer, bias_initializer

    def layer(self, parent: keras.Layer) -> keras.Layer:
        """A layer like the parent, with more units."""
        units = units_of("concatenate", parent)
        if not _is_elementwise(parent.activation):
            name = getattr(parent.activation, "__name__", type(parent.activation).__name__)
            raise Unsupported(
                f"The outputs of {parent.name!r} depend on each other through its activation {name!r}, so more units "
                "would change the parent's outputs. Give the parent no activation and apply it after the child: "
                f"`keras.layers.Activation({name!r})(child(x))`."
            )
        return resized(parent, units + self.units)

    def weights(self, parent: Mapping[str, Expression]) -> dict[str, Expression]:
        """The parent's weights with columns of the child's own behind them."""
        kernel = kernel_of(self, parent)
        own = part(kernel, "own", self.kernel_initializer, (*shape_of_base(self, kernel)[:-1], self.units))
        found = {"kernel": ops.concatenate([kernel, own], axis=-1)}
        bias = parent.get("bias")
        if bias is not None:
            own = part(bias, "own", self.bias_initializer, (*shape_of_base(self, bias)[:-1], self.units))
            found["bias"] = ops.concatenate([bias, own], axis=-1)
        return found


def _is_elementwise(activation: Function | None) -> bool:
    """Whether what an activation gives for some units does not depend on the others: tried on numbers."""
    if activation is None:
        return True
    if isinstance(activation, keras.layers.Layer) and activation.weights:
        return False
    values = np.linspace(-2.5, 3.0, 12, dtype="float32").reshape(2, 6)
    for some in (slice(0, 4), slice(2, 6)):
        try:
            whole, alone = (
                keras.ops.convert_to_numpy(activation(keras.ops.convert_to_tensor(x)))
                for x in (values, values[:, some])
            )
        except Exception:  # a function of a fixed width may fail in any way
            return False
        if whole.shape != values.shape or not np.allclose(whole[:, some], alone, atol=1e-6):
            return False
    return True


def concatenate(
    units: int, *, kernel_initializer: object = "glorot_uniform", bias_initializer: object = "zeros"
) -> ConcatenateForm:
    """A child whose outputs are its parent's, and `units` more of its own.

    For Dense, EinsumDense (its last output axis) and the convolutions; the activation is the parent's.

    Args:
        units: How many more: the child's kernel has shape `(..., parent's units + units)`.
        kernel_initializer: Starts the child's own columns.
        bias_initializer: Starts the child's own biases, if the parent has some.

    Returns:
        The form, for `tether.inherit(parent, form)`.

    Raises:
        Unsupported: At use, another kind of layer, or an activation such as softmax through which outputs depend
            on each other.

    Example:
    ```python
    child = tether.inherit(parent, tether.forms.concatenate(16))
    ```
    """
    return ConcatenateForm(units, kernel_initializer, bias_initializer)


__all__ = ["concatenate"]
