"""The facts of a live model. No value is read but the strengths of adapters, so nothing is copied."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from tether import keras_seam, patterns
from tether.inspection.adapted import Adapters
from tether.inspection.facts import Facts, Slot, StoredWeight, UseOf
from tether.layers.tying import paths
from tether.layers.tying.paths import holders
from tether.layers.tying.state import shape_of, slots_of, stored_variables
from tether.layers.tying.tied import base_class
from tether.patterns import Pattern
from tether.types import Config, Tensor
from tether.weights.algebra import is_kept_still
from tether.weights.expression import Stored
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- the facts of a model


OPTIMIZER = "optimizer/"
"""What the places of an optimizer's variables begin with."""
UNSAVED = "!"
"""What the places of weights begin with that no file of the model would hold."""


def own_entries_of(saveable: object) -> Config:
    """What a saved object writes of its own, by key: variables as they are, nothing converted.

    An array that it makes for the file stands for the variable of its own that it was made from, if there is one
    of its shape that is not written otherwise.
    """
    if isinstance(saveable, keras.optimizers.Optimizer):  # whose own method copies them
        return {str(number): variable for number, variable in enumerate(saveable.variables)}
    store: dict[str, Any] = {}
    save = getattr(saveable, "save_own_variables", None)
    if save is not None:
        with contextlib.suppress(Exception):  # a layer that was not built as its class wants it cannot be saved
            save(store)
    found = {key: value for key, value in store.items() if hasattr(value, "shape")}
    made = [key for key, value in found.items() if not isinstance(value, keras.Variable)]
    if made and isinstance(saveable, keras.layers.Layer):
        written = {id(value) for value in found.values()}
        own = [v for listed in keras_seam.variable_lists(saveable).values() for v in listed if id(v) not in written]
        for key in made:
            same = next((v for v in own if shape_of(v) == shape_of(found[key])), None)
            if same is not None:
                found[key] = same
                own = [variable for variable in own if variable is not same]
    return found


def live_facts(model: object) -> Facts:
    """The facts of a model or layer."""
    objects = list(keras_seam.saved_objects(model))
    names = {place: saveable.name for place, saveable in objects if isinstance(saveable, keras.layers.Layer)}
    variables: dict[str, keras.Variable] = {}
    places: dict[int, list[str]] = {}
    state: set[str] = set()
    for place, saveable in objects:
        for key, value in own_entries_of(saveable).items():
            entry = f"{place}/vars/{key}" if place else f"vars/{key}"
            variables[entry] = value
            places.setdefault(id(value), []).append(entry)
            if not isinstance(saveable, keras.layers.Layer) or not isinstance(value, keras.Variable):
                state.add(entry)
    for variable in getattr(model, "weights", ()):
        if id(variable) not in places:
            entry = f"{UNSAVED}{variable.path}"
            variables[entry], places[id(variable)] = variable, [entry]
    at = {id(saveable): place for place, saveable in objects}
    layers = [layer for layer in _in_order(model) if not isinstance(layer, Weight)]
    uses: list[UseOf] = []
    kinds: dict[str, str] = {}
    adapters = Adapters()
    for layer in layers:
        path = layer_path(at[id(layer)], names) if id(layer) in at else layer.name
        kind = base_class(type(layer)).__name__
        found = [*_uses(layer, path, kind, places), *_held_uses(layer, path, kind, places)]
        uses += found
        if found:
            kinds.setdefault(path, kind)
        for slot in slots_of(layer):
            adapters.see(f"{path}/{slot.view.use.name}" if path else slot.view.use.name, slot.view.expression)
    weights = tuple(_weights(variables, places, state))

    def place_of(weight: Stored) -> str | None:
        return next(iter(places.get(id(weight.variable), ())), None) if weight.is_built else None

    return Facts(
        name=getattr(model, "name", type(model).__name__),
        weights=weights,
        uses=tuple(uses),
        optimizer=tuple(_slots(getattr(model, "optimizer", None), variables, places)),
        layers=tuple(kinds.items()),
        adapters=adapters.found(weights, place_of, values=True),
    )


def _weights(
    variables: dict[str, keras.Variable], places: dict[int, list[str]], state: set[str]
) -> Iterator[StoredWeight]:
    for entry, value in variables.items():
        first, *again = places[id(value)]
        if entry == first and not entry.startswith(OPTIMIZER):
            yield StoredWeight(
                entry,
                shape_of(value),
                _dtype(value),
                path=getattr(value, "path", None),
                trainable=getattr(value, "trainable", None),
                again=tuple(again),
                state=entry in state,
            )


