"""The start values of weights that a tie brings to life.

Tying a variable that exists must change no output: weights without a variable start at its value.
Tying a layer that is being built gives them what the layer's own initializer would have given.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras

from tether import keras_seam
from tether.errors import NotInvertible, ShapeMismatch, TetherError
from tether.layers.view import View, shape_of
from tether.weights.expression import Expression, known_shape
from tether.weights.structure import invert, is_invertible, solve_shape
from tether.weights.weight import Copy, Weight


def misfit(layer: Any, name: str, shape: tuple[int, ...], expression: Expression) -> TetherError:
    """The error of an expression whose shape is not that of the weight."""
    given = expression.shape
    hint = ""
    if given is not None and tuple(reversed(given)) == shape:
        hint = f" Did you mean `{name}={expression.T.notation()}`?"
    return ShapeMismatch(
        f"The weight {name!r} of layer {layer.name!r} ({type(layer).__name__}) has shape {shape}, but "
        f"{expression.notation()} has shape {given}.{hint}"
    )


def start_from_values(layer: Any, name: str, expression: Expression, variable: Any) -> None:
    """Gives weights without a variable the present values, so that the tie changes no output."""
    shape = shape_of(variable)
    dtype = keras_seam.stored_dtype(variable)
    if not isinstance(variable, View) and isinstance(expression, Weight) and expression.can_adopt(dtype):
        expression.adopt(variable)
        return
    missing = [weight for weight in expression.weights_used() if not weight.is_built]
    if not missing:
        return
    for weight in missing:
        weight.autocasts = weight.autocasts and keras_seam.autocasts(variable)
    solved = solve_shape(expression, shape)
    try:
        parts = invert(expression, variable.value) if len(expression.weights_used()) == 1 else {}
    except (TetherError, TypeError):
        parts = {}
    for weight in missing:
        start = parts.get(weight)
        if start is not None:
            array = keras.ops.convert_to_numpy(start)
            weight.give_start(array.shape, dtype, Copy(array))
            weight.assign(array)
        elif solved is not None and solved[0] is weight:
            weight.give_start(solved[1], dtype, None)
        else:
            weight.give_start(known_shape(weight), dtype, None)
    if known_shape(expression) != shape:
        raise misfit(layer, name, shape, expression)


class _Through(keras.initializers.Initializer):
    """Starts a weight so that the expression starts as the layer's own initializer would start its variable."""

    def __init__(self, expression: Expression, weight: Weight, shape: tuple[int, ...], initializer: Any) -> None:
        self.expression, self.weight, self.shape, self.initializer = expression, weight, shape, initializer

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        value = self.initializer(self.shape, dtype=dtype)
        try:
            return keras.ops.cast(invert(self.expression, value)[self.weight], dtype)
        except NotInvertible:
            return self.initializer(shape, dtype=dtype)


def start_from_layer(expression: Expression, path: str, shape: tuple[int, ...], dtype: str, initializer: Any) -> None:
    """Gives weights without a variable what the layer's own initializer would have given its variable.

    What stores integers or truth values starts at zero where the layer's variable is one of floats, which its
    initializer draws.
    """
    missing = [weight for weight in expression.weights_used() if not weight.is_built]
    solved = solve_shape(expression, shape)
    for weight in missing:
        start: Any = initializer
        own_shape = shape
        if weight is not expression:
            start = _Through(expression, weight, shape, initializer)
            if solved is not None and solved[0] is weight:
                own_shape = solved[1]
            else:
                own_shape = known_shape(weight)
                start = None if len(expression.weights_used()) > 1 else _invertible_or_none(start)
        floats = keras_seam.is_float(weight.dtype or dtype) or not keras_seam.is_float(dtype)
        weight.give_start(own_shape, dtype, start if floats else "zeros", path=path if weight is expression else None)
        weight.first_initializer = initializer if floats else None


def _invertible_or_none(through: _Through) -> _Through | None:
    return through if is_invertible(through.expression) else None


def warn_of_initializer(layer: Any, name: str, expression: Expression, initializer: Any) -> None:
    """A later tie whose layer was explicitly given another initializer than the one that was used."""
    if not isinstance(expression, Weight) or not expression.is_built or expression.first_initializer is None:
        return
    used = expression.first_initializer
    mine, theirs = _described_initializer(initializer), _described_initializer(used)
    if mine is None or theirs is None or mine == theirs or _is_the_class_default(layer, mine):
        return
    warnings.warn(
        f"The weight {expression.name!r} was started with {theirs[0]} by its first tie; the {mine[0]} of "
        f"{layer.name}/{name} is not used. Set one: `tether.Weight(..., initializer=...)`.",
        stacklevel=2,
    )


def _described_initializer(initializer: Any) -> tuple[str, str] | None:
    """Class and arguments of a Keras initializer, without its seed; a function or any other object tells nothing."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return None
    config = {key: value for key, value in initializer.get_config().items() if key != "seed"}
    return type(initializer).__name__, repr(sorted(config.items()))


def _is_the_class_default(layer: Any, described: tuple[str, str]) -> bool:
    """Whether the layer's class, not its user, chose the initializer."""
    for cls in type(layer).__mro__:
        init = cls.__dict__.get("__init__")
        for parameter in inspect.signature(init).parameters.values() if init is not None else ():
            if not parameter.name.endswith("initializer") or not isinstance(parameter.default, str):
                continue
            if _described_initializer(keras.initializers.get(parameter.default)) == described:
                return True
    return False
