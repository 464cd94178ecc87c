"""Rules about what trains: gradients, optimizers, freezing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import keras
import numpy as np

from tether import keras_seam
from tether.errors import listed
from tether.inspection.checking.context import Context
from tether.inspection.checking.finding import Finding, as_code, rule
from tether.inspection.checking.samples import deviation
from tether.inspection.facts import Shape, Slot, StoredWeight
from tether.inspection.live import aliases
from tether.layers.liveness import still
from tether.layers.tying import paths
from tether.layers.tying.state import View, stored_variables
from tether.weights.operators.arithmetic import ScaleGradient
from tether.weights.operators.structure import Transpose
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- training
# How weights train: those that get no gradient, and shared ones that get much.


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


def _gradient_scale(view: keras.Variable) -> float:
    """By what a use multiplies the gradient that it passes on."""
    expression = view.expression
    return abs(float(expression.parameters["scale"])) if isinstance(expression, ScaleGradient) else 1.0


def _scaled(context: Context, views: list[View], scale: float) -> str:
    """Code that ties each use to its expression with a smaller gradient."""
    weights = dict.fromkeys(w for view in views for w in view.expression.weights_used() if w.is_built)
    names = {weight: f"w{number}" if number else "w" for number, weight in enumerate(weights)}
    lines = [f"{name} = {context.weight_code(weight.variable)}" for weight, name in names.items()]
    for view in views:
        layer, code = view.use.layer(), as_code(view.expression, names)
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


def _tables(context: Context) -> Iterator[tuple[keras.Variable, keras.Layer, keras.Layer]]:
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


def _heads(context: Context) -> dict[int, list[keras.Layer]]:
    """The layers that project onto a table, transposed and not scaled, by the id of its variable."""
    found: dict[int, list[keras.Layer]] = {}
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


def _measured_logits(context: Context, head: object) -> float | None:
    """The standard deviation of the head's outputs, where they are outputs of the model and nothing bends them."""
    activation = getattr(head, "activation", None)
    if context.data is None or activation not in (None, keras.activations.linear):
        return None
    ends = keras_seam.graph_outputs(context.model)
    places = [place for place, layer in enumerate(ends) if layer is head]
    if not places:
        return None
    return float(np.std(keras.ops.convert_to_numpy(keras.tree.flatten(context.outputs)[places[0]]).astype("float64")))


# --------------------------------------------------------------------------- optimizers
# Optimizers that do not fit the weights.


MOST_MISSED = 20
"""Findings of one rule name at most so many names."""


@rule("compiled-before-tied", "an optimizer that was built with other weights than the model has now")
def compiled_before_tied(context: Context) -> Iterator[Finding]:
    """A weight that it does not know cannot be trained on; one that is gone keeps its slots."""
    if not getattr(context.model, "compiled", False):
        return
    known = {id(variable): variable for variable in keras_seam.optimized_variables(context.model.optimizer)}
    missing = [variable for variable in context.model.trainable_variables if id(variable) not in known]
    present = {id(variable) for variable in context.model.variables}
    gone = [variable for key, variable in known.items() if key not in present]
    if known and missing:
        why = (
            f"The optimizer was built without {_listed(missing)}: what trains was tied, untied or unfrozen after the "
            "model had trained. `fit` asks for `compile`; a step by hand fails, or leaves it as it is."
        )
    elif gone:
        why = (
            f"The optimizer was built with {_listed(gone)}, which the model no longer has: it was tied after it had "
            "trained. The optimizer keeps slots for nothing. `fit` asks for `compile`; on JAX a step by hand fails."
        )
    else:
        return
    yield Finding("compiled-before-tied", "error", "optimizer", why, _compile_again(context))


def _listed(variables: list[keras.Variable]) -> str:
    return listed((repr(variable.path) for variable in variables), MOST_MISSED)


def _compile_again(context: Context) -> str:
    loss = "" if getattr(context.model, "loss", None) is None else ", loss=model.loss"
    return f"model.compile(model.optimizer.from_config(model.optimizer.get_config()){loss})"


