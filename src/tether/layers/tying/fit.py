"""Whether a tie fits a layer's weight, and the start values of the weights that it brings to life."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import keras

from tether import keras_seam
from tether.errors import NotInvertible, ShapeMismatch, TetherError, Unsupported, received
from tether.forms.dropout import refuse_dropout
from tether.layers.tying import paths
from tether.layers.tying.state import View, shape_of
from tether.types import Function, Tensor
from tether.weights.algebra import invert, is_invertible, solve_shape
from tether.weights.expression import Expression, Shape, Stored, known_shape
from tether.weights.storage import Copy
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- start values
# The start values of weights that a tie brings to life.
#
# Tying a variable that exists must change no output: weights without a variable start at its value. Tying a layer
# that is being built gives them what the layer's own initializer would have given.


def misfit(layer: keras.Layer, name: str, shape: tuple[int, ...], expression: Expression) -> TetherError:
    """The error of an expression whose shape is not that of the weight."""
    given = expression.shape
    mended = None if given is None else _mended(expression, given, shape)
    key = name if name.isidentifier() else "kernel"
    hint = "" if mended is None else f" Did you mean `{key}={mended.notation()}`?"
    return ShapeMismatch(
        f"The weight {name!r} of layer {layer.name!r} ({type(layer).__name__}) has shape {shape}, but "
        f"{expression.notation()} has shape {given}.{hint}"
    )


def _mended(expression: Expression, given: Shape, wanted: Shape) -> Expression | None:
    """An expression of the wanted shape: another order of the axes, the first numbers of each, or another shape."""
    if tuple(reversed(given)) == wanted:
        return expression.T
    if sorted(given) == sorted(wanted) and len(given) <= 5:
        orders = itertools.permutations(range(len(given)))
        return expression.transpose(*next(o for o in orders if tuple(given[axis] for axis in o) == wanted))
    if len(given) == len(wanted) and all(a >= b for a, b in zip(given, wanted, strict=True)):
        return expression[tuple(slice(None) if a == b else slice(b) for a, b in zip(given, wanted, strict=True))]
    return expression.reshape(wanted) if math.prod(given) == math.prod(wanted) else None


def start_from_values(layer: keras.Layer, name: str, expression: Expression, variable: keras.Variable) -> None:
    """Gives weights without a variable the present values, so that the tie changes no output.

    Raises:
        ShapeMismatch: The expression has another shape than the variable. Where one call makes several ties, this may
            be known only now: the weight has got its shape from a tie before.
        Unsupported: The weight has got another constraint from a tie before.
    """
    shape = shape_of(variable)
    dtype = keras_seam.stored_dtype(variable)
    if not isinstance(variable, View) and isinstance(expression, Weight) and expression.can_adopt(dtype):
        expression.adopt(variable)
        return
    missing = [weight for weight in expression.weights_used() if not weight.is_built]
    if not missing:
        constraint = None if isinstance(variable, View) else getattr(variable, "constraint", None)
        refuse_misfit(layer, name, shape, constraint, expression)
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
            array = keras_seam.to_numpy(start, weight.name, in_step=True)
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

    def __init__(self, expression: Expression, weight: Stored, shape: tuple[int, ...], initializer: Function) -> None:
        self.expression, self.weight, self.shape, self.initializer = expression, weight, shape, initializer

    def __call__(self, shape: tuple[int, ...], dtype: str | None = None) -> Tensor:
        value = self.initializer(self.shape, dtype=dtype)
        try:
            return keras.ops.cast(invert(self.expression, value)[self.weight], dtype)
        except NotInvertible:
            return self.initializer(shape, dtype=dtype)


def start_from_layer(
    expression: Expression, path: str, shape: tuple[int, ...], dtype: str, initializer: object
) -> None:
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
            start = _Through(expression, weight, shape, start)
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


def warn_of_initializer(layer: keras.Layer, name: str, expression: Expression, initializer: object) -> None:
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


def _described_initializer(initializer: object) -> tuple[str, str] | None:
    """Class and arguments of a Keras initializer, without its seed; a function or any other object tells nothing."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return None
    config = {key: value for key, value in initializer.get_config().items() if key != "seed"}
    return type(initializer).__name__, repr(sorted(config.items()))


