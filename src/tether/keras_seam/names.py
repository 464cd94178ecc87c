"""Name scopes, and the paths of variables."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Container, Iterator
from typing import Any

import keras

from tether.keras_seam.classes import to_snake_case
from tether.keras_seam.private import private
from tether.keras_seam.threads import of_this_thread, set_in_this_thread
from tether.keras_seam.variables import Variable

_name_scope = private("keras.src.backend.common.name_scope.name_scope", "A weight under a path of its own")
_current_path = private("keras.src.backend.common.name_scope.current_path", "A path for a variable")


@contextlib.contextmanager
def path_scope(path: str) -> Iterator[None]:
    """The name scope in which a variable of the path's last name is created under the path, whatever scopes are open.

    A layout map looks a variable up while it is created, so a path that is set afterwards comes too late. It is Keras's
    own scope and none of TensorFlow's, whose graphs do not take every name: the variable is created outside of them.
    """
    *above, scope = path.split("/")[:-1] or [""]
    with _outside_graphs(), _name_scope(scope, override_parent="/".join(above)):
        yield


def _make_outside_graphs() -> Any:
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope
    return contextlib.nullcontext


_outside_graphs = _make_outside_graphs()


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


def numbered(name: str, taken: Container[str]) -> str:
    """A name, with a number if it is taken: how things of one name in one model are told apart, in its order."""
    numbers = (f"{name}_{number}" for number in itertools.count(1))
    return next(each for each in itertools.chain([name], numbers) if each not in taken)


def is_automatic_variable_name(name: str) -> bool:
    """Whether Keras made the variable's name up (`variable`, `jax_variable_3`)."""
    stem = name.rstrip("0123456789").rstrip("_")
    return stem in {"variable", to_snake_case(Variable.__name__)}
