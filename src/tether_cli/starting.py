"""Before the first import of Keras: the backend, and the classes of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from tether_cli.errors import Failed, one_line
from tether_cli.waiting import busy

BACKENDS = ("jax", "torch", "tensorflow")


def start() -> Any:
    """The package, imported on a backend that is installed."""
    name = _choose_backend()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its greetings on stderr
    with busy(f"Starting Keras on {name}"):
        try:
            return importlib.import_module("tether")
        except ImportError as error:
            raise Failed(f"Keras does not start on {name}: {one_line(error)}") from error


def _choose_backend() -> str:
    """What `KERAS_BACKEND` says, or the first backend that is installed."""
    if "keras" in sys.modules:
        return str(sys.modules["keras"].backend.backend())
    installed = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
    asked = os.environ.get("KERAS_BACKEND")
    if not installed:
        raise Failed(f"Keras needs a backend, one of {', '.join(BACKENDS)}. Try: pip install jax")
    if asked and asked not in installed:
        why = "is not installed" if asked in BACKENDS else "is none that Tether supports"
        raise Failed(f"KERAS_BACKEND={asked} {why}. Installed: {', '.join(installed)}")
    os.environ["KERAS_BACKEND"] = asked or installed[0]
    return os.environ["KERAS_BACKEND"]


def import_custom(names: Sequence[str] | None) -> dict[str, Any]:
    """Imports modules of the user's own, from the current folder too; the classes that are named, by their names.

    Args:
        names: Each `module`, which registers its classes with Keras, or `module:Class`.
    """
    found: dict[str, Any] = {}
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names or ():
        module, _, attribute = name.partition(":")
        try:
            value: Any = importlib.import_module(module)
        except Exception as error:  # it is the user's code
            raise Failed(f"--custom {name}: {type(error).__name__}: {one_line(error)}") from error
        if attribute:
            if not hasattr(value, attribute):
                raise Failed(f"--custom {name}: the module {module!r} has no {attribute!r}.")
            found[attribute] = getattr(value, attribute)
    return found
