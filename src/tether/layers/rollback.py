"""Undoing a tie that failed half way: every object it touched is put back as it was."""

from __future__ import annotations

import itertools
from typing import Any

from tether import keras_seam
from tether.layers.state import STATE, weights_below
from tether.weights.weight import Weight


class _Snapshot:
    """An object's class, attributes, and the contents of the containers that they hold."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.cls = type(target)
        self.attributes = dict(vars(target))
        self.contents: list[tuple[Any, Any]] = []
        self._keep_contents(self.attributes.values())
        self.flags: list[tuple[Any, bool, Any, Any]] = []
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

    def _keep_flags(self, variable: Any) -> None:
        self.flags.append((variable, variable.trainable, variable.regularizer, variable.constraint))

    def _keep_contents(self, values: Any) -> None:
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


def _refill(container: Any, content: Any) -> None:
    """Puts a container's contents back without going through its own, tracking methods."""
    container = getattr(container, "__wrapped__", container)  # TensorFlow wraps the dicts of a model
    if isinstance(container, list):
        list.clear(container)
        list.extend(container, content)
    elif isinstance(container, dict):
        listed = keras_seam.only_parameters(container)
        dict.clear(container)
        dict.update(container, {**content, **listed})
    else:
        set.clear(container)
        set.update(container, content)


class Rollback:
    """Restores layers and weights if the block raises."""

    def __init__(self, targets: list[Any]) -> None:
        self.targets = targets

    @classmethod
    def below(cls, layer: Any) -> Rollback:
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

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
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
                keras_seam.Change(layer, left, list(layer.variables))
                for layer, left in zip(self.targets, stored, strict=True)
            ]
        )
