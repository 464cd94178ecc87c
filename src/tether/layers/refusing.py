"""What a tie refuses, before anything is changed."""

from __future__ import annotations

from typing import Any

import keras

from tether import keras_seam
from tether.errors import TetherError, Unsupported, received
from tether.layers import paths
from tether.layers.starting import misfit
from tether.layers.view import View, shape_of
from tether.weights.expression import Expression, known_shape
from tether.weights.structure import solve_shape
from tether.weights.weight import Weight


def refuse_layer(function: str, layer: Any) -> None:
    """Refuses what is no layer or model."""
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, Weight):
        raise TetherError(f"`{function}` takes a Keras layer or model. {received(layer=layer)}")
    if keras_seam.is_nnx_enabled():
        raise Unsupported(
            "Keras's NNX mode fixes a layer's class and state when it is made, so its weights cannot be tied. "
            "Turn it off: KERAS_NNX_ENABLED=false."
        )


def refuse_unsupported(layer: Any) -> None:
    """Refuses a layer that does not compute with its variables as they are."""
    if layer.quantization_mode is not None:
        raise Unsupported(
            f"Layer {layer.name!r} is quantised ({layer.quantization_mode}); its weights are packed integers and "
            "cannot be tied. Tie first, or quantise a plain copy: `tether.materialize(model).quantize(...)`."
        )
    if hasattr(layer, "finalize_state"):
        raise Unsupported(
            f"Layer {layer.name!r} ({type(layer).__name__}) computes with constants that it derives from its weights "
            "when it is adapted, so a tie would have no effect. Use the layer itself in both places."
        )
    if getattr(layer, "lora_enabled", False):
        raise Unsupported(
            f"Layer {layer.name!r} has LoRA enabled by Keras, which adds to its kernel behind the tie. "
            "Write the low-rank part as an expression instead: `tether.tie(layer, kernel=w + a @ b)`."
        )


def refuse_twice(layer: Any, places: dict[str, paths.Place]) -> None:
    """Refuses two paths that lead to one weight."""
    seen: dict[Any, str] = {}
    for path, place in places.items():
        key = id(place.variable) if place.variable is not None else (id(place.layer), place.leaf)
        if key in seen:
            raise TetherError(f"{seen[key]!r} and {path!r} are the same weight of layer {layer.name!r}.")
        seen[key] = path


def refuse_tie(layer: Any, name: str, variable: Any, expression: Expression) -> None:
    """Refuses what can be known before a tie changes anything; without a variable, that is less.

    Raises:
        Unsupported: The layer cannot be tied, or constrains the variable.
        ShapeMismatch: The expression has another shape than the variable.
        UnknownShape: It has none, and the variable's does not tell it.
    """
    refuse_unsupported(layer)
    if variable is not None:
        constraint = None if isinstance(variable, View) else getattr(variable, "constraint", None)
        refuse_misfit(layer, name, shape_of(variable), constraint, expression)


def refuse_misfit(layer: Any, name: str, shape: tuple[int, ...], constraint: Any, expression: Expression) -> None:
    """Refuses an expression in the place of a variable of this shape and constraint."""
    if expression.shape is None and solve_shape(expression, shape) is None:
        known_shape(expression)
    if expression.shape is not None and expression.shape != shape:
        raise misfit(layer, name, shape, expression)
    if constraint is not None:
        _refuse_constraint(layer, name, constraint, expression)


def _refuse_constraint(layer: Any, name: str, constraint: Any, expression: Expression) -> None:
    if not isinstance(expression, Weight):
        raise Unsupported(
            f"Layer {layer.name!r} constrains its {name} by {type(constraint).__name__}, which is applied to what is "
            f"stored, but its {name} is {expression.notation()}. Constrain the weight, "
            f"`tether.Weight(constraint=...)`, or write the constraint into the expression."
        )
    present = expression.constraint
    if present is None and expression.is_built:
        present = expression.variable.constraint
    if present is not None and present is not constraint and _described(present) != _described(constraint):
        raise Unsupported(
            f"The weight {expression.name!r} is constrained by {type(present).__name__} already; layer {layer.name!r} "
            f"asks for {type(constraint).__name__}. One stored value can have one constraint."
        )


def _described(constraint: Any) -> Any:
    try:
        return keras.constraints.serialize(constraint)
    except Exception:
        return constraint
