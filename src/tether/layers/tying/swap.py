"""Changing which variables a layer has: the one way in which a variable, or a view, takes the place of another.

Every verb that changes layers (tie, untie, materialize, adapters, quantize, loading) goes through here. `exchange` puts
one in the place of the other: in the layer's lists and in every attribute and container that holds it. `swapped` is put
around all exchanges of one call, and does the bookkeeping of the backends once, from what each layer stored before and
stores after.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from tether import keras_seam
from tether.errors import UnknownName
from tether.layers.tying import paths
from tether.layers.tying.state import (
    STATE,
    State,
    Tie,
    View,
    ViewSlot,
    hang_weights,
    ordered_variables,
    slots_of,
    users,
    weights_below,
)
from tether.weights.expression import Expression
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- exchanging


@contextlib.contextmanager
def swapped(layers: Iterable[keras.Layer]) -> Iterator[None]:
    """Lets the backends know what layers store, after what is done in the block has changed it.

    A layer within a block that has been left by an error stores what it did: nobody has been told otherwise.
    """
    before = {id(layer): (layer, list(layer.variables)) for layer in (layers if keras_seam.LISTS_PARAMETERS else ())}
    yield
    changes = [keras_seam.StoredChange(layer, stored, list(layer.variables)) for layer, stored in before.values()]
    keras_seam.list_parameters_again(changes)


def exchange(layer: keras.Layer, state: State, old: object, new: object, asked: Tie | None = None) -> None:
    """Puts a variable or view in the place of another, wherever the layer holds it.

    Args:
        layer: A tied layer.
        state: Its state.
        old: A variable or view of the layer.
        new: What takes its place.
        asked: The tie of a new view.
    """
    slot = next((slot for slot in state.slots if slot.view is old), None)
    held = paths.holders(layer, old)
    advice = " Tie the layer before it is built, or keep its variables in a list."
    for path in held:
        paths.refuse_fixed(layer, path, what="variable", advice=advice)
    if slot is None:
        store, index = _position(layer, state, old)
        keras_seam.untrack(layer, old)
        slot = ViewSlot(new, store, index, asked)  # type: ignore[arg-type]
        state.slots.append(slot)
    elif isinstance(new, View):
        slot.view, slot.tie = new, asked  # type: ignore[assignment]
    else:
        state.slots.remove(slot)
        ahead = sum(other.store == slot.store and other.index < slot.index for other in state.slots)
        keras_seam.insert_tracked(layer, slot.store, slot.index - ahead, new)
    for path in held:
        _put(layer, path, new)
    hang_weights(layer)


def _position(layer: keras.Layer, state: State, variable: keras.Variable) -> tuple[str, int]:
    for store, variables in ordered_variables(layer, state).items():
        for index, other in enumerate(variables):
            if other is variable:
                return store, index
    raise UnknownName(f"Layer {layer.name!r} does not track {variable.path!r}.")


def _put(layer: keras.Layer, path: tuple[str, ...], value: object) -> None:
    """Sets an attribute, or an item of a container that an attribute holds."""
    if len(path) > 1:
        paths.put_item(layer, path, value)
    elif isinstance(value, View):
        keras_seam.forget_attribute(layer, path[0])
        keras_seam.set_untracked(layer, path[0], value)
    else:
        with keras_seam.unlocked(layer):
            setattr(layer, path[0], value)


def become_all(
    new: Mapping[Weight, Expression], origins: Mapping[int, keras_seam.SlotSource] | None = None
) -> list[keras.Layer]:
    """Lets weights be expressions of other weights from now on, which store their values, wherever they are used.

    Args:
        new: The expression of each, of its shape and dtype.
        origins: From which variables those of the other weights are made, by their ids: optimizers of compiled models
            go on with what they keep.

    Returns:
        The layers that use them.
    """
    layers = {id(layer): layer for weight in new for layer in users(weight)}
    keras_seam.before_change([*new, *layers.values()])
    with swapped([*layers.values(), *new]):
        for weight, expression in new.items():
            weight.become(expression)
        for layer in layers.values():
            for slot in slots_of(layer):
                slot.tie.expression = slot.view.expression
            hang_weights(layer)
    keras_seam.keep_slots(origins or {})
    return list(layers.values())


# --------------------------------------------------------------------------- undoing
# Undoing a tie that failed half way: every object it touched is put back as it was.


class _Snapshot:
    """An object's class, attributes, and the contents of the containers that they hold."""

    def __init__(self, target: object) -> None:
        self.target = target
        self.cls = type(target)
        self.attributes = dict(vars(target))
        self.contents: list[tuple[object, Any]] = []
        self._keep_contents(self.attributes.values())
        self.flags: list[tuple[keras.Variable, bool, object, object]] = []
        tracker = keras_seam.own_tracker(target)
        self.tracker = (tracker, {} if tracker is None else dict(vars(tracker)))
        if tracker is not None:
            self._keep_contents(tracker.stored_ids.values())
            self._keep_contents([tracker.stored_ids, tracker.config])
            for variable in itertools.chain(*keras_seam.variable_lists(target).values()):
                self._keep_flags(variable)
        held = self.attributes.get("_variable")
        if isinstance(target, Weight) and held is not None:
            self._keep_flags(held)

    def _keep_flags(self, variable: keras.Variable) -> None:
        self.flags.append((variable, variable.trainable, variable.regularizer, variable.constraint))

    def _keep_contents(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, list):
                self.contents.append((value, list(value)))
            elif isinstance(value, dict):
                self.contents.append((value, keras_seam.without_parameters(value)))
            elif isinstance(value, set):
                self.contents.append((value, set(value)))

    def restore(self) -> None:
        self.target.__class__ = self.cls
        attributes = self.target.__dict__
        attributes.clear()
        attributes.update(self.attributes)
        for container, content in self.contents:
            _refill(container, content)
        tracker, of_tracker = self.tracker
        if tracker is not None:
            tracker.__dict__.update(of_tracker)
        for variable, trainable, regularizer, constraint in self.flags:
            if variable.trainable != trainable:
                variable.trainable = trainable
            variable.regularizer, variable.constraint = regularizer, constraint


