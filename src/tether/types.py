"""Types that say in a signature what Python and Keras know as `Any`: Keras is read without types of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeAlias, TypeVar

import keras
import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
"""An array in memory, of any shape and dtype."""

Config: TypeAlias = dict[str, Any]
"""What becomes JSON: the config of a layer, an entry of a header, the parameters of an operator."""

Function: TypeAlias = Callable[..., Any]
"""A function of somebody else's, whose arguments are not known here: a layer's `call`, a user's function."""

Tensor: TypeAlias = Any
"""A tensor of the backend in use, or a symbolic one of Keras."""

Nested: TypeAlias = Any
"""Tensors, or shapes or specs of tensors, in lists, tuples and dicts, as `keras.tree` goes through them."""

Saveable: TypeAlias = keras.Layer | keras.Metric | keras.Optimizer
"""What Keras writes to a file as an object of its own: the base class that these have in common has no public name."""


class Store(Protocol):
    """Where a layer writes its own variables, or reads them from: a part of a file, or a dict with the same keys."""

    def __setitem__(self, key: str, value: Tensor, /) -> None: ...

    def __getitem__(self, key: str, /) -> Tensor: ...

    def __contains__(self, key: str, /) -> bool: ...

    def keys(self) -> Iterable[str]:
        """The names of what is in it."""


AnyLayer = TypeVar("AnyLayer", bound=keras.Layer)
"""The class of a layer that a function returns as it was given."""

__all__ = ["AnyLayer", "Array", "Config", "Function", "Nested", "Saveable", "Store", "Tensor"]
