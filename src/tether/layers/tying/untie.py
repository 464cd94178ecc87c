"""Giving layers plain variables again, holding the present values."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import TetherError, UnknownName, Unsupported, did_you_mean, received
from tether.layers.family.call import Lambda
from tether.layers.tying import paths
from tether.layers.tying.fit import refuse_layer
from tether.layers.tying.state import STATE, State, Tie, View, ViewSlot, arguments_in, slots_of, state_of
from tether.layers.tying.swap import Rollback, exchange, swapped
from tether.layers.tying.tie import drop_void_penalties, has_penalties
from tether.layers.tying.tied import base_class, drop_use, take_arguments, takes_arguments
from tether.types import AnyLayer
from tether.weights import placement
from tether.weights.leaves import Argument, Choice, bind
from tether.weights.weight import Weight


def untie(layer: AnyLayer, *names: str) -> AnyLayer:
    """Gives weights of a layer variables of their own, with the present values, in place.

    Args:
        layer: A tied layer, or a layer or model with tied layers below it.
        *names: Names or paths as for `tie`; left out, everything below the layer.

    Returns:
        The same layer; without any tie left it is an instance of its plain class again. Soft ties of its weights
        end too. Compile a model again before training it on: its variables are others.

    Raises:
        UnknownName: A name is not tied.

    Example:
    ```python
    table = tether.weight_of(model.get_layer("embedding"), "embeddings")
    tether.tie(model.get_layer("head"), kernel=table.T)
    tether.untie(model.get_layer("head"), "kernel")
    assert model.get_layer("head").kernel is not table.variable
    ```
    """
    refuse_layer("untie", layer)
    if names:
        _untie_some(layer, names)
        return layer
    keras_seam.before_change([below for below in keras_seam.contained_layers(layer) if state_of(below) is not None])
    with Rollback.below(layer), swapped(keras_seam.contained_layers(layer)):
        _untie_all(layer)
    return layer


def _untie_all(layer: keras.Layer) -> None:
    for below in keras_seam.contained_layers(layer):
        state = state_of(below)
        if state is not None:
            for slot in list(state.slots):
                _give_back(below, state, slot)
            for asked in list(state.pending.values()):
                asked.forget()
            state.pending.clear()
            state.when_built.clear()
    _clear_up(layer, keras_seam.contained_layers(layer))


def _untie_some(layer: keras.Layer, names: tuple[str, ...]) -> None:
    holdings = paths.Holdings(len(names))
    found = (_asked_for(layer, name, paths.locate(layer, paths.split(name), holdings)) for name in names)
    asked = list({id(tie): (place, tie, slot) for place, tie, slot in found}.values())
    ties = [tie for _, tie, _ in asked]
    recorders = [recorder for tie in ties if (recorder := tie.recorder()) is not None]
    lent = [place.lent[0] for place, _, _ in asked if place.lent is not None]
    touched = (layer, *(place.layer for place, _, _ in asked), *recorders, *lent)
    affected = list({id(each): each for each in touched}.values())
    weights = {id(weight): weight for tie in ties for weight in tie.expression.weights_used()}
    keras_seam.before_change([place.layer for place, _, _ in asked])
    with Rollback([*affected, *weights.values()]), swapped([place.layer for place, _, _ in asked]):
        for place, tie, slot in asked:
            state = vars(place.layer)[STATE]
            if slot is None:
                del state.pending[place.leaf]
                tie.forget()
            else:
                _give_back(place.layer, state, slot)
        _clear_up(layer, affected)


def _asked_for(layer: keras.Layer, name: str, place: paths.Place) -> tuple[paths.Place, Tie, ViewSlot | None]:
    """The tie that is to end, and the slot of its view if the layer is built."""
    state = state_of(place.layer)
    if state is not None and place.variable is None and place.leaf in state.pending:
        return place, state.pending[place.leaf], None
    if state is None or not isinstance(place.variable, View):
        tied = ["/".join(names) for _, names, _, variable in paths.walk(layer) if isinstance(variable, View)]
        raise UnknownName(
            f"The weight {name!r} of layer {layer.name!r} is not tied: it has a variable of its own already. Tied are: "
            f"{', '.join(tied) or 'none'}; `untie(layer)` without names ends all."
        )
    slot = next(slot for slot in state.slots if slot.view is place.variable)
    return place, slot.tie, slot


def _clear_up(layer: keras.Layer, affected: list[keras.Layer]) -> None:
    """Drops what only ties that have ended needed, and makes layers plain that have none left."""
    for each in affected:
        state = state_of(each)
        if state is not None:
            state.lent = [(tie, path) for tie, path in state.lent if tie.is_recorded]
    if has_penalties():
        affected = keras_seam.contained_layers(layer)
        drop_void_penalties(affected)
    for each in affected:
        become_plain(each)


def materialize(layer: AnyLayer, /, **arguments: object) -> AnyLayer:
    """A plain copy with the same outputs and none of Tether's classes left in it; the original stays as it is.

    Args:
        layer: A layer or model. It must be built.
        **arguments: What its weights are given with a call, by name: `materialize(layer, choice="french")` has the
            weights of that choice. Left out, the defaults.

    Returns:
        A new layer or model, not compiled.

    Raises:
        TetherError: No weight takes such an argument, or it has not one value for all of a call.
        Unsupported: It holds something that is Tether's own (a `tether.Lambda`, a `Weight` as an
            attribute of a user's layer), which has no plain counterpart.

    Example:
    ```python
    table = tether.weight_of(model.get_layer("embedding"), "embeddings")
    tether.tie(model.get_layer("head"), kernel=table.T)
    plain = tether.materialize(model)
    assert plain.count_params() == model.count_params() + 100 * 16
    ```
    """
    refuse_layer("materialize", layer)
    if not layer.built:
        raise TetherError(
            f"`materialize` needs a layer or model that is built, and {layer.name!r} is not, so there are no values to "
            f"copy. Call it on data, or build it: `{layer.name}.build(input_shape)`."
        )
    for below in keras_seam.contained_layers(layer):
        if isinstance(below, Lambda):
            raise Unsupported(
                f"The tether.Lambda {below.name!r} has no plain counterpart in Keras. Write it as a layer, or untie "
                "the other layers one by one with `tether.untie`."
            )
    _bindings(layer, arguments)
    buffer = io.BytesIO()
    keras_seam.save_to(layer, buffer)
    buffer.seek(0)
    custom = {}
    for below in keras_seam.contained_layers(layer):
        cls = base_class(type(below))
        custom[cls.__name__] = cls
        custom[keras.saving.get_registered_name(cls)] = cls
    with keras.saving.custom_object_scope(custom):
        copy = keras_seam.load_from(buffer, compile=False)
    with bind(_bindings(copy, arguments)):
        untie(copy)
    left = [below.name for below in keras_seam.contained_layers(copy) if isinstance(below, Weight)]
    if left:
        raise Unsupported(
            f"The weights {', '.join(left)} are attributes of layers of your own, which read them as expressions; "
            "those layers cannot be made plain."
        )
    own = [below for below in keras_seam.contained_layers(copy) if type(below).__module__.startswith("tether.")]
    if own:
        raise Unsupported(
            f"{own[0].name!r} is a {type(own[0]).__name__}, which has no plain counterpart in Keras. Make what is in "
            "it plain: of `tether.routed(model)` the model, `materialize(model, choice=0)`; of a `tether.Repeat` its "
            "`layers()`."
        )
    return copy


def _bindings(layer: keras.Layer, given: Mapping[str, Any]) -> dict[Argument, Any]:
    """The arguments of the weights below a layer that values are given for by name.

    Raises:
        TetherError: There is none of a name, or a value is not one for a call.
    """
    slots = [slot for below in keras_seam.contained_layers(layer) for slot in slots_of(below)] if given else []
    found = list(dict.fromkeys(leaf for slot in slots for leaf in arguments_in(slot.view.expression)))
    names = sorted({argument.name for argument in found})
    for name, value in given.items():
        if name not in names:
            raise TetherError(
                f"No weight of {layer.name!r} takes an argument {name!r}.{did_you_mean(name, names)} They take: "
                f"{', '.join(names) or 'none'}."
            )
        for argument in found:
            if argument.name == name and isinstance(argument, Choice) and len(np.shape(value)):
                raise TetherError(
                    f"A plain copy has one value for each weight, so {name!r} is one choice, as in "
                    f"`materialize(layer, {name}=0)`. {received(shape=np.shape(value))}"
                )
    bound = {argument: given[argument.name] for argument in found if argument.name in given}
    with bind(bound):  # refuses what is none of the choices
        return bound


def _give_back(layer: keras.Layer, state: State, slot: ViewSlot) -> None:
    """Makes a plain variable in the place of a view."""
    view = slot.view
    variable = plain_variable(view)
    for weight in view.expression.weights_used():
        if weight is view.expression and weight.is_built:
            variable.constraint = weight.variable.constraint
    drop_use(view.use)
    slot.tie.forget()
    exchange(layer, state, view, variable)


def plain_variable(view: View) -> keras.Variable:
    """A stored variable with a view's present value, name, path, dtype and flags."""
    value = keras_seam.to_numpy(view.value, view.path, in_step=True)
    if value.shape != tuple(view.shape):
        raise TetherError(f"{view.path} has shape {tuple(view.shape)}. {received(value=value.shape)}")
    with keras_seam.path_scope(view.path):
        variable = keras.Variable(
            value.copy(),
            dtype=keras_seam.stored_dtype(view),
            trainable=view.use.live,
            autocast=keras_seam.autocasts(view),
            name=view.name,
        )
    placement.lay_out_as(variable, placement.layout_of_value(view.path, view.expression))
    variable.regularizer = view.use.regularizer
    return variable


def become_plain(layer: keras.Layer) -> None:
    """Returns a layer without ties to its base class."""
    state = state_of(layer)
    if state is None:
        return
    if state.takes:
        below = [state_of(other) for other in keras_seam.contained_layers(layer) if other is not layer]
        ties = [tie for other in below if other is not None for tie in other.recorded.values()]
        needed = {argument for tie in ties for argument in arguments_in(tie.expression)}
        state.takes = [argument for argument in state.takes if argument in needed]
    if takes_arguments(layer):
        take_arguments(layer)
    if (
        state.slots
        or state.pending
        or state.recorded
        or state.lent
        or state.takes
        or state.penalties
        or state.when_built
    ):
        return
    object.__delattr__(layer, STATE)
    keras_seam.give_back_quantize(layer)
    layer.__class__ = base_class(type(layer))
    keras_seam.unshield_tracker(layer)