@rule("stepped-twice", "an optimizer that was given one variable several times")
def stepped_twice(context: Context) -> Iterator[Finding]:
    """A list such as `a.trainable_weights + b.trainable_weights` has a shared weight twice: it makes two steps."""
    for where, optimizer in context.optimizers:
        variables = keras_seam.optimized_variables(optimizer)
        counted = Counter(map(id, variables))
        for variable in {id(v): v for v in variables}.values():
            if counted[id(variable)] > 1:
                code = _optimizer_code(where)
                yield Finding(
                    "stepped-twice",
                    "error",
                    variable.path,
                    f"The optimizer in `{where}` was built with this variable {counted[id(variable)]} times, so each "
                    "step of a loop that hands over the same list moves it as often, by the whole gradient each "
                    "time. A list of the weights of two layers names what they share twice.",
                    "variables = tether.inspection.unique(model.trainable_weights)  # of all layers that train\n"
                    f"{code} = type({code}).from_config({code}.get_config())\n"
                    f"{code}.build(variables)  # and in the loop: {code}.apply(gradients, variables)",
                )


@rule("misfit-slot", "what an optimizer keeps for no weight, or for one of another shape", file=True)
def misfit_slot(context: Context) -> Iterator[Finding]:
    """It was kept for something that is gone or was resized: training goes on from a wrong state, or fails."""
    shapes = {kept for weight in context.facts.weights for kept in _shapes_kept_for(weight.shape)}
    for slot in context.facts.optimizer:
        if not slot.shape or slot.shape == (1,) or slot.shape == (0,):
            continue
        if context.file is not None or slot.weight is None:
            if context.file is not None and slot.shape in shapes:
                continue
            why = f"The optimizer keeps a state of shape {slot.shape} for no weight of the model."
        else:
            weight = context.facts.weight(slot.weight)
            if slot.shape in _shapes_kept_for(weight.shape):
                continue
            why = (
                f"The optimizer keeps a state of shape {slot.shape} for {context.name_of(weight)!r}, which has shape "
                f"{weight.shape}."
            )
        yield Finding("misfit-slot", "warning", _slot_name(slot), f"{why} {_EFFECT}", _mend_slots(context))


_EFFECT = "The weight was replaced or resized after the optimizer was built."


def _shapes_kept_for(shape: Shape) -> set[Shape]:
    """The shapes of what optimizers keep for a weight: as it is, or its rows and columns (Adafactor)."""
    return {shape, shape[:-1], (*shape[:-2], *shape[-1:]), shape[::-1]}


def _slot_name(slot: Slot) -> str:
    return f"{slot.place} ({slot.name})" if slot.name else slot.place


def _mend_slots(context: Context) -> str:
    return _compile_again(context) if context.model is not None else "model = keras.saving.load_model(path)"


@rule("decays-frozen-use", "an optimizer that decays a weight that trains elsewhere, and is only read here")
def decays_frozen_use(context: Context) -> Iterator[Finding]:
    """A model that is compiled hands it only what it trains. An optimizer that is called by hand gets everything."""
    only_read = still(context.model)
    for where, optimizer in context.optimizers if only_read else ():
        inner, pattern = keras_seam.inner_optimizer(optimizer), keras_seam.decay_pattern(optimizer)
        known = {id(variable) for variable in keras_seam.optimized_variables(optimizer)}
        if not getattr(inner, "weight_decay", None) or keras_seam.is_given_what_trains(optimizer, context.model):
            continue
        for variable in only_read:
            if keras_seam.is_excluded_from_decay(optimizer, variable) or (known and id(variable) not in known):
                continue
            if pattern is not None and pattern.search(variable.name):
                continue
            code = _optimizer_code(where)
            yield Finding(
                "decays-frozen-use",
                "warning",
                variable.path,
                f"It trains elsewhere, and every use of it in this model is frozen or under `stop_gradient`. Keras has "
                f"one flag for a variable, so it is among `trainable_variables`, and `{where}` decays it: on JAX its "
                "gradient is zero and not missing.",
                f"{code} = type({code}).from_config({code}.get_config())\n"
                f"{code}.exclude_from_weight_decay(var_list=[{context.variable_code(variable)}])\n"
                f"# or let the model train: `model.compile({code}, ...)` hands its optimizer what the model trains",
            )


