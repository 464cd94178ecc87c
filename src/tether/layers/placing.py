"""Putting views where variables are, or would be.

A tie of a variable that exists puts a view in its place. A tie of a layer that is not built waits until the
layer asks for the variable of that name, and is then handed a view.
"""

from __future__ import annotations

from typing import Any

import keras

from tether import keras_seam
from tether.errors import UnknownName
from tether.layers import paths
from tether.layers.quantizing import quantize_layer
from tether.layers.refusing import refuse_misfit, refuse_tie, refuse_unsupported
from tether.layers.starting import start_from_layer, start_from_values, warn_of_initializer
from tether.layers.state import STATE, Slot, State, Tie, hang_weights, new_use, state_of
from tether.layers.swap import exchange, swapped
from tether.layers.tied import tied_class
from tether.layers.view import View, view_like
from tether.weights.expression import Expression, resolved
from tether.weights.weight import Weight


def become_tied(layer: Any) -> State:
    """Turns a layer into an instance of its tied class, without ties yet if it is not one; gives its state."""
    state = state_of(layer)
    if state is None:
        state = State()
        layer.__class__ = tied_class(type(layer))
        keras_seam.set_untracked(layer, STATE, state)
        keras_seam.shield_tracker(layer, View)
        if not isinstance(layer, keras.Model):
            keras_seam.take_over_quantize(layer, quantize_layer)
    return state


# --------------------------------------------------------------------------- a variable that exists


def replace(layer: Any, variable: Any, name: str, asked: Tie) -> None:
    """Puts a view in the place of a variable, or of another view."""
    state, expression = become_tied(layer), asked.expression
    start_from_values(layer, name, expression, variable)
    if isinstance(variable, View):
        use = new_use(layer, name, expression, variable.use.regularizer)
        drop_use(variable.use)
        next(slot.tie for slot in state.slots if slot.view is variable).forget()
        view = view_like(variable, use, trainable=variable.slot_trainable)
        view.frozen = variable.frozen
    else:
        own = keras_seam.variable_lists(layer)[keras_seam.STORES[0]]
        use = new_use(layer, name, expression, variable.regularizer)
        view = view_like(variable, use, trainable=any(variable is other for other in own))
        by_itself = keras_seam.own_trainable_flag(layer) and not variable.trainable  # whatever the layer is
        view.frozen = by_itself and view.slot_trainable
        constraint = variable.constraint
        variable.regularizer = None
        for weight in expression.weights_used():
            if weight.is_built and weight.variable is variable and weight.regularizer is not None:
                variable.regularizer = weight.regularizer
        _pass_constraint(constraint, expression)
    exchange(layer, state, variable, view, asked)
    _register(layer, view)


def _register(layer: Any, view: View) -> None:
    view.follow(keras_seam.own_trainable_flag(layer))
    for weight in view.expression.weights_used():
        weight.add_use(view.use)


def drop_use(use: Any) -> None:
    """Ends a use of its weights."""
    for weight in use.expression.weights_used():
        weight.remove_use(use)


# --------------------------------------------------------------------------- a layer that is being built


def hand_out(layer: Any, state: State, asked: Tie, **kwargs: Any) -> View:
    """The view that `add_weight` returns in the place of a new variable."""
    name = kwargs["name"]
    refuse_unsupported(layer)
    shape = tuple(int(n) for n in (kwargs.get("shape") or ()))
    dtype = keras.backend.standardize_dtype(kwargs.get("dtype") or layer.variable_dtype)
    initializer = kwargs.get("initializer")
    wished = initializer is not None
    if not wished:
        initializer = "glorot_uniform" if keras_seam.is_float(dtype) else "zeros"
    initializer = keras.initializers.get(initializer)
    trainable = bool(kwargs.get("trainable", True))
    expression = resolved(asked.expression)
    constraint = keras.constraints.get(kwargs.get("constraint"))
    regularizer = keras.regularizers.get(kwargs.get("regularizer"))
    refuse_misfit(layer, name, shape, constraint, expression)
    if wished:
        warn_of_initializer(layer, name, expression, initializer)
    started = [weight for weight in expression.weights_used() if not weight.is_built]
    for weight in started:
        weight.autocasts = weight.autocasts and bool(kwargs.get("autocast", True))
    with keras_seam.name_scope(layer):
        path = f"{keras_seam.current_path()}/{name}"
    start_from_layer(expression, path, shape, dtype, initializer)
    for weight in started if not wished else ():
        weight.first_initializer = None  # nobody chose it, so no later layer is told that its own is not used
    store = keras_seam.STORES[0] if trainable else keras_seam.STORES[1]
    index = len(keras_seam.variable_lists(layer)[store]) + sum(slot.store == store for slot in state.slots)
    use = new_use(layer, name, expression, regularizer)
    view = View(
        use,
        name=name,
        path=path,
        shape=shape,
        dtype=dtype,
        autocast=bool(kwargs.get("autocast", True)),
        trainable=trainable,
    )
    _pass_constraint(constraint, expression)
    keras_seam.note_new_use()
    state.slots.append(Slot(view, store, index, asked, named=True))
    _register(layer, view)
    hang_weights(layer)
    return view


def forward(layer: Any, state: State) -> None:
    """Hands waiting ties on to a sub-layer that has just been made."""
    for path, asked in list(state.pending.items()):
        if len(path) < 2:
            continue
        step = paths.find_child(layer, path)
        if step is None:
            continue
        child, canonical, rest = step
        del state.pending[path]
        if asked.path[-len(path) :] == path:
            asked.rename(asked.path[: -len(path)] + canonical + rest)
        become_tied(child)
        place = paths.locate(child, rest)
        below = become_tied(place.layer)
        if place.variable is None:
            below.pending[place.leaf] = asked
        else:
            replace(place.layer, place.variable, place.leaf_name, asked)


def settle(layer: Any) -> None:
    """At the end of `build`: ties that no `add_weight` has met must find a variable now."""
    state = state_of(layer)
    if state is None:
        return
    for name in state.clashes:
        paths.find_variable(layer, (name,))  # raises, now that both variables have their places
    if state.pending:
        with swapped(keras_seam.contained_layers(layer)):
            _settle(layer, state)


def _settle(layer: Any, state: State) -> None:
    for path, asked in list(state.pending.items()):
        found = paths.find_variable(layer, path)
        child = None if found is not None else paths.find_child(layer, path)
        if found is None and child is None:
            del state.pending[path]
            asked.forget()
            layer.built = True
            raise UnknownName(paths.nothing_there(layer, path, layer, path))
        del state.pending[path]
        if found is not None:
            variable, canonical = found
            refuse_tie(layer, "/".join(canonical), variable, asked.expression)
            if asked.recorder() is layer:
                asked.rename(canonical)
            replace(layer, variable, "/".join(canonical), asked)
        else:
            place = paths.locate(layer, path)
            below = become_tied(place.layer)
            if place.variable is None:
                below.pending[place.leaf] = asked
            else:
                refuse_tie(place.layer, place.leaf_name, place.variable, asked.expression)
                replace(place.layer, place.variable, place.leaf_name, asked)


def _pass_constraint(constraint: Any, expression: Expression) -> None:
    if constraint is not None and isinstance(expression, Weight):
        expression.variable.constraint = constraint
