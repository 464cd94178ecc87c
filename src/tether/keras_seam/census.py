"""Which layers and optimizers are alive in the process.

Keras keeps no list of them, and a layer does not know what is around it. Who changes a layer that is built has to find
the models that contain it: the training functions that were traced (`training`), and on PyTorch the lists of parameters
(`torch_parameters`). Going through memory takes a tenth of a second in a large process, so it is done only if there is
something that has not been seen. That is read off, which takes no time: Keras makes functions of its own for each layer
and each optimizer, and a function holds its code, so the references to the code say how many such functions are alive.
Those that are known are held weakly: they die with what they were made for.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import keras

from tether.keras_seam.frames import OF_LAYERS, methods, nested

_OF_OPTIMIZERS = nested(*methods(keras.optimizers.Optimizer, "__init__"))
_AT_A_TIME = 20_000
"""Objects that are looked at before it is asked whether all have been seen."""

_layers: weakref.WeakSet[keras.Layer] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
"""What has been seen, of what is alive."""
_orphans: dict[int, weakref.WeakSet[Any]] = {}
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


def see(*found: Any) -> None:
    """Counts layers and optimizers as seen, and tells who wants to know of each model."""
    for one in found:
        if isinstance(one, keras.optimizers.Optimizer):
            _optimizers.add(one)
        elif isinstance(one, keras.layers.Layer) and one not in _layers:
            _layers.add(one)
            if isinstance(one, keras.Model):
                for tell in told_of_models:
                    tell(one)


told_of_models: list[Callable[[Any], None]] = []
"""What is called with each model that is seen for the first time."""


def layers() -> list[keras.Layer]:
    """The layers that have been seen."""
    return list(_layers)


def find_new() -> None:
    """Sees the layers and optimizers that have not been seen."""
    if not _is_something_new() or _find_in((0, 1, 2)):
        return
    _find_orphans()
    if _is_something_new() and gc.get_freeze_count():
        gc.unfreeze()  # `gc.freeze` has put objects where nobody finds them
        if not _find_in((2,)):
            _find_orphans()
        gc.freeze()


def _find_in(generations: tuple[int, ...]) -> bool:
    """Goes through generations of the garbage collector, until all have been seen; `False` if some were not found."""
    wanted = _with_subclasses(keras.layers.Layer) | _with_subclasses(keras.optimizers.Optimizer)
    for generation in generations:  # most often it was made lately
        everything = gc.get_objects(generation)
        while everything:
            part = everything[-_AT_A_TIME:]
            del everything[-_AT_A_TIME:]
            see(*itertools.compress(part, map(wanted.__contains__, map(type, part))))
            if not _is_something_new():
                return True
    return False


def _find_orphans() -> None:
    """Notes the functions that are left when everything has been seen: so many more than layers and optimizers."""
    codes = {id(code) for code in (*OF_LAYERS, *_OF_OPTIMIZERS)}
    functions = [one for one in gc.get_objects() if type(one) is FunctionType and id(one.__code__) in codes]
    owned = {id(test) for one in (*_layers, *_optimizers) for test in _tests_of(one)}
    for function in functions:
        of_code = _orphans.setdefault(id(function.__code__), weakref.WeakSet())
        (of_code.discard if id(function) in owned else of_code.add)(function)


def _tests_of(one: Any) -> list[Any]:
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