def _is_the_class_default(layer: keras.Layer, described: tuple[str, str]) -> bool:
    """Whether the layer's class, not its user, chose the initializer."""
    for cls in type(layer).__mro__:
        init = cls.__dict__.get("__init__")
        for parameter in inspect.signature(init).parameters.values() if init is not None else ():
            if not parameter.name.endswith("initializer") or not isinstance(parameter.default, str):
                continue
            if _described_initializer(keras.initializers.get(parameter.default)) == described:
                return True
    return False


# --------------------------------------------------------------------------- what cannot be tied
# What a tie refuses, before anything is changed.


def refuse_layer(function: str, layer: keras.Layer) -> None:
    """Refuses what is no layer or model."""
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, Weight):
        given: object = layer
        hint = ""
        if isinstance(given, type):
            hint = f" Make one of the class first: `{given.__name__}(...)`."
        elif isinstance(given, (list, tuple)):
            hint = " For several layers, call it for each."
        elif isinstance(given, str):
            hint = f" Look it up: `model.get_layer({given!r})`."
        elif isinstance(given, Weight):
            hint = f" The weight {given.name!r} is what a layer is tied to: `tether.tie(layer, kernel=w)`."
        raise TetherError(f"`{function}` takes a Keras layer or model.{hint} {received(layer=layer)}")
    if keras_seam.is_nnx_enabled():
        raise Unsupported(
            "Keras's NNX mode fixes a layer's class and state when it is made, so its weights cannot be tied. "
            "Turn it off: KERAS_NNX_ENABLED=false."
        )


def refuse_unsupported(layer: keras.Layer) -> None:
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


def refuse_twice(layer: keras.Layer, places: dict[str, paths.Place]) -> None:
    """Refuses two paths that lead to one weight."""
    seen: dict[object, str] = {}
    for path, place in places.items():
        key = id(place.variable) if place.variable is not None else (id(place.layer), place.leaf)
        if key in seen:
            raise TetherError(
                f"{seen[key]!r} and {path!r} are the same weight of layer {layer.name!r}, which reads one expression. "
                f"Give one of them, or both in one expression, as in `tie(layer, kernel=a + b)`."
            )
        seen[key] = path


def given_twice(names: Iterable[str]) -> str:
    """What to say of weights that are given in a dict and by keyword too."""
    first = sorted(names)[0]
    return f"The weight {first!r} is given twice, in the dict and by keyword. Give it once: `{{{first!r}: w}}`."


def refuse_tie(layer: keras.Layer, name: str, variable: keras.Variable, expression: Expression) -> None:
    """Refuses what can be known before a tie changes anything; without a variable, that is less.

    Raises:
        Unsupported: The layer cannot be tied, cannot apply a dropout in the expression, or constrains the variable.
        ShapeMismatch: The expression has another shape than the variable.
        UnknownShape: It has none, and the variable's does not tell it.
    """
    refuse_unsupported(layer)
    refuse_dropout(layer, name, expression)
    if variable is not None:
        constraint = None if isinstance(variable, View) else getattr(variable, "constraint", None)
        refuse_misfit(layer, name, shape_of(variable), constraint, expression)


def refuse_misfit(
    layer: keras.Layer,
    name: str,
    shape: tuple[int, ...],
    constraint: keras.constraints.Constraint | None,
    expression: Expression,
) -> None:
    """Refuses an expression in the place of a variable of this shape and constraint."""
    if expression.shape is None and solve_shape(expression, shape) is None:
        known_shape(expression)
    if expression.shape is not None and expression.shape != shape:
        raise misfit(layer, name, shape, expression)
    if constraint is not None:
        _refuse_constraint(layer, name, constraint, expression)


def _refuse_constraint(
    layer: keras.Layer, name: str, constraint: keras.constraints.Constraint | None, expression: Expression
) -> None:
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


def _described(constraint: keras.constraints.Constraint | None) -> object:
    try:
        return keras.constraints.serialize(constraint)
    except Exception:
        return constraint
