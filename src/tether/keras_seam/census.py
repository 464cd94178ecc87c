"""Which layers and optimizers are alive in the process.

Keras keeps no list of them, and a layer does not know what is around it. Who changes a layer that is built has to find
the models that contain it: the training functions that were traced (`training`), and on PyTorch the lists of parameters
(below). Going through memory takes a tenth of a second in a large process, so it is done only if there is
something that has not been seen. That is read off, which takes no time: Keras makes functions of its own for each layer
and each optimizer, and a function holds its code, so the references to the code say how many such functions are alive.
Those that are known are held weakly: they die with what they were made for.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TypeVar

import keras
from keras import backend as _backend

from tether.keras_seam.frames import OF_LAYERS, methods, nested
from tether.keras_seam.layers import contained_layers
from tether.keras_seam.variables import numbered
from tether.types import Function, Tensor

# --------------------------------------------------------------------------- what is alive


_OF_OPTIMIZERS = nested(*methods(keras.optimizers.Optimizer, "__init__"))
_AT_A_TIME = 20_000
"""Objects that are looked at before it is asked whether all have been seen."""

_layers: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
_optimizers: weakref.WeakSet[keras.Optimizer] = weakref.WeakSet()
"""What has been seen, of what is alive."""
_orphans: dict[int, weakref.WeakSet[FunctionType]] = {}
"""Functions made for something that nobody finds, by the ids of their codes: it is gone, and a part of it is held."""


def _makes_one() -> Callable[[], None]:
    return lambda: None


_OF_NOBODY = nested(_makes_one)


def alive(codes: tuple[CodeType, ...]) -> int:
    """How many are alive of the function of which most are, of those with these codes."""
    (none,) = map(sys.getrefcount, _OF_NOBODY)
    return max(map(sys.getrefcount, codes)) - none if codes else sys.maxsize


def has_optimizers() -> bool:
    """Whether there is any optimizer."""
    return alive(_OF_OPTIMIZERS) > 0


def has_new_optimizers() -> bool:
    """Whether there is an optimizer that has not been seen."""
    return alive(_OF_OPTIMIZERS) > len(_optimizers) + _count_orphans(_OF_OPTIMIZERS)


def _count_orphans(codes: tuple[CodeType, ...]) -> int:
    return max((len(_orphans.get(id(code), ())) for code in codes), default=0) if _orphans else 0


def see(*found: object) -> None:
    """Counts layers and optimizers as seen, and tells who wants to know of each model."""
    for one in found:
        if isinstance(one, keras.optimizers.Optimizer):
            _optimizers.add(one)
        elif isinstance(one, keras.layers.Layer) and one not in _layers:
            _layers.add(one)
            if isinstance(one, keras.Model):
                for tell in told_of_models:
                    tell(one)


told_of_models: list[Callable[[keras.Model], None]] = []
"""What is called with each model that is seen for the first time."""


def layers() -> list[keras.Layer]:
    """The layers that have been seen."""
    return list(_layers)


class _Mark:
    """What is older than it had been looked at when it was made, or there was nothing to look for."""


_mark: _Mark | None = None
_YOUNG = (0,) if sys.version_info >= (3, 14) else (0, 1)
"""The generations of the garbage collector that a new object is in, until the collector has gone by."""


def find_new() -> None:
    """Sees the layers and optimizers that have not been seen.

    What was made since the last time is most often young. Not all can be found: something else than a function may hold
    the code, such as a traceback. So that all memory is not gone through again and again for it, a mark is left: as
    long as that is young, so is all that was made since; and as long as it is not frozen (`gc.freeze` puts objects
    where nobody finds them), nothing was frozen since.
    """
    global _mark
    mark = _Mark()
    if _is_something_new():
        young = [one for generation in _YOUNG for one in gc.get_objects(generation)]
        if not _see_all(young) and not _holds_mark(young):
            everything = gc.get_objects()
            if not _account_for(everything) and not _holds_mark(everything) and gc.get_freeze_count():
                gc.unfreeze()
                _account_for(gc.get_objects())
                gc.freeze()
                mark = _Mark()  # the other is frozen now
    _mark = mark


def _holds_mark(objects: Sequence[object]) -> bool:
    return _mark is not None and any(one is _mark for one in objects)


def _see_all(objects: Sequence[object]) -> bool:
    """Looks at objects, the last first, until all layers and optimizers have been seen; `False` if some were not."""
    wanted = _with_subclasses(keras.layers.Layer) | _with_subclasses(keras.optimizers.Optimizer)
    for end in range(len(objects), 0, -_AT_A_TIME):
        part = objects[max(end - _AT_A_TIME, 0) : end]
        see(*itertools.compress(part, map(wanted.__contains__, map(type, part))))
        if not _is_something_new():
            return True
    return False


def _account_for(everything: Sequence[object]) -> bool:
    """Sees what is alive, and notes the functions that are left then: so many more than layers and optimizers.

    `False` if even so there is more than was found.
    """
    if _see_all(everything):
        return True
    codes = {id(code) for code in (*OF_LAYERS, *_OF_OPTIMIZERS)}
    functions = [one for one in everything if type(one) is FunctionType and id(one.__code__) in codes]
    owned = {id(test) for one in (*_layers, *_optimizers) for test in _tests_of(one)}
    for function in functions:
        of_code = _orphans.setdefault(id(function.__code__), weakref.WeakSet())
        (of_code.discard if id(function) in owned else of_code.add)(function)
    return not _is_something_new()


def _tests_of(one: keras.Layer | keras.Optimizer) -> list[Function]:
    """The functions by which a layer or optimizer sorts its attributes."""
    tracker = vars(one).get("_tracker")
    tests = [test for test, _ in tracker.config.values()] if tracker is not None else []
    return [getattr(test, "original", test) for test in tests]


def _is_something_new() -> bool:
    return has_new_optimizers() or alive(OF_LAYERS) > len(_layers) + _count_orphans(OF_LAYERS)


def _with_subclasses(cls: type) -> set[type]:
    found = {cls}
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        found |= _with_subclasses(child)
    return found


# --------------------------------------------------------------------------- who lists a parameter
# What PyTorch knows of a layer's variables: the parameters that modules list.
#
# On the PyTorch backend Keras gives each module a list of the parameters of all layers below it, when the module is
# built. `parameters()`, `state_dict()` and PyTorch's optimizers read these lists. A layer does not know the modules
# around it, so those that have to follow a change are found by who refers to a parameter, and remembered.


LIST = "_torch_params"
LISTS_PARAMETERS = _backend.backend() == "torch"
"""Whether modules list parameters: whether anybody has to be told of a change."""


@dataclass(frozen=True)
class StoredChange:
    """What a layer stored before a change and stores after it, as Keras variables."""

    layer: keras.Layer
    before: Sequence[keras.Variable]
    after: Sequence[keras.Variable]


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


Key = TypeVar("Key")
Value = TypeVar("Value")


def without_parameters(modules: dict[Key, Value]) -> dict[Key, Value]:
    """A copy of a module's parts by name (of any dict), without its list of parameters: that is always made anew."""
    return {key: value for key, value in modules.items() if key != LIST}


