"""Which layers and optimizers are alive in the process.

Keras keeps no list of them, and a layer does not know what is around it. Who changes a layer that is built has to find
the models that contain it: the training functions that were traced (`training`), and on PyTorch the lists of parameters
(`torch_parameters`). Going through memory takes a tenth of a second in a large process, so it is done only if there is
something that has not been seen. How many there are is read off, which takes no time: a function that is made holds
its code, and Keras makes functions of its own for each layer and for each optimizer.
"""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

import keras

from tether.keras_seam.frames import OF_LAYERS, methods, nested

_OF_OPTIMIZERS = nested(*methods(keras.optimizers.Optimizer, "__init__"))
_AT_A_TIME = 20_000
"""Objects that are looked at before it is asked whether all have been seen."""

_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
"""What has been seen, of what is alive."""


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
    return alive(_OF_OPTIMIZERS) > len(_optimizers)


def see(*found: Any) -> None:
    """Counts layers and optimizers as seen, and tells who wants to know of each model."""
    for one in found:
        if isinstance(one, keras.optimizers.Optimizer):
            _optimizers.add(one)
        elif one not in _layers:
            _layers.add(one)
            if isinstance(one, keras.Model):
                for tell in told_of_models:
                    tell(one)


told_of_models: list[Callable[[Any], None]] = []
"""What is called with each model that is seen for the first time."""


def layers() -> list[Any]:
    """The layers that have been seen."""
    return list(_layers)


def find_new() -> None:
    """Sees the layers and optimizers that have not been seen."""
    if _is_something_new() and not _find_in((0, 1, 2)) and gc.get_freeze_count():
        gc.unfreeze()  # `gc.freeze` has put objects where nobody finds them
        _find_in((2,))
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


def _is_something_new() -> bool:
    return has_new_optimizers() or alive(OF_LAYERS) > len(_layers)


def _with_subclasses(cls: type) -> set[type]:
    found = {cls}
    children: list[type] = type.__subclasses__(cls)
    for child in children:
        found |= _with_subclasses(child)
    return found
