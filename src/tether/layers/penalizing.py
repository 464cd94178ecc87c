"""Where a penalty is recorded, and how it comes there and goes again.

A model made by Keras from its layers has no config but theirs, and a clone of it asks only them. So a
penalty is recorded on a layer whose config every save and every clone holds; which one makes no
difference to the loss, since Keras asks each layer below a model once.
"""

from __future__ import annotations

from typing import Any

import keras

from tether import keras_seam
from tether.layers.penalty import ALIVE, Penalty
from tether.layers.placing import become_tied
from tether.layers.state import hang_weights, state_of, weights_below
from tether.layers.swap import swapped
from tether.weights.expression import Expression
from tether.weights.weight import Weight

GRAPHS = (keras_seam.Functional, keras_seam.Sequential)


def places(model: Any, weights: tuple[Weight, ...]) -> tuple[Any, Any]:
    """Who records a penalty of these weights, and the layer that a clone of a graph around it asks, if any."""
    recorder, current = None, model
    while isinstance(current, GRAPHS):
        if recorder is None and not keras_seam.holds_its_layers_configs(current):
            recorder = current
        children = [child for child in keras_seam.sublayers(current) if _may_record(child)]
        if not children:
            break
        with_weights = (child for child in children if set(weights_below(child)) & set(weights))
        current = next(with_weights, children[0])
    if recorder is None or recorder is current:
        return current, None
    return recorder, current


def _may_record(layer: Any) -> bool:
    return not isinstance(layer, (Weight, keras.layers.InputLayer))


def attach(penalty: Penalty, recorder: Any, lent: Any = None) -> None:
    """Records a penalty on a layer; from now on it is one of its losses."""
    with swapped([recorder]):
        become_tied(recorder).penalties.append(penalty)
        penalty.register()
        penalty.follow(keras_seam.own_trainable_flag(recorder))
        hang_weights(recorder)
    if lent is not None:
        become_tied(lent).penalties.append(penalty)


def detach(penalty: Penalty, holders: list[Any]) -> None:
    """Takes a penalty off the layers that have it; they stay tied layers."""
    penalty.unregister()
    for layer in holders:
        state = state_of(layer)
        if state is not None and any(other is penalty for other in state.penalties):
            with swapped([layer]):
                state.penalties = [other for other in state.penalties if other is not penalty]
                hang_weights(layer)


def replace(layer: Any, found: list[tuple[Expression, Expression, Expression, tuple[Weight, ...]]]) -> None:
    """Gives a layer the penalties of its config, instead of those that its own constructor made."""
    state = state_of(layer)
    for penalty in list(state.penalties) if state is not None else []:
        detach(penalty, [layer])
    for a, b, strength, owned in found:
        attach(Penalty(layer, a, b, strength, owned), layer)


def are_any() -> bool:
    """Whether there is any penalty."""
    return bool(ALIVE)


def drop_void(layers: list[Any]) -> None:
    """Takes off the penalties of which a weight is no longer in use."""
    for layer in layers:
        state = state_of(layer)
        for penalty in list(state.penalties) if state is not None else []:
            if penalty.is_void:
                detach(penalty, [layer])
