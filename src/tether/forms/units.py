"""What the forms that change a layer's units know of Keras layers: whose last kernel axis is the outputs, and how many.

Not a form: nothing here is public.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from tether.errors import TetherError, Unsupported, received
from tether.weights.expression import Expression

__all__: list[str] = []

KINDS: dict[Any, str] = {
    keras.layers.Dense: "units",
    keras.layers.EinsumDense: "output_shape",
    keras.layers.Conv1D: "filters",
    keras.layers.Conv2D: "filters",
    keras.layers.Conv3D: "filters",
}


def _kind(parent: keras.Layer) -> Any:
    """The Keras class that a layer is an instance of, and not of a subclass that may compute otherwise."""
    cls = getattr(type(parent), "_tether_base", type(parent))
    return cls if cls in KINDS else None


def units_of(form: str, parent: keras.Layer) -> int:
    """How many outputs a layer has on the last axis of its kernel.

    Raises:
        Unsupported: The layer is of another kind, or its outputs are not the last axis of its kernel.
    """
    kind = _kind(parent)
    if kind is None:
        raise Unsupported(
            f"`{form}` knows where the outputs are in Dense, EinsumDense, Conv1D, Conv2D and Conv3D. For another layer "
            "write the expressions yourself: `tether.tie(layer, kernel=tether.ops.concatenate([w, own], -1))`. "
            f"{received(layer=type(parent).__name__)}"
        )
    if parent.quantization_mode is not None or getattr(parent, "lora_enabled", False):
        raise Unsupported(
            f"`{form}` needs the weights of {parent.name!r} as they are, and it is quantised or has LoRA enabled by "
            "Keras. Use it on the layer before that, and `tether.low_rank` for a low-rank part."
        )
    if getattr(parent, "groups", 1) != 1:
        raise Unsupported(
            f"{parent.name!r} convolves in {parent.groups} groups, whose outputs do not see the same inputs; `{form}` "
            "needs groups=1."
        )
    if kind is keras.layers.EinsumDense:
        return _last_of_einsum(form, parent)
    return int(getattr(parent, KINDS[kind]))


def _last_of_einsum(form: str, parent: keras.Layer) -> int:
    inputs, _, output = parent.equation.replace(" ", "").partition("->")
    features, _, kernel = inputs.partition(",")
    last = kernel[-1:]
    sizes = parent.get_config()["output_shape"]
    size = sizes[-1] if isinstance(sizes, (list, tuple)) else sizes
    biased = parent.bias_axes is None or last in parent.bias_axes
    if not last or last != output[-1:] or last in features or size is None or not biased:
        raise Unsupported(
            f"`{form}` needs an EinsumDense whose kernel, outputs and bias end in the same axis of a known size, as in "
            f"'ab,bc->ac'. {received(equation=parent.equation, output_shape=sizes, bias_axes=parent.bias_axes)}"
        )
    return int(size)


def resized(parent: keras.Layer, units: int, *, needs_bias: bool = False, **changes: Any) -> Any:
    """A new layer like the parent, not built, with another number of units.

    Constraints stay with the parent: they hold for what is stored, not for what a child makes of it.

    Args:
        parent: The layer whose config is taken.
        units: The number of outputs.
        needs_bias: Whether the child has a bias in any case, and not only if the parent has one.
        **changes: Other entries of the config.
    """
    kind = _kind(parent)
    left_out = ("name", "trainable", "tether")  # what of the parent is frozen, its expressions say
    config = {key: value for key, value in parent.get_config().items() if key not in left_out}
    size: Any = units
    if kind is keras.layers.EinsumDense:
        shape = config["output_shape"]
        size = [*shape[:-1], units] if isinstance(shape, (list, tuple)) else units
        if needs_bias and config["bias_axes"] is None:
            config["bias_axes"] = config["equation"].replace(" ", "")[-1]
    elif needs_bias:
        config["use_bias"] = True
    config.update({"kernel_constraint": None, "bias_constraint": None, KINDS[kind]: size})
    config.update({"activation": parent.activation, **changes})  # itself: a config names only registered functions
    return kind.from_config(config)


def kernel_of(form: Any, parent: Mapping[str, Expression]) -> Expression:
    """The parent's kernel.

    Raises:
        TetherError: There is none.
    """
    if "kernel" not in parent:
        raise TetherError(f"{type(form).__name__} is made of a parent's kernel. {received(weights=sorted(parent))}")
    return parent["kernel"]


def bias_of(parent: Mapping[str, Expression]) -> Expression | None:
    """The parent's bias, if it has one."""
    return parent.get("bias")
