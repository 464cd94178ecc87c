"""Name scopes, and the paths of variables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from tether.keras_seam.classes import to_snake_case
from tether.keras_seam.private import private
from tether.keras_seam.threads import of_this_thread, set_in_this_thread
from tether.keras_seam.variables import Variable

_current_path = private("keras.src.backend.common.name_scope.current_path", "A path for a variable")


@contextlib.contextmanager
def outside_name_scopes() -> Iterator[None]:
    """Creates variables at the root of the name scopes, whichever layer is being built."""
    stack = of_this_thread("name_scope_stack")
    set_in_this_thread("name_scope_stack", [])
    try:
        yield
    finally:
        set_in_this_thread("name_scope_stack", stack)


@contextlib.contextmanager
def _outside_stateless_scopes() -> Iterator[None]:
    """Allows new variables, which Keras refuses in a stateless scope."""
    scope = of_this_thread("stateless_scope")
    set_in_this_thread("stateless_scope", None)
    try:
        yield
    finally:
        set_in_this_thread("stateless_scope", scope)


def name_scope(layer: Any) -> Any:
    """The name scope that `add_weight` opens around a new variable of `layer`."""
    return keras.name_scope(layer.name, caller=layer)


def current_path() -> str:
    return str(_current_path())


def set_path(variable: Any, path: str) -> None:
    variable._path = path


def is_automatic_variable_name(name: str) -> bool:
    """Whether Keras made the variable's name up (`variable`, `jax_variable_3`)."""
    stem = name.rstrip("0123456789").rstrip("_")
    return stem in {"variable", to_snake_case(Variable.__name__)}