def _in_order(model: keras.Layer) -> list[keras.Layer]:
    """The layers of a model, each once, a layer before its parts, and these as they were made."""
    found: dict[int, keras.Layer] = {}
    stack = [model]
    while stack:
        layer = stack.pop()
        if id(layer) not in found:
            found[id(layer)] = layer
            graph = isinstance(layer, (keras_seam.Functional, keras_seam.Sequential))
            stack += reversed([*(layer.layers if graph else ()), *keras_seam.sublayers(layer)])
    return list(found.values())


def layer_path(place: str, names: dict[str, str]) -> str:
    """The names of the layers around a place of the file and of the one at it, without the model's own."""
    parts = place.split("/")
    above = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
    return "/".join(names[prefix] for prefix in above if prefix in names)


def _held_uses(layer: keras.Layer, path: str, kind: str, places: dict[int, list[str]]) -> Iterator[UseOf]:
    """The uses of weights that a layer of somebody's own holds as attributes, to read them in its `call`.

    A layer that holds a weight to tie it to itself or to layers below does not read it.
    """
    held = [weight for weight in keras_seam.sublayers(layer) if isinstance(weight, Weight) and weight.is_built]
    attributes = [(weight, found[0]) for weight in held if (found := holders(layer, weight))]
    below = {id(other) for other in keras_seam.contained_layers(layer)} if attributes else set()
    for weight, attribute in attributes:
        variable = weight.variable
        if id(variable) in places and not any(id(use.layer()) in below for use in weight.uses):
            yield UseOf(
                layer=path,
                attribute="/".join(attribute),
                expression=weight.notation(),
                weights=tuple(places[id(variable)][:1]),
                shape=shape_of(variable),
                dtype=_dtype(variable),
                kind=kind,
                trains=bool(variable.trainable),
            )


def _uses(layer: keras.Layer, path: str, kind: str, places: dict[int, list[str]]) -> list[UseOf]:
    slots = slots_of(layer)
    lists = keras_seam.variable_lists(layer)
    found: list[tuple[str, int, UseOf]] = []
    for slot in slots:
        view = slot.view
        reads = dict.fromkeys(place for v in stored_variables(view) for place in places.get(id(v), ())[:1])
        stopped = [w.variable for w in view.expression.weights_used() if w.is_built and not view.use.reaches(w)]
        use = UseOf(
            layer=path,
            attribute=view.use.name,
            expression=view.expression.notation(),
            weights=tuple(reads),
            shape=shape_of(view),
            dtype=keras_seam.stored_dtype(view),
            kind=kind,
            tied=True,
            trains=any(view.use.reaches(weight) and weight.trainable for weight in view.expression.weights_used()),
            stopped=tuple(place for variable in stopped for place in places.get(id(variable), ())[:1]),
            kept_still=is_kept_still(view.expression),
        )
        found.append((slot.store, slot.index, use))
    for store in keras_seam.STORES:
        taken = {index for other, index, _ in found if other == store}
        free = (index for index in range(len(lists[store]) + len(taken)) if index not in taken)
        for index, variable in zip(free, lists[store], strict=False):
            if id(variable) in places:
                use = UseOf(
                    layer=path,
                    attribute=variable.name,
                    expression=None,
                    weights=tuple(places[id(variable)][:1]),
                    shape=shape_of(variable),
                    dtype=_dtype(variable),
                    kind=kind,
                    trains=bool(variable.trainable),
                )
                found.append((store, index, use))
    return [use for _, _, use in sorted(found, key=lambda entry: (keras_seam.STORES.index(entry[0]), entry[1]))]


def _slots(
    optimizer: keras.Optimizer, variables: dict[str, keras.Variable], places: dict[int, list[str]]
) -> list[Slot]:
    if optimizer is None:
        return []
    owners = {
        id(slot): (name, variable)
        for variable, slots in keras_seam.optimizer_slots(optimizer).items()
        for name, slot in slots
    }
    found = []
    for place, value in variables.items():
        first, *again = places[id(value)]
        if place == first and place.startswith(OPTIMIZER):
            name, owner = owners.get(id(value), (getattr(value, "name", None), None))
            weight = next(iter(places.get(owner, ())), None) if owner is not None else None
            found.append(Slot(place, shape_of(value), _dtype(value), name=name, weight=weight, again=tuple(again)))
    return found


