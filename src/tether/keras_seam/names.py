"""Name scopes, and the paths of variables."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Container, Iterator
from typing import Any

from keras.src import backend as _backend
from keras.src.backend.common import global_state as _global_state
from keras.src.utils import naming as _naming

from tether.keras_seam.variables import Variable


def scope_of(path: str) -> Any:
    """The name scope in which a variable of the path's last name is created under the path, whatever scopes are open.

    A layout map looks a variable up while it is created, so a path that is set afterwards comes too late. It is Keras's
    own scope and none of TensorFlow's, whose graphs do not take every name.
    """
    *above, scope = path.split("/")[:-1] or [""]
    return _backend.common.name_scope.name_scope(scope, override_parent="/".join(above))


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


def numbered(name: str, taken: Container[str]) -> str:
    """A name, with a number if it is taken: how things of one name in one model are told apart, in its order."""
    numbers = (f"{name}_{number}" for number in itertools.count(1))
    return next(each for each in itertools.chain([name], numbers) if each not in taken)


def is_automatic_variable_name(name: str) -> bool:
    """Whether Keras made the variable's name up (`variable`, `jax_variable_3`)."""
    stem = name.rstrip("0123456789").rstrip("_")
    return stem in {"variable", _naming.to_snake_case(Variable.__name__)}
