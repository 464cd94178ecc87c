"""What is captured where Keras does not look: variables that nobody tracks, and weights that turned into constants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.inspection.checking.context import Captured, Context
from tether.inspection.checking.finding import Finding, Severity, arranged, in_words, rule
from tether.inspection.checking.samples import FEWEST, Likeness, Readable, alike, is_equal, sample_tolerance
from tether.inspection.facts import StoredWeight

STALE = 0.9
"""The least correlation of a constant with a weight that it was once equal to."""
MANY = 64
"""So many elements tell a correlation from chance."""


def _in_function(context: Context, captured: Captured) -> bool:
    """Whether it is captured by what Keras writes into a file as a function or an argument: not as a variable."""
    return captured.in_graph or isinstance(captured.layer, keras.layers.Lambda)


@rule("captured-variable", "a variable that a function, an operation or an object captures and Keras does not track")
def captured_variable(context: Context) -> Iterator[Finding]:
    """Untracked, it is never trained nor saved; tracked elsewhere, a function loses it when it is saved."""
    seen: set[tuple[str, int]] = set()
    for captured in context.captured:
        value, where = captured.found.value, captured.where
        if isinstance(value, keras.layers.Layer):
            variables = value.weights
        else:
            variables = [value] if isinstance(value, keras.Variable) else []
        if not variables or (where, id(value)) in seen:
            continue
        seen.add((where, id(value)))
        lost = [variable for variable in variables if id(variable) not in context.known_variables]
        if lost:
            severity: Severity = "error" if any(variable.trainable for variable in lost) else "warning"
            effect = "Keras does not track it there: it is not in `model.weights`, is never trained and never saved."
        elif _in_function(context, captured):
            severity = "warning"
            effect = "It trains, since a layer has it too, but a file of the model does not hold this use of it."
        else:
            continue
        mend = _mend_captured(context, captured, variables[0], bool(lost))
        yield Finding(
            "captured-variable", severity, where, f"{_described(value)}, is {_held(captured)}. {effect}", mend
        )


def _described(value: Any) -> str:
    if isinstance(value, keras.layers.Layer):
        return f"{value.name!r}, a layer with {len(value.weights)} weights"
    return f"{value.path!r}, a variable of shape {tuple(value.shape)}"


def _mend_captured(context: Context, captured: Captured, variable: keras.Variable, lost: bool) -> str:
    layer = captured.found.value
    if isinstance(layer, keras.layers.Layer) and not _in_function(context, captured):
        return f"self.layer = layer  # layer {layer.name!r}, as an attribute of layer {captured.layer.name!r} itself"
    if isinstance(layer, keras.layers.Layer) and lost:
        return f"outputs = layer(inputs)  # call the layer {layer.name!r} in the graph itself, not in a function"
    name = variable.name if variable.name.isidentifier() and not variable.name.startswith("variable") else "weight"
    source = f"tether.Weight({tuple(variable.shape)}, name={name!r})" if lost else context.weight_code(variable)
    if _in_function(context, captured):
        return (
            f"{name} = {source}\n"
            f"outputs = tether.Lambda(function, {name}={name})(inputs)  # with `def function(inputs, {name}): ...`"
        )
    if captured.found.attribute == "call":
        return f"self.{name} = {source}  # in the layer's constructor; read `self.{name}.value` in its `call`"
    return (
        f"self.{name} = ...  # the variable or `tether.Weight` itself, as an attribute of layer "
        f"{captured.layer.name!r}, set in its constructor or `build`"
    )


@rule("frozen-constant", "an array that was computed from a weight when the layer or the graph was made")
def frozen_constant(context: Context) -> Iterator[Finding]:
    """It keeps the value of then, on JAX and TensorFlow at once, on PyTorch when the model comes from a file."""
    candidates = list(_candidates(context))
    if not candidates:
        return
    weights = [weight for weight in context.weights if weight.place in context.values and _is_float(weight.dtype)]
    known: list[Readable] = [context.values[weight.place] for weight in weights]
    arrays = [values for _, values in candidates]
    count = len(known)
    best: dict[int, Likeness] = {}
    for found in alike([*known, *arrays], STALE, lambda first, second: first < count <= second):
        present = best.get(found.second)
        if present is None or abs(found.correlation) > abs(present.correlation):
            best[found.second] = found
    for place, found in sorted(best.items()):
        captured, values = candidates[place - count]
        weight = weights[found.first]
        tolerance = sample_tolerance(weight.dtype, _dtype(captured.found.value))
        equal = is_equal(known[found.first], values, found, tolerance)
        if equal or math.prod(values.shape) >= MANY:
            yield _frozen(context, captured, weight, found, equal)


def _candidates(context: Context) -> Iterator[tuple[Captured, Readable]]:
    """The arrays of numbers that could be those of a weight."""
    for captured in context.captured:
        value = captured.found.value
        if isinstance(value, (keras.Variable, keras.layers.Layer)) or hasattr(captured.layer, "finalize_state"):
            continue  # preprocessing keeps constants that it makes anew whenever it is adapted
        values = context.values_of(value) if _is_float(_dtype(value)) else None
        if values is not None and math.prod(values.shape) >= FEWEST:
            yield captured, values


def _frozen(context: Context, captured: Captured, weight: StoredWeight, found: Likeness, equal: bool) -> Finding:
    variable = context.variables[weight.place]
    name = context.name_of(weight)
    is_tensor = not isinstance(captured.found.value, np.ndarray)
    kept = "a tensor" if is_tensor else "an array"
    if equal:
        same = f"{kept} equal to {name!r}{in_words(found.axes, found.scale)}"
    else:
        same = f"{kept} that was once computed from {name!r} (it correlates with it by {found.correlation:.2f})"
    own = any(held is variable for layer, held in context.uses(variable) if layer is captured.layer)
    meant = not is_tensor or (own and found.in_order and found.scale == 1)
    severity: Severity = "error" if equal and not meant else "warning"
    scale = found.scale if equal else 1.0
    code = arranged(context.weight_code(variable), found.axes, scale)
    if captured.in_graph or isinstance(captured.layer, keras.layers.Lambda):
        mend = (
            f"weight = {code}\n"
            "outputs = tether.Lambda(function, weight=weight)(inputs)  # with `def function(inputs, weight): ...`"
        )
    else:
        mend = (
            f"weight = {code}  # hand it to the layer's constructor, keep it as an attribute of the layer,\n"
            "# and read `weight.value` in its `call`, where it follows the stored weight"
        )
    return Finding(
        "frozen-constant",
        severity,
        captured.where,
        f"It is {same}, {_held(captured)}. It was computed when the layer or the graph was made: it keeps the value of "
        f"then and passes no gradient.{_ON_PYTORCH if is_tensor else ''}",
        mend,
    )


_ON_PYTORCH = " (On PyTorch a mere transpose follows until the model comes from a file.)"


def _held(captured: Captured) -> str:
    how = captured.found.how
    return f"{how} of the call" if how.startswith("argument") else f"held by {how}"


def _dtype(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else str(keras.backend.standardize_dtype(value.dtype))


def _is_float(dtype: str) -> bool:
    return keras_seam.is_float(dtype)
