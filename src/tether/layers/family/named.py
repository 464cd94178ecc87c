"""The weights below a layer by names and patterns of paths, and which of them train."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import keras

from tether import keras_seam, patterns
from tether.errors import UnknownName
from tether.layers.tying import paths
from tether.layers.tying.state import View, shape_of, state_of
from tether.layers.tying.tie import tie, weights_of
from tether.patterns import Pattern
from tether.weights.expression import Expression, live_weights
from tether.weights.operators.choice import Adapted, adapted
from tether.weights.weight import Weight


@dataclass(frozen=True)
class Named:
    """One weight below a layer: its canonical path, and the path by the names that people gave to layers."""

    path: str
    name: str
    layer: keras.Layer
    variable: keras.Variable
    can_train: bool
    """Whether the layer made it to be trained: a kernel, not a moving mean."""
    frozen: bool
    """Whether it could train and did not, when it was looked at."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that was found."""
        return shape_of(self.variable)

    def fits(self, pattern: Pattern, words: Mapping[str, bool] | None = None) -> bool:
        """Whether a name or pattern of paths means it, or one of some more words that may stand for one."""
        known = paths.words_of(self.layer, self.variable)
        return patterns.fits(pattern, self.path, self.name, words={**known, **(words or {})})


def named_weights(root: keras.Layer) -> list[Named]:
    """The weights below a built layer, each once."""
    found: dict[int, Named] = {}
    for path, name, layer, variable in paths.walk(root):
        if id(variable) not in found:
            can_train, frozen = _training_state(layer, variable)
            found[id(variable)] = Named("/".join(path), "/".join(name), layer, variable, can_train, frozen)
    return list(found.values())


def names_apart(weights: Sequence[Named]) -> dict[str, str]:
    """What each weight is called, by its path: by the names of layers where these tell it from others, or its path."""
    counts = Counter(weight.name for weight in weights)
    return {weight.path: weight.name if counts[weight.name] == 1 else weight.path for weight in weights}


def select(root: keras.Layer, weights: list[Named], pattern: Pattern) -> list[Named]:
    """The weights that a name or pattern means: see `tether.patterns`.

    Raises:
        UnknownName: None.
    """
    found = [weight for weight in weights if weight.fits(pattern)]
    if not found and patterns.is_exact(pattern):
        place = paths.locate(root, paths.split(pattern))
        found = [weight for weight in weights if weight.variable is place.variable]
    if not found:
        missed = patterns.missed(pattern, (weight.name for weight in weights))
        raise UnknownName(f"No weight of {root.name!r} fits the pattern {_shown(pattern)}. {missed}")
    return found


Change = TypeVar("Change")


def select_all(root: keras.Layer, weights: list[Named], changes: Mapping[Any, Change]) -> list[tuple[Named, Change]]:
    """The weights that the names and patterns of changes mean, each with its change; a later pattern wins.

    Raises:
        UnknownName: A name or pattern means none.
    """
    by_path = {weight.path: weight for weight in weights}
    chosen = patterns.spread(changes, lambda pattern: [weight.path for weight in select(root, weights, pattern)])
    return [(by_path[path], change) for path, change in chosen.items()]


