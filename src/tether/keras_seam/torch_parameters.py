"""What PyTorch knows of a layer's variables: the parameters that modules list.

On the PyTorch backend Keras gives each module a list of the parameters of all layers below it, when the module is
built. `parameters()`, `state_dict()` and PyTorch's optimizers read these lists. A layer does not know the modules
around it, so those that have to follow a change are found by who refers to a parameter, and remembered.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import backend as _backend

from tether.keras_seam import census
from tether.keras_seam.layers import contained_layers
from tether.keras_seam.variables import numbered
from tether.types import Config

LIST = "_torch_params"
LISTS_PARAMETERS = _backend.backend() == "torch"
"""Whether modules list parameters: whether anybody has to be told of a change."""


@dataclass(frozen=True)
class StoredChange:
    """What a layer stored before a change and stores after it, as Keras variables."""

    layer: keras.Layer
    before: Sequence[Any]
    after: Sequence[Any]


def list_parameters_again(changes: Iterable[StoredChange]) -> None:
    """Makes `parameters()` of each changed layer, and of every module around one, exactly what is stored in it."""
    if not LISTS_PARAMETERS:
        return
    changes = list(changes)
    for change in changes:
        if LIST in change.layer._modules:  # Keras has taken what it no longer tracks off the layer's own list
            change.layer._track_variables()
            _note(change.layer)
        for variable in change.before:
            if not _paths_of(variable, _parameters(change.layer)):
                _listing_of(variable).discard(change.layer)
    changed = [change for change in changes if set(map(id, change.before)) != set(map(id, change.after))]
    _find_modules([variable for change in changed for variable in change.before])
    stored: dict[int, set[int]] = {}
    for change in changed:
        for module in [module for module in _may_follow(change) if _contains(module, change.layer)]:
            if id(module) not in stored:
                stored[id(module)] = set(map(id, module.variables))
            _list_again(module, change, stored[id(module)])


def without_parameters(modules: dict[Any, Any]) -> dict[Any, Any]:
    """A copy of a module's parts by name (of any dict), without its list of parameters: that is always made anew."""
    return {key: value for key, value in modules.items() if key != LIST}


def only_parameters(modules: dict[Any, Any]) -> dict[Any, Any]:
    """The list of parameters alone: what `without_parameters` leaves out."""
    return {key: value for key, value in modules.items() if key == LIST}


_modules: weakref.WeakSet[Any] = weakref.WeakSet()
"""The modules that are known to list parameters."""
_listing: dict[int, weakref.WeakSet[Any]] = {}
"""Those that list each parameter, by its id."""
_below: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
"""The layers below a module, by id, as they were last found."""


def _note(module: keras.Layer) -> None:
    _modules.add(module)
    for parameter in _parameters(module).values():
        _listing.setdefault(id(parameter), weakref.WeakSet()).add(module)


def _listing_of(variable: keras.Variable) -> weakref.WeakSet[Any]:
    return _listing.get(id(variable._value), weakref.WeakSet())


def _may_follow(change: StoredChange) -> list[Any]:
    """The modules that may have to follow a change: those that list what the layer stored; any, if that is nothing."""
    if not change.before:
        return [module for module in _modules if module is not change.layer]
    found = {id(module): module for variable in change.before for module in _listing_of(variable)}
    return [module for module in found.values() if module is not change.layer]


def _parameters(module: keras.Layer) -> dict[str, Any]:
    """The parameters that a module lists, by path."""
    listed = module._modules.get(LIST)
    found: dict[str, Any] = {} if listed is None else listed._parameters
    return found


def _find_modules(variables: Sequence[keras.Variable]) -> None:
    """Looks for modules that list one of these parameters, unless all who refer to them are known."""
    if any(variable._value is not None and _is_held_by_others(variable) for variable in variables):
        census.find_new()
        _listing.clear()
        for layer in census.layers():
            if LIST in vars(layer).get("_modules", ()):
                _note(layer)


def _is_held_by_others(variable: keras.Variable) -> bool:
    """Whether more refer to a parameter than its variable and the modules that are known to list it."""
    return sys.getrefcount(variable._value) > len(_listing_of(variable)) + 2  # the variable, and the one passed here


def _contains(module: keras.Layer, layer: keras.Layer) -> bool:
    """Whether a layer is below a module. What was found before is looked at again only where it may have grown."""
    if not module._layers:
        return False
    known = _below.get(module)
    if known is None or id(layer) not in known:
        if known is not None and not _lists_any(module, layer):
            return False
        known = _below[module] = set(map(id, contained_layers(module)))
    return id(layer) in known


def _lists_any(module: keras.Layer, layer: keras.Layer) -> bool:
    listed = _parameters(module)
    return any(listed.get(variable.path) is variable._value for variable in layer.variables)


def _list_again(module: keras.Layer, change: StoredChange, stored: set[int]) -> None:
    """Lists what a module stores, given the ids of that, and no more what it no longer does."""
    parameters, listed = _parameters(module), module._modules[LIST]
    for variable in change.before:
        if id(variable) not in stored:
            for path in _paths_of(variable, parameters):
                del listed[path]
            _listing_of(variable).discard(module)
    for variable in change.after:
        if not _paths_of(variable, parameters):
            listed[numbered(variable.path, parameters)] = variable._value
            _listing.setdefault(id(variable._value), weakref.WeakSet()).add(module)


def _paths_of(variable: keras.Variable, parameters: Config) -> list[str]:
    """The paths under which a parameter is listed: as a rule its own, or with a number."""
    if parameters.get(variable.path) is variable._value:
        return [variable.path]
    if variable.path not in parameters:
        return []
    return [path for path, value in parameters.items() if value is variable._value]
