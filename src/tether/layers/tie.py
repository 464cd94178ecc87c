"""Making a use: a layer's attribute reads an expression from now on.

A tie of a layer that is not built waits until the layer asks for the variable of that name, and is
then handed a view. A tie of a variable that exists puts a view in its place. Either way nothing is
changed before everything is known to fit, and a failure half way is rolled back.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import keras

from tether import keras_seam
from tether.errors import TetherError, UnknownName, UnknownShape, Unsupported, received
from tether.layers import paths
from tether.layers.rollback import Rollback
from tether.layers.starting import misfit, start_from_layer, start_from_values, warn_of_initializer
from tether.layers.state import STATE, Slot, State, Tie, hang_weights, new_use, state_of
from tether.layers.tied import arguments_in, take_arguments, tied_class
from tether.layers.view import View
from tether.weights.argument import Argument
from tether.weights.expression import Expression, as_expression, known_shape
from tether.weights.inversion import solve_shape
from tether.weights.weight import Weight


def tie(layer: Any, weights: Mapping[str, Any] | None = None, /, **by_name: Any) -> Any:
    """Makes weights of a layer read expressions, in place, and returns the layer.

    Args:
        layer: A Keras layer or model, built or not.
        weights: Expressions by path, for names that are not identifiers: `{"query/kernel": w}`. A path
            is made of attributes, indices and names of sub-layers, and ends in a weight's name.
        **by_name: Expressions by the weight's name or attribute: `kernel=codec.T`. A number or an
            array is a constant.

    Returns:
        The same layer. It is still an instance of its class.

    Raises:
        UnknownName: A path names no weight, or two. For a layer that is not built this is raised when
            it is built.
        ShapeMismatch: An expression has another shape than the weight.
        UnknownShape: A weight in an expression has no shape and this tie cannot tell it.
        Unsupported: The layer or the weight cannot be tied; the error names the way that works.

    Example:
    ```python
    codec = tether.Weight(name="codec")
    encode = tether.tie(keras.layers.Dense(64, activation="relu"), kernel=codec)
    decode = tether.tie(keras.layers.Dense(784), kernel=codec.T)
    ```
    """
    wanted = _wanted("tie", layer, weights, by_name)
    made_by_code = keras_seam.maker(layer) is not None
    _tie_all(layer, wanted, made_by_code=made_by_code)
    return layer


def restore(layer: Any, ties: Mapping[str, Expression], takes: list[Argument], penalties: list[Any]) -> None:
    """Makes the ties and penalties that a config records."""
    if ties:
        _tie_all(layer, dict(ties), made_by_code=False)
    if takes:
        become_tied(layer)
        _state(layer).takes = list(takes)
        take_arguments(layer)
    state = state_of(layer)
    if penalties or (state is not None and state.penalties):
        from tether.layers import penalizing

        penalizing.replace(layer, penalties)


def weight_of(layer: Any, name: str) -> Any:
    """The stored weight behind a layer's weight, to be used elsewhere: promoted in place if it has none.

    The layer keeps its values, and the very Variable object, so an optimizer that knows it stays valid.
    For a layer that is not built the weight gets its shape and values when the layer builds.

    Args:
        layer: A Keras layer or model.
        name: The weight's name, attribute or path.

    Returns:
        The `tether.Weight`; for a weight that is tied to a composite expression, that expression.

    Raises:
        UnknownName: The name names no weight, or two.

    Example:
    ```python
    table = tether.weight_of(model.get_layer("embedding"), "embeddings")
    tether.tie(model.get_layer("head"), kernel=table.T)
    ```
    """
    refuse_layer("weight_of", layer)
    place = paths.locate(layer, paths.split(name))
    if isinstance(place.variable, View):
        return place.variable.expression
    state = state_of(place.layer)
    if state is not None and place.leaf in state.pending:
        return state.pending[place.leaf].expression
    label = f"{place.layer.name}.{place.leaf_name}".replace("/", ".")
    weight = Weight(name=label)
    _tie_all(layer, {name: weight}, made_by_code=keras_seam.maker(layer) is not None)
    return weight


# --------------------------------------------------------------------------- what is asked for


def refuse_layer(function: str, layer: Any) -> None:
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, Weight):
        raise TetherError(f"`{function}` takes a Keras layer or model. {received(layer=layer)}")
    if keras_seam.is_nnx_enabled():
        raise Unsupported(
            "Keras's NNX mode fixes a layer's class and state when it is made, so its weights cannot be tied. "
            "Turn it off: KERAS_NNX_ENABLED=false."
        )


def _wanted(function: str, layer: Any, weights: Any, by_name: dict[str, Any]) -> dict[str, Expression]:
    refuse_layer(function, layer)
    if weights is not None and not isinstance(weights, Mapping):
        raise TetherError(
            f"`{function}` takes expressions by name: `{function}(layer, kernel=w)` or "
            f"`{function}(layer, {{'query/kernel': w}})`. {received(weights=weights)}"
        )
    given = dict(weights or {})
    twice = set(given) & set(by_name)
    if twice:
        raise TetherError(f"The weight {sorted(twice)[0]!r} is given twice.")
    given.update(by_name)
    if not given:
        raise TetherError(f"`{function}` needs at least one weight, as in `{function}(layer, kernel=w)`.")
    wanted = {}
    for path, value in given.items():
        try:
            wanted[path] = as_expression(value)
        except TypeError:
            raise TetherError(
                f"The weight {path!r} of layer {layer.name!r} can be tied to a `tether.Weight`, an expression, a "
                f"number or an array. {received(type=type(value).__name__)}"
            ) from None
    return wanted


def _tie_all(layer: Any, wanted: dict[str, Expression], *, made_by_code: bool) -> None:
    places = {path: paths.locate(layer, paths.split(path)) for path in wanted}
    _refuse_twice(layer, places)
    affected = {id(layer): layer, **{id(place.layer): place.layer for place in places.values()}}
    affected.update({id(place.recorder): place.recorder for place in places.values()})
    affected.update({id(place.lent[0]): place.lent[0] for place in places.values() if place.lent is not None})
    involved = {id(w): w for expression in wanted.values() for w in expression.weights_used()}
    for place in places.values():
        if isinstance(place.variable, View):
            involved.update({id(w): w for w in place.variable.expression.weights_used()})
    _check(layer, wanted, places)
    replaced = []
    with Rollback([*affected.values(), *involved.values()]):
        for path, place in places.items():
            become_tied(place.layer)
            become_tied(place.recorder)
            asked = Tie(weakref.ref(place.recorder), place.recorded_path, wanted[path], made_by_code)
            _record(place.recorder, asked)
            if place.lent is not None:
                become_tied(place.lent[0])
                lent = _state(place.lent[0]).lent
                lent[:] = [(tie, path) for tie, path in lent if path != place.lent[1]] + [(asked, place.lent[1])]
            if place.variable is None:
                _state(place.layer).pending[place.leaf] = asked
            else:
                replace(place.layer, place.variable, place.leaf_name, asked)
                replaced.append((place.variable, [w.variable for w in wanted[path].weights_used() if w.is_built]))
            if place.recorder is not layer and arguments_in(wanted[path]):
                become_tied(layer)
                _state(layer).takes.extend(a for a in arguments_in(wanted[path]) if a not in _state(layer).takes)
        for taker in (layer, *(place.recorder for place in places.values())):
            if state_of(taker) is not None:
                take_arguments(taker)
    adopted = {id(weight.variable) for weight in involved.values() if weight.is_built}
    keras_seam.replace_torch_parameters(
        [(old, new) for old, new in replaced if not isinstance(old, View) and id(old) not in adopted]
    )


def _refuse_twice(layer: Any, places: dict[str, paths.Place]) -> None:
    seen: dict[Any, str] = {}
    for path, place in places.items():
        key = id(place.variable) if place.variable is not None else (id(place.layer), place.leaf)
        if key in seen:
            raise TetherError(f"{seen[key]!r} and {path!r} are the same weight of layer {layer.name!r}.")
        seen[key] = path


def _check(layer: Any, wanted: dict[str, Expression], places: dict[str, paths.Place]) -> None:
    """Everything that can be known before anything is changed."""
    for path, place in places.items():
        refuse_unsupported(place.layer)
        expression = wanted[path]
        if place.variable is not None:
            shape = tuple(int(n) for n in place.variable.shape)
            if expression.shape is None and solve_shape(expression, shape) is None:
                known_shape(expression)
            if expression.shape is not None and expression.shape != shape:
                raise misfit(place.layer, place.leaf_name, shape, expression)
            constraint = getattr(place.variable, "constraint", None)
            if constraint is not None and not isinstance(place.variable, View):
                _check_constraint(place.layer, place.leaf_name, constraint, expression)


def refuse_unsupported(layer: Any) -> None:
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


def _record(recorder: Any, asked: Tie) -> None:
    state = _state(recorder)
    state.recorded = [tie for tie in state.recorded if tie.path != asked.path] + [asked]


def _state(layer: Any) -> State:
    state = state_of(layer)
    assert state is not None
    return state


def become_tied(layer: Any) -> None:
    """Turns a layer into an instance of its tied class, without ties yet."""
    if state_of(layer) is not None:
        return
    cls = tied_class(type(layer))
    keras_seam.set_untracked(layer, STATE, State())
    keras_seam.shield_tracker(layer, View)
    layer.__class__ = cls


# --------------------------------------------------------------------------- a variable that exists


def replace(layer: Any, variable: Any, name: str, asked: Tie) -> None:
    """Puts a view in the place of a variable, or of another view."""
    state = _state(layer)
    expression = asked.expression
    if isinstance(variable, View):
        slot = next(slot for slot in state.slots if slot.view is variable)
        start_from_values(layer, name, expression, variable)
        use = new_use(layer, name, expression, variable.use.regularizer)
        _drop_use(variable.use)
        _forget(slot.tie)
        view = _make_view(layer, use, variable, trainable=variable.slot_trainable)
        view.frozen = variable.frozen
        slot.view, slot.tie = view, asked
    else:
        store, index = _position(layer, state, variable)
        regularizer, constraint = variable.regularizer, variable.constraint
        start_from_values(layer, name, expression, variable)
        use = new_use(layer, name, expression, regularizer)
        view = _make_view(layer, use, variable, trainable=store == "trainable_variables")
        keras_seam.untrack(layer, variable)
        variable.regularizer = None
        for weight in expression.weights_used():
            if weight.is_built and weight.variable is variable and weight.regularizer is not None:
                variable.regularizer = weight.regularizer
        _pass_constraint(layer, name, constraint, expression)
        state.slots.append(Slot(view, store, index, asked))
    for path in paths.holders(layer, variable):
        _put(layer, path, view)
    _register(layer, view)
    hang_weights(layer)


def _make_view(layer: Any, use: Any, variable: Any, *, trainable: bool) -> View:
    return View(
        use,
        name=variable.name,
        path=variable.path,
        shape=tuple(int(n) for n in variable.shape),
        dtype=keras_seam.stored_dtype(variable),
        autocast=keras_seam.autocasts(variable),
        trainable=trainable,
    )


def _position(layer: Any, state: State, variable: Any) -> tuple[str, int]:
    from tether.layers.state import ordered_variables

    for store, variables in ordered_variables(layer, state).items():
        for index, other in enumerate(variables):
            if other is variable:
                return store, index
    raise UnknownName(f"Layer {layer.name!r} does not track {variable.path!r}.")


def _put(layer: Any, path: tuple[str, ...], view: View) -> None:
    """Sets an attribute, or an item of a container that an attribute holds."""
    if len(path) == 1:
        keras_seam.forget_attribute(layer, path[0])
        keras_seam.set_untracked(layer, path[0], view)
        return
    container = vars(layer)[path[0]]
    for key in path[1:-1]:
        container = container[int(key)] if isinstance(container, (list, tuple)) else container[key]
    if isinstance(container, tuple):
        raise Unsupported(
            f"Layer {layer.name!r} keeps the variable in the tuple {path[0]!r}, which cannot be changed. Tie the layer "
            "before it is built, or keep its variables in a list."
        )
    if isinstance(container, list):
        list.__setitem__(container, int(path[-1]), view)
    else:
        dict.__setitem__(container, path[-1], view)


def _register(layer: Any, view: View) -> None:
    view.use.live = True
    for weight in view.expression.weights_used():
        weight.add_use(view.use)
    view.use.live = False  # so that `follow` sees a change and refreshes
    view.follow(keras_seam.own_trainable_flag(layer))
    for weight in view.expression.weights_used():
        weight.refresh()


def _drop_use(use: Any) -> None:
    for weight in use.expression.weights_used():
        weight.remove_use(use)


def _forget(asked: Tie) -> None:
    """Removes a tie from the object that records it."""
    recorder = asked.recorder()
    state = None if recorder is None else state_of(recorder)
    if state is not None:
        state.recorded = [tie for tie in state.recorded if tie is not asked]


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
    expression = asked.expression
    constraint = keras.constraints.get(kwargs.get("constraint"))
    regularizer = keras.regularizers.get(kwargs.get("regularizer"))
    if expression.shape is None and solve_shape(expression, shape) is None:
        known_shape(expression)
    if expression.shape is not None and expression.shape != shape:
        raise misfit(layer, name, shape, expression)
    if constraint is not None:
        _check_constraint(layer, name, constraint, expression)
    if wished:
        warn_of_initializer(layer, name, expression, initializer)
    start_from_layer(expression, shape, dtype, initializer)
    store = keras_seam.STORES[0] if trainable else keras_seam.STORES[1]
    index = len(keras_seam.variable_lists(layer)[store]) + sum(slot.store == store for slot in state.slots)
    with keras_seam.name_scope(layer):
        path = f"{keras_seam.current_path()}/{name}"
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
    _pass_constraint(layer, name, constraint, expression)
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
        recorder = asked.recorder()
        if recorder is not None and asked.path[-len(path) :] == path:
            asked.path = asked.path[: -len(path)] + canonical + rest
        become_tied(child)
        place = paths.locate(child, rest)
        become_tied(place.layer)
        if place.variable is None:
            _state(place.layer).pending[place.leaf] = asked
        else:
            replace(place.layer, place.variable, place.leaf_name, asked)


def settle(layer: Any) -> None:
    """At the end of `build`: ties that no `add_weight` has met must find a variable now."""
    state = state_of(layer)
    if state is None:
        return
    for name in state.clashes:
        paths.find_variable(layer, (name,))  # raises, now that both variables have their places
    for path, asked in list(state.pending.items()):
        found = paths.find_variable(layer, path)
        child = None if found is not None else paths.find_child(layer, path)
        if found is None and child is None:
            del state.pending[path]
            _forget(asked)
            layer.built = True
            raise UnknownName(paths.nothing_there(layer, path, layer, path))
        del state.pending[path]
        if found is not None:
            variable, canonical = found
            _check_late(layer, "/".join(canonical), asked, variable)
            if asked.recorder() is layer:
                asked.path = canonical
            replace(layer, variable, "/".join(canonical), asked)
        else:
            place = paths.locate(layer, path)
            become_tied(place.layer)
            if place.variable is None:
                _state(place.layer).pending[place.leaf] = asked
            else:
                _check_late(place.layer, place.leaf_name, asked, place.variable)
                replace(place.layer, place.variable, place.leaf_name, asked)


def _check_late(layer: Any, name: str, asked: Tie, variable: Any) -> None:
    place = paths.Place(layer, (name,), layer, (name,), variable, name)
    _check(layer, {name: asked.expression}, {name: place})


# --------------------------------------------------------------------------- shapes and constraints


def _check_constraint(layer: Any, name: str, constraint: Any, expression: Expression) -> None:
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


def _pass_constraint(layer: Any, name: str, constraint: Any, expression: Expression) -> None:
    if constraint is not None and isinstance(expression, Weight):
        expression.variable.constraint = constraint


__all__ = ["UnknownShape", "forward", "hand_out", "replace", "restore", "settle", "tie", "weight_of"]