def _dtype(value: keras.Variable | Tensor) -> str:
    """The dtype of what is stored, as a file has it."""
    if isinstance(value, keras.Variable):
        return keras_seam.held_dtype(value)
    return str(keras.backend.standardize_dtype(value.dtype))


# --------------------------------------------------------------------------- aliases
# Every name of a stored weight: its own path, and the path of each use.


_SHELL = re.compile(r"!?(?=.*[*?\[])(?!.*\.\*)[^^$|\\+(){}]*")
"""A string that is a shell pattern, and no regular expression."""


class Aliases(Mapping[str, tuple[str, ...]]):
    """The names of each stored variable, by its path; `find` searches all of them."""

    def __init__(
        self, names: dict[str, tuple[str, ...]], variables: dict[str, keras.Variable], linear: set[str]
    ) -> None:
        self._names = names
        self._variables = variables
        self._linear = linear

    def __getitem__(self, path: str) -> tuple[str, ...]:
        return self._names[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def find(self, pattern: Pattern) -> list[keras.Variable]:
        """The stored variables of which some name fits a pattern (`tether.patterns`).

        `"all-linear"` means all that kernels of Dense and EinsumDense are made of.
        A string without `*`, `?` and `[`, or with signs that only regular expressions have, is searched for as one,
        at any place of the name, as an optimizer's `exclude_from_weight_decay` does.
        """
        if isinstance(pattern, str) and pattern != patterns.ALL_LINEAR and not _SHELL.fullmatch(pattern):
            search = re.compile(pattern).search
            return [self._variables[path] for path, names in self._names.items() if any(map(search, names))]
        return [
            self._variables[path]
            for path, names in self._names.items()
            if patterns.fits(pattern, *names, words={patterns.ALL_LINEAR: path in self._linear})
        ]

    def __repr__(self) -> str:
        return f"Aliases({self._names!r})"


def unique_paths(model: keras.Layer) -> dict[int, str]:
    """The path of each stored variable by its id; where several have one, the later ones with a number."""
    found: dict[int, str] = {}
    taken: set[str] = set()
    for variable in model.weights:
        found[id(variable)] = keras_seam.numbered(variable.path, taken)
        taken.add(found[id(variable)])
    return found


def aliases(model: keras.Layer) -> Aliases:
    """Every name under which a model's stored variables are known.

    An optimizer or a layout map that goes by names sees only the path of the stored variable. A user of
    it has a path too.

    Args:
        model: A layer or model.

    Returns:
        A mapping from the path of each stored variable to all its names, its own first. Where several of the model have
        one path, the later ones have it with a number.

    Example:
    ```python
    optimizer = keras.optimizers.AdamW(weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_list=tether.inspection.aliases(model).find("head"))
    ```
    """
    keys = unique_paths(model)
    variables = {keys[id(variable)]: variable for variable in model.weights}
    names = {key: {key: None} for key in variables}
    linear: set[str] = set()
    for layer in keras_seam.contained_layers(model):
        for slot in slots_of(layer):
            for stored in stored_variables(slot.view):
                if id(stored) in keys:
                    names[keys[id(stored)]][slot.view.path] = None
        for variable in paths.own_variables(layer):
            if paths.words_of(layer, variable)[patterns.ALL_LINEAR]:
                linear.update(keys[id(stored)] for stored in stored_variables(variable) if id(stored) in keys)
    return Aliases({path: tuple(found) for path, found in names.items()}, variables, linear)


# --------------------------------------------------------------------------- unique
# Each stored variable once: what an optimizer has to be given.


def unique(variables: Iterable[keras.Variable]) -> list[keras.Variable]:
    """The stored variables of a list, each once, in the order in which they first appear.

    `a.trainable_weights + b.trainable_weights` lists a shared weight twice, and an optimizer that is
    given that list steps it twice. A view stands for the stored variables of its expression.

    Args:
        variables: Keras variables, possibly repeated.

    Returns:
        The variables that are stored, each once.

    Example:
    ```python
    w = tether.Weight(name="w")
    a, b = (tether.tie(keras.layers.Dense(4), kernel=w) for _ in range(2))
    for dense in (a, b):
        dense.build((None, 8))
    variables = tether.inspection.unique(a.trainable_weights + b.trainable_weights)
    assert len(variables) == 3
    ```
    """
    found: dict[int, keras.Variable] = {}
    for variable in variables:
        for stored in stored_variables(variable):
            found.setdefault(id(stored), stored)
    return list(found.values())
