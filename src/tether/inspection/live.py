"""The facts of a live model. No value is read, so nothing is copied."""

from __future__ import annotations

from typing import Any

import keras

from tether import keras_seam
from tether.inspection.facts import Facts, Slot, StoredWeight, UseOf
from tether.layers.state import WEIGHTS, state_of
from tether.layers.tied import base_class
from tether.layers.view import shape_of, stored_variables
from tether.weights.weight import Weight

OPTIMIZER = "optimizer/"
"""What the places of an optimizer's variables begin with."""
UNSAVED = "!"
"""What the places of weights begin with that no file of the model would hold."""


class _Entries(dict[str, Any]):
    """A store that keeps the variables that are written into it."""


def entries(saveable: Any) -> dict[str, Any]:
    """What a saved object writes of its own, by key: variables as they are, nothing converted."""
    if isinstance(saveable, keras.optimizers.Optimizer):  # whose own method copies them
        return {str(number): variable for number, variable in enumerate(saveable.variables)}
    store = _Entries()
    save = getattr(saveable, "save_own_variables", None)
    if save is not None:
        save(store)
    return {key: value for key, value in store.items() if hasattr(value, "shape")}


def live_facts(model: Any) -> Facts:
    """The facts of a model or layer."""
    objects = list(keras_seam.saved_objects(model))
    names = {place: saveable.name for place, saveable in objects if isinstance(saveable, keras.layers.Layer)}
    variables: dict[str, Any] = {}
    places: dict[int, list[str]] = {}
    state: set[str] = set()
    for place, saveable in objects:
        for key, value in entries(saveable).items():
            entry = f"{place}/vars/{key}" if place else f"vars/{key}"
            variables[entry] = value
            places.setdefault(id(value), []).append(entry)
            if not isinstance(saveable, keras.layers.Layer):
                state.add(entry)
    for variable in getattr(model, "weights", ()):
        if id(variable) not in places:
            entry = f"{UNSAVED}{variable.path}"
            variables[entry], places[id(variable)] = variable, [entry]
    weights = []
    for entry, value in variables.items():
        first, *again = places[id(value)]
        if entry == first and not entry.startswith(OPTIMIZER):
            weight = StoredWeight(
                entry,
                shape_of(value),
                _dtype(value),
                path=getattr(value, "path", None),
                trainable=getattr(value, "trainable", None),
                again=tuple(again),
                state=entry in state,
            )
            weights.append(weight)
    at = {id(saveable): place for place, saveable in objects}
    uses: list[UseOf] = []
    layers: dict[str, str] = {}
    for layer in keras_seam.contained_layers(model):
        place = at.get(id(layer), f"{UNSAVED}{layer.name}")
        found = (
            _weight_use(layer, place, names, places)
            if isinstance(layer, Weight)
            else _uses(layer, place, names, places)
        )
        uses += found
        if found and not isinstance(layer, Weight):
            layers[found[0].layer] = found[0].kind or ""
    return Facts(
        name=getattr(model, "name", type(model).__name__),
        weights=tuple(weights),
        uses=tuple(uses),
        optimizer=tuple(_slots(getattr(model, "optimizer", None), variables, places)),
        layers=tuple(layers.items()),
    )


def _in_order(model: Any) -> list[Any]:
    """The layers of a model, each once, a layer before its parts, and these as they were made."""
    found: dict[int, Any] = {}
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


def _weight_use(weight: Weight, place: str, names: dict[str, str], places: dict[int, list[str]]) -> list[UseOf]:
    """The use of a weight that a layer holds as an attribute of its own, to read it in its `call`."""
    holder, _, attribute = place.rpartition("/")
    if not weight.is_built or WEIGHTS in place.split("/") or place.startswith(UNSAVED):
        return []
    return [
        UseOf(
            layer=layer_path(holder, names),
            attribute=attribute,
            expression=weight.notation(),
            weights=tuple(places[id(weight.variable)][:1]),
            shape=shape_of(weight.variable),
            dtype=_dtype(weight.variable),
            trains=bool(weight.variable.trainable),
        )
    ]


def _uses(layer: Any, place: str, names: dict[str, str], places: dict[int, list[str]]) -> list[UseOf]:
    path = layer.name if place.startswith(UNSAVED) else layer_path(place, names)
    state = state_of(layer)
    kind = base_class(type(layer)).__name__
    slots = [] if state is None else state.slots
    lists = keras_seam.variable_lists(layer)
    found: list[tuple[str, int, UseOf]] = []
    for slot in slots:
        view = slot.view
        reads = dict.fromkeys(place for v in stored_variables(view) for place in places.get(id(v), ())[:1])
        use = UseOf(
            layer=path,
            attribute=view.use.name,
            expression=view.expression.notation(),
            weights=tuple(reads),
            shape=shape_of(view),
            dtype=keras_seam.stored_dtype(view),
            kind=kind,
            tied=True,
            trains=view.use.live and any(variable.trainable for variable in stored_variables(view)),
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
                    dtype=keras_seam.stored_dtype(variable),
                    kind=kind,
                    trains=bool(variable.trainable),
                )
                found.append((store, index, use))
    return [use for _, _, use in sorted(found, key=lambda entry: (keras_seam.STORES.index(entry[0]), entry[1]))]


def _slots(optimizer: Any, variables: dict[str, Any], places: dict[int, list[str]]) -> list[Slot]:
    if optimizer is None or not optimizer.built:
        return []
    owners = {
        id(slot): (name, variable)
        for variable, slots in keras_seam.optimizer_slots(optimizer).items()
        for name, slot in slots
    }
    found = []
    for place, value in variables.items():
        if place.startswith(OPTIMIZER):
            name, owner = owners.get(id(value), (getattr(value, "name", None), None))
            first = next(iter(places.get(owner, ())), None) if owner is not None else None
            found.append(Slot(place, shape_of(value), _dtype(value), name=name, weight=first))
    return found


def _dtype(value: Any) -> str:
    if isinstance(value, keras.Variable):
        return keras_seam.stored_dtype(value)
    return str(keras.backend.standardize_dtype(value.dtype))