def _shown(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


# --------------------------------------------------------------------------- what trains


def frozen_weights(weights: list[Named]) -> set[str]:
    """The paths of the weights that could train and do not."""
    return {weight.path for weight in weights if weight.frozen}


def train_only(root: keras.Layer, weights: list[Named], learns: set[str], frozen: set[str]) -> None:
    """Sets the flags of layers so that weights learn in layers that were frozen; the rest of these is cut off.

    Args:
        root: The layer or model that the weights are below.
        weights: All its weights, as they were before ties.
        learns: The paths of those that learn.
        frozen: The paths of those that were frozen.
    """
    layers = {id(weight.layer): weight.layer for weight in weights}
    learning = {
        id(weight.layer)
        for weight in weights
        if weight.path in learns or (weight.can_train and weight.path not in frozen)
    }
    for layer in keras_seam.contained_layers(root):
        if isinstance(layer, Weight):
            continue
        if id(layer) in layers:
            flag = id(layer) in learning
            keras_seam.set_own_trainable_flag(layer, flag)
            for variable in paths.own_variables(layer):
                _set_variable_flag(layer, variable, flag)
        elif any(id(below) in learning for below in keras_seam.contained_layers(layer)):
            keras_seam.set_own_trainable_flag(layer, True)


def tie_what_learns(root: keras.Layer, ties: Mapping[str, Expression], weights: list[Named]) -> None:
    """Ties, and lets what is in the ties learn in layers that were frozen, without what was frozen there.

    Args:
        root: The layer or model.
        ties: Expressions by the weight's path.
        weights: All its weights, as they were before.
    """
    learns, frozen = {path for path, tied in ties.items() if live_weights(tied)}, frozen_weights(weights)
    if not learns:
        tie(root, ties)
        return
    # In the model's order, not the set's: it becomes that of PyTorch's parameters, the same in every process.
    still = weights_of(root, [w.path for w in weights if w.path in frozen and w.path not in ties])
    shielded = {path: _shielded(weight) for path, weight in still.items() if _would_train(weight)}
    tie(root, {**shielded, **ties})
    train_only(root, weights, learns, frozen)


def _would_train(expression: Expression) -> bool:
    return any(weight.trainable_flag for weight in live_weights(expression))


def _shielded(expression: Expression) -> Expression:
    """The same without a gradient; what has named parts keeps them, since they are known by what it is."""
    if not isinstance(expression, Adapted):
        return expression.stop_gradient()
    parts = {name: (strength, part.stop_gradient()) for name, (strength, part) in expression.parts.items()}
    return adapted(expression.base.stop_gradient(), parts, expression.order)


def layer_pairs(root: keras.Layer, source: keras.Layer) -> Iterator[tuple[keras.Layer, keras.Layer]]:
    """A layer, and all layers and weights below it, each beside what stands there in a layer that is made alike."""
    waiting, done = [(root, source)], set()
    while waiting:
        layer, other = waiting.pop()
        if layer is other or id(layer) in done or isinstance(layer, Weight) != isinstance(other, Weight):
            continue
        done.add(id(layer))
        yield layer, other
        below = dict(paths.children(other))
        waiting.extend((child, below[path]) for path, child in paths.children(layer) if path in below)


def take_flags(root: keras.Layer, source: keras.Layer) -> None:
    """Gives a layer, and all below it, the flags that those of another layer have, which is made alike.

    Keras writes a layer's flag into its config, but not the flags of what a layer makes itself, nor those of variables.
    """
    for layer, other in layer_pairs(root, source):
        if isinstance(layer, Weight):
            layer._trainable_flag, layer._container_flag = other._trainable_flag, other._container_flag
            layer.refresh()
            continue
        flag = keras_seam.own_trainable_flag(other)
        keras_seam.set_own_trainable_flag(layer, flag)
        their_names, names = paths.canonical_names(other), paths.canonical_names(layer)
        theirs = {their_names[id(variable)]: variable for variable in paths.own_variables(other)}
        for variable in paths.own_variables(layer):
            match = theirs.get(names[id(variable)])
            if match is not None:
                _take_variable_flag(variable, flag, *_training_state(other, match))
        state = state_of(layer)
        for penalty in state.penalties if state is not None else ():
            if penalty.recorder() is layer:
                penalty.follow(flag)


def _take_variable_flag(variable: keras.Variable, flag: bool, can_train: bool, frozen: bool) -> None:
    if can_train and isinstance(variable, View):
        variable.frozen = frozen and flag
        variable.follow(flag)
    elif can_train:
        variable.trainable = not frozen


def _set_variable_flag(layer: keras.Layer, variable: keras.Variable, flag: bool) -> None:
    if isinstance(variable, View):
        variable.follow(flag)
    elif any(variable is own for own in keras_seam.variable_lists(layer)["trainable_variables"]):
        variable.trainable = flag


def _training_state(layer: keras.Layer, variable: keras.Variable) -> tuple[bool, bool]:
    """Whether a weight could train, and whether it could and does not."""
    if isinstance(variable, View):
        return variable.slot_trainable, variable.slot_trainable and not variable.use.live
    own = keras_seam.variable_lists(layer)["trainable_variables"]
    can_train = any(variable is other for other in own)
    return can_train, can_train and not (variable.trainable and layer.trainable)
