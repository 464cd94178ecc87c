"""How the own variables of an extended layer are written and read: each one by name.

Many layers write by position, and only the variables that they know of. Here every own variable has an
entry under its name. The parent's own methods run too, on a store in their own format, because they may
do more than move values; what else they write is kept under the prefix `parent.`.

A load runs in a stateless scope before it changes anything. So it is known which variables got a value,
and a load that fails has changed none.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import ShapeMismatch, TetherError, received
from tether.layers import paths
from tether.layers.storage import FromFile
from tether.layers.view import View, shape_of, stored_variables

PREFIX = "parent."
Entries = dict[str, Any]
Method = Callable[[Any], None]


def keyed(layer: Any) -> Entries:
    """The layer's own variables by the key that each has in a file.

    It is the variable's name; where that was made up, or is not the only one of its kind, it is the
    attribute that holds the variable.
    """
    lists = keras_seam.variable_lists(layer).values()
    variables = list({id(variable): variable for each in lists for variable in each}.values())
    names = Counter(variable.name for variable in variables)
    found: Entries = {}
    for position, variable in enumerate(variables):
        key = variable.name
        if names[key] > 1 or keras_seam.is_automatic_variable_name(key):
            held = paths.holders(layer, variable)
            key = ".".join(held[0]) if held else f"variable.{position}"
        found[f"{key}.{position}" if key in found else key] = variable
    return found


def save(layer: Any, store: Any, parent_save: Method) -> None:
    """Writes every own variable, and what else the parent writes."""
    own = keyed(layer)
    for key, variable in own.items():
        store[key] = variable
    for key, value in _written(parent_save).items():
        if not any(value is variable for variable in own.values()) and not _is_derived(key, parent_save):
            store[PREFIX + key] = value


def load(layer: Any, store: Any, parent_save: Method, parent_load: Method, is_inherited: Callable[[Any], bool]) -> None:
    """Reads what `save` wrote, or what the class wrote when it was not extended.

    Raises:
        TetherError: The file lacks a value, or has one that the layer has no place for. Nothing is changed then.
    """
    own = keyed(layer)
    entries = {key: store[key] for key in list(store.keys())}
    named = {key: variable for key, variable in own.items() if key in entries}
    by_position = len(named) < len(own) and any(key.isdigit() for key in entries)
    if by_position:
        given, lists = _by_position(layer, own, entries, parent_save, is_inherited)
        used = set(given)
    else:
        _refuse_missing(layer, [key for key in own if key not in named], entries)
        given, lists = _by_name(layer, own, entries, parent_save)
        used = {key for key in entries if key.startswith(PREFIX)}
    _refuse_shapes(layer, named, entries)
    _refuse_unknown(layer, [key for key in entries if key not in named and key not in used])
    with keras.StatelessScope() as scope:
        with keras_seam.listed_variables(layer, lists):
            parent_load(given)
        for key, variable in named.items():
            variable.assign(entries[key])
        stored = {key: variable for key, variable in own.items() if not isinstance(variable, View)}
        missing = [key for key, variable in stored.items() if scope.get_current_value(variable) is None]
        _refuse_missing(layer, missing, entries)
    for variable in {id(each): each for v in own.values() for each in stored_variables(v)}.values():
        value = scope.get_current_value(variable)
        if value is not None:
            variable.assign(value)


# --------------------------------------------------------------------------- the parent's own format


def _written(parent_save: Method) -> Entries:
    """What the parent's own method writes: its keys, and the variables or arrays under them."""
    found: Entries = {}
    parent_save(found)
    return found


def _is_derived(key: str, parent_save: Method) -> bool:
    """Whether an entry that is no variable is computed from variables: Keras writes merged kernels by position."""
    method = inspect.unwrap(parent_save)
    return key.isdigit() and method.__module__.startswith("keras.")


def _listed(layer: Any, written: Entries) -> dict[str, list[Any]]:
    """The layer's own variables that the parent writes: it counts them, and must not meet the others."""
    ids = {id(value) for value in written.values()}
    lists = keras_seam.variable_lists(layer)
    return {store: [variable for variable in each if id(variable) in ids] for store, each in lists.items()}


def _by_name(layer: Any, own: Entries, entries: Entries, parent_save: Method) -> tuple[Entries, dict[str, list[Any]]]:
    """A store in the parent's format, made from a file that has every variable by name."""
    written = _written(parent_save)
    keys = {id(variable): key for key, variable in own.items()}
    given: Entries = {}
    for key, value in written.items():
        if id(value) in keys:
            given[key] = entries[keys[id(value)]]
        elif _is_derived(key, parent_save):
            given[key] = value
    extra = {key[len(PREFIX) :]: value for key, value in entries.items() if key.startswith(PREFIX)}
    return {**given, **extra}, _listed(layer, written)


def _by_position(
    layer: Any, own: Entries, entries: Entries, parent_save: Method, is_inherited: Callable[[Any], bool]
) -> tuple[Entries, dict[str, list[Any]]]:
    """A store in the parent's format, from a file that the class wrote when it was not extended."""
    everything = keras_seam.variable_lists(layer)
    inherited = {store: [v for v in variables if is_inherited(v)] for store, variables in everything.items()}
    positions = {key for key in entries if key.isdigit()}
    for lists in (everything, inherited):
        with keras_seam.listed_variables(layer, lists):
            written = _written(parent_save)
        if {key for key in written if key.isdigit()} == positions:
            break
    else:
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}): the file has {len(positions)} values by position, and "
            f"the layer has {len(own)} weights: {', '.join(own)}. Expected: a file of this class, with the same "
            f"arguments. {received(keys=sorted(entries))}"
        )
    given: Entries = {}
    for key in (key for key in written if key in entries):
        view = isinstance(written[key], View) and not isinstance(entries[key], FromFile)
        given[key] = FromFile(entries[key]) if view else entries[key]
    return given, _listed(layer, written)


# --------------------------------------------------------------------------- what is refused


def _refuse_missing(layer: Any, missing: list[str], entries: Entries) -> None:
    if missing:
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}): the file holds no value for {', '.join(missing)}; nothing "
            "was loaded. Expected: a file that the extended class wrote, or one of the class before it was extended "
            "that has all its values. To keep the start values of the new weights, load the file into a layer of the "
            "parent's class and assign its values: `layer.bias.assign(parent.bias)`. "
            f"{received(keys=sorted(entries))}"
        )


def _refuse_unknown(layer: Any, unknown: list[str]) -> None:
    if not unknown:
        return
    written: Entries = {}
    layer.save_own_variables(written)  # the user's class may write more than its variables
    unknown = [key for key in unknown if key not in written]
    if unknown:
        hint = "" if layer.built else " The layer is not built: build it first, or load a model with its config."
        raise TetherError(
            f"Layer {layer.name!r} ({type(layer).__name__}) has no weight for what the file holds under "
            f"{', '.join(map(repr, unknown))}; nothing was loaded. It has: {', '.join(keyed(layer)) or 'no weights'}."
            f"{hint} Expected: a file of this class, with the same arguments."
        )


def _refuse_shapes(layer: Any, named: Entries, entries: Entries) -> None:
    for key, variable in named.items():
        shape = shape_of(variable)
        if not isinstance(variable, View) and tuple(np.shape(entries[key])) != shape:
            raise ShapeMismatch(
                f"The weight {key!r} of layer {layer.name!r} ({type(layer).__name__}) has shape {shape}; nothing was "
                f"loaded. {received(shape=tuple(np.shape(entries[key])))}"
            )
