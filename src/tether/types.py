"""Types that say in a signature what Python and Keras know as `Any`: Keras is read without types of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

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

AnyLayer = TypeVar("AnyLayer", bound=keras.Layer)
"""The class of a layer that a function returns as it was given."""

__all__ = ["AnyLayer", "Array", "Config", "Function", "Tensor"]
