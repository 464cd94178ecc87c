"""How weights train: those that get no gradient, and shared ones that get much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding
from tether.inspection.checking.mending import code_of
from tether.inspection.checking.rules.registry import rule
from tether.inspection.checking.values import deviation
from tether.inspection.facts import StoredWeight
from tether.layers.tying.state import stored_variables
from tether.weights.operators.arithmetic import ScaleGradient
from tether.weights.operators.structure import Transpose
from tether.weights.weight import Weight

WIDE = 5.0
"""A standard deviation of logits from which on a softmax over a vocabulary has one winner, most likely a wrong one."""
PLAIN_OPTIMIZERS = ("SGD",)
"""Those whose step is as long as the gradient."""


@rule("no-gradient", "a weight that trains and gets no gradient from a batch", needs_data=True)
def no_gradient(context: Context) -> Iterator[Finding]:
    """It is not on the way from the inputs to the loss, or everything behind it is dead."""
    found = context.gradients
    resting = [path for path, weight in found.weights.items() if weight.norm == 0] if found is not None else []
    if not resting:
        return
    shaken = context.shaken_gradients.weights
    for path in resting:
        if shaken[path].norm == 0:
            uses = [use.where for use in found.weights[path].uses]
            yield Finding(
                "no-gradient",
                "warning",
                uses[0] if uses else path,
                f"The weight {path!r} trains, and the gradient of {found.of} is zero for all of it. It is not on the "
                "way from the inputs to the loss: what reads it is not called, is cut off by a `stop_gradient` or an "
                "operation without a gradient, or computes with a copy; or all units behind it are dead. On JAX, "
                "weight decay still moves it.",
                f"{_freeze(context, path)}  # or lead its output to the loss",
            )


def _freeze(context: Context, path: str) -> str:
    variable = next((v for v in context.model.trainable_variables if context.unique_path(v) == path), None)
    if variable is None:
        return "layer.trainable = False"
    return f"{context.variable_code(variable)}.trainable = False"


@rule("idle-use", "a tied use through which a batch brings no gradient, though others do", needs_data=True)
def idle_use(context: Context) -> Iterator[Finding]:
    """The layer is not called, or what it computes does not reach the loss."""
    found = context.gradients
    for weight in context.facts.shared() if found is not None else ():
        path = context.unique_path(context.variables[weight.place])
        measured = found.weights.get(path)
        if measured is None or measured.norm == 0:
            continue
        live = {use.where for use in context.facts.uses_of(weight) if use.tied and use.reaches(weight)}
        for place, use in enumerate(measured.uses):
            if use.where not in live or use.norm != 0:
                continue
            if context.shaken_gradients.weights[path].uses[place].norm == 0:
                why = (
                    f"{use.where} = {use.expression} passes no gradient to {weight.path!r} on this batch, and other "
                    "uses do. The layer is not called, or what it computes does not reach the loss."
                )
                mend = f"tether.untie(model, {context.known_path(use.where)!r})  # or call the layer"
                yield Finding("idle-use", "hint", use.where, why, mend)


@rule("many-uses", "a weight with several uses under an optimizer whose step is as long as the gradient")
def many_uses(context: Context) -> Iterator[Finding]:
    """The gradient is the sum over the uses, so the step grows with them."""
    optimizer = getattr(context.model, "optimizer", None)
    optimizer = keras_seam.inner_optimizer(optimizer)
    if optimizer is None:
        return
    clipped = optimizer.global_clipnorm is not None or optimizer.clipnorm is not None
    if not clipped and type(optimizer).__name__ not in PLAIN_OPTIMIZERS:
        return
    for weight in context.facts.shared():
        uses = [use for use in context.facts.uses_of(weight) if use.reaches(weight)]
        tied = [view for view in context.views_of(context.variables[weight.place]) if view.use.live]
        if len(uses) < 2 or sum(map(_gradient_scale, tied)) + len(uses) - len(tied) <= 1:
            continue
        if clipped:
            effect = "The more uses, the larger its share of the norm that is clipped, and the less the others learn."
        else:
            effect = f"Under {type(optimizer).__name__} it makes steps as long as those of its uses together."
        yield Finding(
            "many-uses",
            "hint",
            context.name_of(weight),
            f"Its gradient is the sum over its {len(uses)} uses{_measured(context, weight)}. {effect}",
            _scaled(context, tied, 1 / len(uses)) if tied else "# train it at a smaller rate",
        )


def _gradient_scale(view: Any) -> float:
    """By what a use multiplies the gradient that it passes on."""
    expression = view.expression
    return abs(float(expression.parameters["scale"])) if isinstance(expression, ScaleGradient) else 1.0


def _scaled(context: Context, views: list[Any], scale: float) -> str:
    """Code that ties each use to its expression with a smaller gradient."""
    weights = dict.fromkeys(w for view in views for w in view.expression.weights_used() if w.is_built)
    names = {weight: f"w{number}" if number else "w" for number, weight in enumerate(weights)}
    lines = [f"{name} = {context.weight_code(weight.variable)}" for weight, name in names.items()]
    for view in views:
        layer, code = view.use.layer(), code_of(view.expression, names)
        path = view.path if layer is None else context.use_path(layer, view)
        code = f"({code})" if " " in code else code
        lines.append(f"tether.tie(model, {{{path!r}: {code}.scale_gradient({scale:.3g})}})")
    return "\n".join(lines)


def _measured(context: Context, weight: StoredWeight) -> str:
    """The measured norms, if there is data."""
    if context.data is None or context.gradients is None:
        return ""
    found = context.gradients.weights.get(context.unique_path(context.variables[weight.place]))
    if found is None or not found.uses:
        return ""
    norms = ", ".join(f"{use.where} {use.norm:.3g}" for use in found.uses)
    return f" (on this batch {found.norm:.3g}; by use: {norms})"


# --------------------------------------------------------------------------- tables


@rule("wide-table", "an embedding table that is also the output head, and starts too wide for that")
def wide_table(context: Context) -> Iterator[Finding]:
    """Logits are sums over the width: entries of size one, right for a lookup, make them explode."""
    optimizer = getattr(context.model, "optimizer", None)
    if optimizer is not None and int(keras.ops.convert_to_numpy(optimizer.iterations)) > 0:
        return  # it has trained: how wide it is now, it has learnt
    for variable, embedding, head in _tables(context):
        value = context.values_of(variable)
        if value is None or len(value.shape) != 2:
            continue
        spread, width = deviation(value), embedding.output_dim
        expected = spread * math.sqrt(width)
        measured = _measured_logits(context, head)
        if expected <= WIDE or (measured is not None and measured <= WIDE):
            continue
        yield Finding(
            "wide-table",
            "warning",
            f"{context.path_of(embedding)}/embeddings",
            f"The table starts with a standard deviation of {spread:.3g}, and {context.path_of(head)!r} makes logits "
            f"of it. With {width} features of unit variance, that of the first logits is about {expected:.3g}"
            + (f" (measured: {measured:.3g})" if measured is not None else "")
            + ": the softmax is certain of one wrong answer, and the loss starts far above that of guessing.",
            f"table = {context.variable_code(variable)}\n"
            f"table.assign(table * {1 / expected:.3g})  # or embeddings_initializer="
            f"keras.initializers.RandomNormal(stddev={1 / math.sqrt(width):.3g})",
        )


def _tables(context: Context) -> Iterator[tuple[Any, Any, Any]]:
    """The tables that are a head too: the variable, the embedding, and the head."""
    heads, reversed_ = _heads(context), _called_in_reverse(context)
    for layer in context.layers:
        if not isinstance(layer, keras.layers.Embedding) or not layer.built or layer.quantization_mode is not None:
            continue
        for variable in stored_variables(layer.embeddings)[:1] if hasattr(layer.embeddings, "path") else ():
            for other in heads.get(id(variable), ()):
                if other is not layer:
                    yield variable, layer, other
            if getattr(layer, "tie_weights", False) and id(layer) in reversed_:
                yield variable, layer, layer


def _heads(context: Context) -> dict[int, list[Any]]:
    """The layers that project onto a table, transposed and not scaled, by the id of its variable."""
    found: dict[int, list[Any]] = {}
    for layer, _, slot in context.tied:
        expression = slot.view.expression
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)) and isinstance(expression, Transpose):
            (table,) = expression.operands
            if isinstance(table, Weight) and len(slot.view.shape) == 2 and table.is_built:
                found.setdefault(id(table.variable), []).append(layer)
    return found


def _called_in_reverse(context: Context) -> set[int]:
    """The ids of the embeddings that a graph calls in reverse."""
    return {
        id(called)
        for model in context.layers
        for called, args, kwargs in keras_seam.calls_in_graph(model)
        if isinstance(called, keras.layers.Embedding) and (kwargs.get("reverse") or True in args[1:])
    }


def _measured_logits(context: Context, head: Any) -> float | None:
    """The standard deviation of the head's outputs, where they are outputs of the model and nothing bends them."""
    activation = getattr(head, "activation", None)
    if context.data is None or activation not in (None, keras.activations.linear):
        return None
    ends = keras_seam.graph_outputs(context.model)
    places = [place for place, layer in enumerate(ends) if layer is head]
    if not places:
        return None
    return float(np.std(keras.ops.convert_to_numpy(keras.tree.flatten(context.outputs)[places[0]]).astype("float64")))
