"""The models that the command is asked about: the backend they need, loading and writing them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tether_cli.console import Failed, busy, one_line

# --------------------------------------------------------------------------- the backend
# Before the first import of Keras: the backend, and the classes of the user's own.


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


def import_custom(names: Sequence[str] | None) -> dict[str, object]:
    """Imports modules of the user's own, from the current folder too; the classes that are named, by their names.

    Args:
        names: Each `module`, which registers its classes with Keras, or `module:Class`.
    """
    found: dict[str, object] = {}
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


# --------------------------------------------------------------------------- files
# The files that a command reads and writes: strangers' models in safe mode, and never over what is there.


def require(*paths: Path) -> None:
    """Sees that files exist, before anything that takes time."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"There is no file {str(path)!r}.")


def load(path: Path, custom: dict[str, object], *, compile: bool) -> Any:
    """The model of a `.keras` file, in Keras's safe mode: no code that the file brings is run."""
    import keras

    if path.suffix != ".keras":
        raise Failed(f"Only a .keras file holds a model that can be loaded, not {path.name!r}.")
    try:
        with busy(f"Loading {path.name}"):
            return keras.saving.load_model(path, custom_objects=custom, compile=compile, safe_mode=True)
    except Exception as error:  # a file may make Keras fail in any way
        raise Failed(_why_not(path, error, custom)) from error


def _why_not(path: Path, error: Exception, custom: dict[str, object]) -> str:
    if "safe_mode=False" in str(error):
        return (
            f"{path} brings Python code of whoever made it (a Lambda layer, or a function), which is not run here. If "
            "you trust it, do in Python what you want: "
            f"model = keras.saving.load_model({str(path)!r}, safe_mode=False); print(tether.check(model))"
        )
    said = one_line(error).partition(" Full object config")[0]
    if _names_what_nobody_knows(path, error, custom):
        return f"{path} cannot be loaded: {said} Name the class, or the module that registers it: --custom module:Class"
    return f"{path} cannot be loaded: {said}"


def _names_what_nobody_knows(path: Path, error: Exception, custom: dict[str, object]) -> bool:
    from tether.errors import TetherError
    from tether.files.keras.archive import contents
    from tether.files.keras.load import missing_names

    try:
        return bool(missing_names(error, contents(path).config, custom))
    except TetherError:  # it has no config that can be read
        return False


def target(path: Path, *, inputs: tuple[Path, ...], force: bool, folder: bool = False) -> Path:
    """Where to write a file, or a folder, if nothing speaks against it. A link is followed, so that it stays one.

    It is no input of the command, by whichever name, and no file that is there, unless `force` says so.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir() and not folder:
        raise Failed(f"{path} is a folder. Name the file to write.")
    if not final.parent.is_dir():
        raise Failed(f"There is no folder {str(path.parent)!r} to write {path.name!r} to.")
    if final.exists():
        if any(source.exists() and os.path.samefile(source, final) for source in inputs):
            raise Failed(f"{path} is the file that is read; it is never written over. Name another one.")
        if not force:
            raise Failed(f"{path} is there already. To replace it: --force")
    return final


def save(model: Any, path: Path) -> None:
    """Writes a `.keras` file. As long as it is not whole it has no name, so nothing is left of it whatever happens."""
    from tether import keras_seam
    from tether.atomic import written_beside

    with tempfile.TemporaryFile(dir=path.parent) as unnamed:
        keras_seam.save_to(model, unnamed)
        unnamed.seek(0)
        with written_beside(path) as beside, open(beside, "wb") as file:
            shutil.copyfileobj(unnamed, file, 2**20)
