"""The names under which PyTorch has a model's parameters.

Keras registers them by path, so of two variables of one path one would be no parameter of the model: no optimizer of
PyTorch's would train it, and no `state_dict` have it. A variable does not know what else a model holds; the stack says
which model is registering its variables. Those of weights then give their paths with numbers, in the model's order.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import keras

from tether.keras_seam.names import numbered
from tether.keras_seam.private import is_missing, private_method
from tether.keras_seam.variables import Variable

_REGISTERING: CodeType | None = None
_READING: set[CodeType] = set()
_RESERVED: set[str] = set()
"""What a list of parameters has as attributes of its own, such as `half`: no parameter can be called so."""
if keras.backend.backend() == "torch":
    from torch.compiler import is_compiling as _is_compiling
    from torch.nn import ParameterDict as _ParameterDict

    _RESERVED = set(dir(_ParameterDict()))
    _track = private_method(keras.Layer, "_track_variables", "Two parameters of one path in one model of PyTorch's")
    if not is_missing(_track):
        _REGISTERING = _track.__code__
        # Before Python 3.12 the comprehension in it has a frame of its own.
        _READING = {_REGISTERING, *(each for each in _REGISTERING.co_consts if isinstance(each, CodeType))}


class _Keyed(Variable):
    """A variable whose path is another one while a model registers it that has the path already."""

    @property
    def path(self) -> str:
        """Its path; asked by Keras for the key of a parameter, one that no other variable of the model has."""
        path = str(self._path)
        if _is_compiling():  # there are no frames then
            return path
        frame: FrameType | None = sys._getframe(1)
        if frame is None or frame.f_code not in _READING:
            return path
        while frame is not None and frame.f_code is not _REGISTERING:
            frame = frame.f_back
        if frame is None:
            return path
        keys = frame.f_locals.setdefault(".tether.keys", {})
        if not keys:
            keys.update(_keys(frame.f_locals["self"].variables))
        return str(keys.get(id(self), path))


def _keys(variables: list[Any]) -> dict[int, str]:
    """What the variables of weights are called among all of a model's, by their ids."""
    found: dict[int, str] = {}
    taken = {variable.path for variable in variables if not isinstance(variable, _Keyed)} | _RESERVED
    for variable in variables:
        if isinstance(variable, _Keyed):
            found[id(variable)] = numbered(variable.path, taken)
            taken.add(found[id(variable)])
    return found


def tell_apart(variable: Any) -> None:
    """Lets a stored variable be a parameter of its own, whatever else in a model has its path."""
    if _REGISTERING is not None:
        variable.__class__ = _Keyed