# --------------------------------------------------------------------------- names


@rule("name-misses-alias", "a rule that goes by names and names a user of a shared weight, not what is stored")
def name_misses_alias(context: Context) -> Iterator[Finding]:
    """A stored weight has one path; the name of a user matches nothing, and nothing says so."""
    names = aliases(context.model)
    shared = {path: others for path, others in names.items() if len(others) > 1}
    variables = {context.unique_path(variable): variable for variable in context.model.weights}
    for where, optimizer in context.optimizers:
        pattern = keras_seam.decay_pattern(optimizer)
        for path, others in shared.items():
            variable = variables[path]
            if pattern is None or not optimizer.weight_decay or pattern.search(variable.name):
                continue
            if keras_seam.is_excluded_from_decay(optimizer, variable):
                continue
            missed = [name for name in others[1:] if pattern.search(name)]
            if missed:
                yield Finding(
                    "name-misses-alias",
                    "warning",
                    missed[0],
                    f"`exclude_from_weight_decay(var_names=...)` of `{where}` names {pattern.pattern!r}, which "
                    f"matches {missed[0]!r}; that reads the stored weight {path!r}, whose name does not match. It is "
                    "decayed.",
                    f"optimizer.exclude_from_weight_decay(var_list=tether.inspection.aliases(model).find("
                    f"{pattern.pattern!r}))  # before the optimizer is built",
                )


# --------------------------------------------------------------------------- freezing
# What is frozen without anybody having said so.


@rule("frozen-through-another", "a layer or weight that is frozen because something else that holds it is")
def frozen_through_another(context: Context) -> Iterator[Finding]:
    """Keras freezes whatever a frozen layer holds, also what belongs to others."""
    yield from _layers(context)
    yield from _variables(context)


def _layers(context: Context) -> Iterator[Finding]:
    for layer in context.layers:
        parents = context.parents.get(id(layer), [])
        frozen = [parent for parent in parents if not keras_seam.own_trainable_flag(parent)]
        free = [parent for parent in parents if keras_seam.own_trainable_flag(parent)]
        if keras_seam.own_trainable_flag(layer) or not frozen or not free or not layer.weights:
            continue
        by, other = context.path_of(frozen[0]), context.path_of(free[0])
        yield Finding(
            "frozen-through-another",
            "warning",
            context.path_of(layer),
            f"The layer is frozen together with {by!r}, which holds it as an attribute; {other!r}, which holds it "
            "too, is not frozen. Freezing a layer freezes every layer in its attributes. To share a weight, tie it: "
            "neither layer owns the other then, and each use is frozen by itself.",
            f"{context.layer_code(layer)}.trainable = True",
        )


def _variables(context: Context) -> Iterator[Finding]:
    holders: dict[int, list[tuple[keras.Layer, keras.Variable]]] = {}
    for layer in context.layers:
        for variables in keras_seam.variable_lists(layer).values():
            for variable in variables:
                holders.setdefault(id(variable), []).append((layer, variable))
    for held in holders.values():
        variable = held[0][1]
        frozen = [layer for layer, _ in held if not keras_seam.own_trainable_flag(layer)]
        free = [layer for layer, _ in held if keras_seam.own_trainable_flag(layer)]
        if variable.trainable or not frozen or not free:
            continue
        one, other = frozen[0], free[0]
        path = "/".join((context.use_path(one, variable),))
        yield Finding(
            "frozen-through-another",
            "warning",
            f"{context.path_of(other)}/{'/'.join(paths.canonical_name(other, variable))}",
            f"The layer trains, and its variable {variable.path!r} does not: layer {context.path_of(one)!r} holds the "
            "same variable and is frozen, which freezes it for both.",
            f"tether.tie(model, {{{path!r}: tether.weight_of(model, {context.use_path(other, variable)!r})}})",
        )


def _optimizer_code(where: str) -> str:
    """How code names an optimizer of the model, by its place."""
    return "model.optimizer" if where == "optimizer" else f"model.{where.replace('/', '.')}"
