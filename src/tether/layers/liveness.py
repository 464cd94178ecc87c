"""What trains in one model: the uses of weights that its layers have.

A weight trains as long as some use of it does, anywhere. A model that holds only frozen uses of it does not train it.
"""

from __future__ import annotations

import weakref

import keras

from tether import keras_seam
from tether.layers.tying import paths
from tether.layers.tying.state import state_of
from tether.weights.storage import Use
from tether.weights.weight import Weight


def is_tied(model: keras.Model) -> bool:
    """Whether a model holds weights, or layers that will."""
    return any(isinstance(layer, Weight) or state_of(layer) is not None for layer in keras_seam.contained_layers(model))


def live(model: keras.Model) -> weakref.WeakKeyDictionary[Use | Weight, bool]:
    """The uses in a model, and whether a gradient may flow through each; its weights, and whether each may train."""
    found: weakref.WeakKeyDictionary[Use | Weight, bool] = weakref.WeakKeyDictionary()
    for layer in keras_seam.contained_layers(model):
        if isinstance(layer, Weight):
            found[layer] = layer.trainable_flag
        state = state_of(layer)
        if state is not None:
            uses = [slot.view.use for slot in state.slots]
            uses += [use for penalty in state.penalties if penalty.recorder() is layer for use in penalty.uses]
            found.update((use, use.live) for use in uses)
    return found


def differences(model: keras.Model, before: weakref.WeakKeyDictionary[Use | Weight, bool]) -> list[str]:
    """The names of the weights of which something has been frozen or unfrozen since `live`."""
    found: dict[str, None] = {}
    for one, was in live(model).items():
        if before.get(one, was) != was:
            weights = one.expression.weights_used() if isinstance(one, Use) else (one,)
            found.update((weight.name, None) for weight in weights)
    return list(found)


def still(model: keras.Model) -> list[keras.Variable]:
    """The variables of weights that train elsewhere, and of which a model holds frozen uses only."""
    layers = {id(layer): layer for layer in keras_seam.contained_layers(model)}
    weights = [layer for layer in layers.values() if isinstance(layer, Weight) and layer.is_built and layer.trainable]
    return [weight.variable for weight in weights if not _trains_in(weight, layers)]


def _trains_in(weight: Weight, layers: dict[int, keras.Layer]) -> bool:
    if any(id(use.layer()) in layers and use.reaches(weight) for use in weight.uses):
        return True
    holders = (layer for layer in layers.values() if not isinstance(layer, Weight))
    return any(
        keras_seam.own_trainable_flag(layer) and bool(paths.holders(layer, weight))
        for layer in holders
        if any(child is weight for child in keras_seam.sublayers(layer))
    )
