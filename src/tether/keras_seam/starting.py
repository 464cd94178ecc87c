"""Variables that start at zero where a file is about to say what is in them."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy
from keras import Layer as _Layer
from keras import backend as _backend

from tether.keras_seam.classes import RandomInitializer as _RandomInitializer
from tether.keras_seam.frames import _first_local, _frames
from tether.keras_seam.memory import is_same_snapshot, snapshot, untouched_zeros
from tether.keras_seam.private import is_missing, private_method
from tether.keras_seam.variables import Variable

Start = tuple["weakref.ref[Any]", Callable[[], Any]]
"""A variable, and what makes the value that it would have started with."""


def is_random(initializer: Any) -> bool:
    return isinstance(initializer, _RandomInitializer)


class _Here(threading.local):
    """What holds in one thread."""

    def __init__(self) -> None:
        self.larger_than: int | None = None
        self.begun: dict[int, tuple[Start, Any]] = {}
        """The variables that exist and started at zero, by id, each with a snapshot of that zero."""


_here = _Here()
_lock = threading.Lock()
_scopes = 0


@contextlib.contextmanager
def random_starts_left_out(larger_than: int) -> Iterator[list[Start]]:
    """Inside, large variables start at zero where they would start at random: for one who stores their values next.

    Drawing them takes longer than reading a file, and more memory. Keras has no place for it but the method by which a
    variable starts, so another one stands in for it meanwhile. For other threads it changes nothing. A layer of one's
    own draws from a seed as ever, since what it makes of such a start in its `build` can be relied on.

    Args:
        larger_than: Bytes from which on a variable is large.

    Yields:
        A list that has, after the block, each variable in which nothing was stored in it, and what makes its value.
    """
    left_out: list[Start] = []
    if is_missing(_method):  # then every variable starts as Keras has it
        yield left_out
        return
    before, begun = (_here.larger_than, _here.begun), dict[int, tuple[Start, Any]]()
    _count(1)
    _here.larger_than, _here.begun = larger_than, begun
    try:
        yield left_out
        for start, zero in list(begun.values()):
            variable = start[0]()
            if variable is not None and is_same_snapshot(zero, _snapshot(variable)):
                left_out.append(start)
    finally:
        _here.larger_than, _here.begun = before
        _count(-1)
        begun.clear()  # whose snapshots hold memory, also after a failure


def _count(change: int) -> None:
    global _scopes
    with _lock:
        before, _scopes = _scopes, _scopes + change
        if before == 0:
            Variable._initialize_with_initializer = _initialize
        elif _scopes == 0 and _own is not None:
            Variable._initialize_with_initializer = _own
        elif _scopes == 0:
            del Variable._initialize_with_initializer


_own = vars(Variable).get("_initialize_with_initializer")
_method = private_method(Variable, "_initialize_with_initializer", "A start without random numbers")


def _initialize(variable: Any, initializer: Any) -> None:
    if not _is_left_out(variable, initializer):
        _method(variable, initializer)
        return
    _method(variable, untouched_zeros)
    begun, key = _here.begun, id(variable)
    start = functools.partial(initializer, tuple(variable._shape), dtype=variable._dtype)
    begun[key] = (weakref.ref(variable, lambda _: begun.pop(key, None)), start), _snapshot(variable)


def _is_left_out(variable: Any, initializer: Any) -> bool:
    if _here.larger_than is None or not is_random(initializer):
        return False
    if not isinstance(initializer.seed, int):
        return False  # from a generator of seeds, which would give other numbers to the next one who draws
    size = math.prod(variable._shape) * numpy.dtype(variable._dtype).itemsize
    if size <= _here.larger_than or keras.distribution.distribution() is not None:
        return False
    return initializer._init_seed is None or _only_keras_builds()


def _only_keras_builds() -> bool:
    """Whether all layers that are being built are Keras's: those of attention seed their own parts."""
    found = (local for local in map(_first_local, _frames()) if isinstance(local, _Layer))
    return all(type(layer).__module__.startswith(("keras.", "tether.")) for layer in found)


def _make_snapshot() -> Callable[[Any], Any]:
    if _backend.backend() == "tensorflow":
        import tensorflow as tf

        def of_tensorflow(variable: Any) -> Any:
            with tf.init_scope():  # a graph may be in the making
                return snapshot(variable._value)

        return of_tensorflow
    return lambda variable: snapshot(variable._value)


_snapshot = _make_snapshot()