def only_parameters(modules: dict[Key, Value]) -> dict[Key, Value]:
    """The list of parameters alone: what `without_parameters` leaves out."""
    return {key: value for key, value in modules.items() if key == LIST}


_modules: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
"""The modules that are known to list parameters."""
_listing: dict[int, weakref.WeakSet[keras.Layer]] = {}
"""Those that list each parameter, by its id."""
_below: weakref.WeakKeyDictionary[keras.Layer, set[int]] = weakref.WeakKeyDictionary()
"""The layers below a module, by id, as they were last found."""


def listings(variables: Sequence[keras.Variable]) -> dict[int, list[tuple[keras.Layer, str]]]:
    """The modules that list the parameter of each variable, and under which key, by the variable's id."""
    find_new()
    wanted = {id(variable._value): id(variable) for variable in variables}
    found: dict[int, list[tuple[keras.Layer, str]]] = {id(variable): [] for variable in variables}
    for layer in layers():
        if LIST in vars(layer).get("_modules", ()):
            for key, parameter in _parameters(layer).items():
                if id(parameter) in wanted:
                    found[wanted[id(parameter)]].append((layer, key))
    return found


def _note(module: keras.Layer) -> None:
    _modules.add(module)
    for parameter in _parameters(module).values():
        _listing.setdefault(id(parameter), weakref.WeakSet()).add(module)


def _listing_of(variable: keras.Variable) -> weakref.WeakSet[keras.Layer]:
    return _listing.get(id(variable._value), weakref.WeakSet())


def _may_follow(change: StoredChange) -> list[keras.Layer]:
    """The modules that may have to follow a change: those that list what the layer stored; any, if that is nothing."""
    if not change.before:
        return [module for module in _modules if module is not change.layer]
    found = {id(module): module for variable in change.before for module in _listing_of(variable)}
    return [module for module in found.values() if module is not change.layer]


def _parameters(module: keras.Layer) -> dict[str, Tensor]:
    """The parameters that a module lists, by path."""
    listed = module._modules.get(LIST)
    found: dict[str, Tensor] = {} if listed is None else listed._parameters
    return found


def _find_modules(variables: Sequence[keras.Variable]) -> None:
    """Looks for modules that list one of these parameters, unless all who refer to them are known."""
    if any(variable._value is not None and _is_held_by_others(variable) for variable in variables):
        find_new()
        _listing.clear()
        for layer in layers():
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


def _paths_of(variable: keras.Variable, parameters: dict[str, Tensor]) -> list[str]:
    """The paths under which a parameter is listed: as a rule its own, or with a number."""
    if parameters.get(variable.path) is variable._value:
        return [variable.path]
    if variable.path not in parameters:
        return []
    return [path for path, value in parameters.items() if value is variable._value]