def _refill(container: object, content: Any) -> None:
    """Puts a container's contents back without going through its own, tracking methods."""
    held = getattr(container, "__wrapped__", container)  # TensorFlow wraps the dicts of a model
    if isinstance(held, list):
        list.clear(held)
        list.extend(held, content)
    elif isinstance(held, dict):
        listed = keras_seam.only_parameters(held)
        dict.clear(held)
        dict.update(held, {**content, **listed})
    elif isinstance(held, set):
        set.clear(held)
        set.update(held, content)


class Rollback:
    """Restores layers and weights if the block raises."""

    def __init__(self, targets: list[keras.Layer]) -> None:
        self.targets = targets

    @classmethod
    def below(cls, layer: keras.Layer) -> Rollback:
        """Restores a layer, the layers below it and the weights that they use or wait for."""
        found = [*keras_seam.contained_layers(layer), *weights_below(layer)]
        return cls(list({id(target): target for target in found}.values()))

    def __enter__(self) -> Rollback:
        self.snapshots = [_Snapshot(target) for target in self.targets]
        self.states = [
            (s.attributes[STATE], dict(vars(s.attributes[STATE]))) for s in self.snapshots if STATE in s.attributes
        ]
        self.state_contents = [
            (value, list(value) if isinstance(value, list) else dict(value))
            for state, attributes in self.states
            for value in attributes.values()
            if isinstance(value, (list, dict))
        ]
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            return
        stored = [list(target.variables) for target in self.targets]
        for snapshot in self.snapshots:
            snapshot.restore()
        for state, attributes in self.states:
            state.__dict__.update(attributes)
        for container, content in self.state_contents:
            _refill(container, content)
        keras_seam.list_parameters_again(
            [
                keras_seam.StoredChange(layer, left, list(layer.variables))
                for layer, left in zip(self.targets, stored, strict=True)
            ]
        )


__all__ = ["become_all", "exchange", "swapped"]
