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
from keras.src.initializers.random_initializers import RandomInitializer as _RandomInitializer

from tether.keras_seam.memory import untouched_zeros
from tether.keras_seam.variables import Variable

Start = tuple["weakref.ref[Any]", Callable[[], Any]]
"""A variable, and what makes the value that it would have started with."""


class _Here(threading.local):
    """What holds in one thread."""

    larger_than: int | None = None
    left_out: list[Start]


_here = _Here()
_lock = threading.Lock()
_threads = 0


@contextlib.contextmanager
def random_starts_left_out(larger_than: int) -> Iterator[list[Start]]:
    """Inside, large variables start at zero where they would start at random: for one who stores their values next.

    Drawing them takes longer than reading a file, and more memory. Keras has no place for it but the method by which a
    variable starts, so another one stands in for it meanwhile. For other threads it changes nothing.

    Args:
        larger_than: Bytes from which on a variable is large.

    Yields:
        A list that gets each variable, and what makes its value.
    """
    left_out: list[Start] = []
    before = _here.larger_than, getattr(_here, "left_out", left_out)
    _count(1)
    _here.larger_than, _here.left_out = larger_than, left_out
    try:
        yield left_out
    finally:
        _here.larger_than, _here.left_out = before
        _count(-1)


def _count(change: int) -> None:
    global _threads
    with _lock:
        before, _threads = _threads, _threads + change
        if before == 0:
            Variable._initialize_with_initializer = _initialize
        elif _threads == 0:
            del Variable._initialize_with_initializer
            if _own is not None:
                Variable._initialize_with_initializer = _own


_own, _method = vars(Variable).get("_initialize_with_initializer"), Variable._initialize_with_initializer


def _initialize(variable: Any, initializer: Any) -> None:
    if not _is_left_out(variable, initializer):
        _method(variable, initializer)
        return
    start = functools.partial(initializer, tuple(variable._shape), dtype=variable._dtype)
    _here.left_out.append((weakref.ref(variable), start))
    _method(variable, untouched_zeros)


def _is_left_out(variable: Any, initializer: Any) -> bool:
    if _here.larger_than is None or not isinstance(initializer, _RandomInitializer):
        return False
    if not isinstance(initializer.seed, int):
        return False  # from a generator of seeds, which would give other numbers to the next one who draws
    size = math.prod(variable._shape) * numpy.dtype(variable._dtype).itemsize
    return size > _here.larger_than and keras.distribution.distribution() is None
