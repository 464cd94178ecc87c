"""Name scopes, and the paths of variables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.utils import naming as _naming

from tether.keras_seam.variables import Variable


@contextlib.contextmanager
def outside_name_scopes() -> Iterator[None]:
    """Creates variables at the root of the name scopes, whichever layer is being built."""
    stack = _global_state.get_global_attribute("name_scope_stack")
    _global_state.set_global_attribute("name_scope_stack", [])
    try:
        yield
    finally:
        _global_state.set_global_attribute("name_scope_stack", stack)


@contextlib.contextmanager
def _outside_stateless_scopes() -> Iterator[None]:
    """Allows new variables, which Keras refuses in a stateless scope."""
    scope = _global_state.get_global_attribute("stateless_scope")
    _global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        _global_state.set_global_attribute("stateless_scope", scope)


def name_scope(layer: Any) -> Any:
    """The name scope that `add_weight` opens around a new variable of `layer`."""
    return _backend.name_scope(layer.name, caller=layer)


def current_path() -> str:
    return str(_backend.common.name_scope.current_path())


def set_path(variable: Any, path: str) -> None:
    variable._path = path


def is_automatic_variable_name(name: str) -> bool:
    """Whether Keras made the variable's name up (`variable`, `jax_variable_3`)."""
    stem = name.rstrip("0123456789").rstrip("_")
    return stem in {"variable", _naming.to_snake_case(Variable.__name__)}
