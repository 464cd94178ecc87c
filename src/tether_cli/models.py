"""The models that the command is asked about: the backend they need, loading and writing them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether_cli.console import Failed, busy, one_line

# --------------------------------------------------------------------------- the backend
# Before the first import of Keras: the backend, and the classes of the user's own.


BACKENDS = ("jax", "torch", "tensorflow")


def start() -> Any:
    """The package, imported on a backend that is installed."""
    name = choose_backend()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its greetings on stderr
    with busy(f"Starting Keras on {name}"):
        try:
            return importlib.import_module("tether")
        except ImportError as error:
            raise Failed(f"Keras does not start on {name}: {one_line(error)}") from error


def choose_backend() -> str:
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
    """Sees that files exist and are no folders and no files of Keras 2, before anything that takes time."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"There is no file {str(path)!r}.")
        if path.is_dir():
            raise Failed(f"{path} is a folder{_kind_of_folder(path)}. Name a .keras, .weights.h5 or .safetensors file.")
        if path.suffix in (".h5", ".hdf5") and not path.name.endswith(".weights.h5"):
            raise Failed(
                f"{path} is a legacy HDF5 file of Keras, which is not read here. Save the model anew: "
                f"keras.saving.load_model({str(path)!r}).save({path.stem + '.keras'!r}); or, if the file holds weights "
                f"only: model.load_weights({str(path)!r}); model.save_weights({path.stem + '.weights.h5'!r})"
            )


def _kind_of_folder(path: Path) -> str:
    """What a folder that holds a model in another form is, by its files."""
    if (path / "saved_model.pb").exists():
        return " (a SavedModel)"
    if (path / "adapter_config.json").exists():
        return " (adapters, as PEFT writes them)"
    return " (an unpacked .keras file)" if (path / "config.json").exists() and (path / "metadata.json").exists() else ""


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


# --------------------------------------------------------------------------- inputs
# What a call of a model takes: as the model knows it, or as the command line says it.


SHAPE = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<sizes>[^:=]*)(?::(?P<dtype>\w+))?")
SIZE = re.compile(r"[1-9]\d*|none", re.IGNORECASE)


@dataclass(frozen=True)
class InputShape:
    """One input as `--input-shape` has it: `[NAME=]SIZE,SIZE,…[:DTYPE]`, without the batch."""

    name: str | None
    sizes: tuple[int | None, ...]
    dtype: str | None

    @classmethod
    def parse(cls, text: str) -> InputShape:
        """Reads one; `none` is a size that stays open."""
        match = SHAPE.fullmatch("".join(text.split()))
        sizes = [size for size in match["sizes"].split(",") if size] if match else []
        if match is None or not all(SIZE.fullmatch(size) for size in sizes):
            raise Failed(
                f"--input-shape {text}: expected the sizes of one example, as in 28,28,1 or none,64:float16 or "
                "words=128:int32. Several inputs: one --input-shape for each."
            )
        known = tuple(None if size.lower() == "none" else int(size) for size in sizes)
        return cls(match["name"], known, match["dtype"])


def arguments(model: Any, shapes: Sequence[str] | None) -> list[Any]:
    """What a call of a model takes: its positional arguments, as structures of symbolic tensors with an open batch.

    Args:
        model: The model.
        shapes: What `--input-shape` said; without any, the model itself has to know.
    """
    import keras

    symbolic = getattr(model, "inputs", None)
    known = None if not symbolic else symbolic[0] if isinstance(model, keras.Sequential) else model.input
    if not shapes:
        if known is None:
            raise Failed(
                f"The file does not say what the inputs of {model.name!r} look like. Say it, without the batch: "
                "--input-shape 28,28,1; for several inputs, one --input-shape for each."
            )
        return [keras.tree.map_structure(lambda tensor: keras.KerasTensor(tensor.shape, dtype=tensor.dtype), known)]
    given = [InputShape.parse(text) for text in shapes]
    named = [each for each in given if each.name is not None]
    if named and (len(named) < len(given) or len({each.name for each in named}) < len(given)):
        raise Failed("--input-shape: give every input a name of its own, or none of them a name.")
    if known is not None:
        return [_like(model, known, given)]
    found = [keras.KerasTensor((None, *each.sizes), dtype=each.dtype or "float32") for each in given]
    if named:
        return [{str(each.name): tensor for each, tensor in zip(given, found, strict=True)}]
    taken = [name for name in _positional(model) if name not in ("training", "mask")]
    return found if len(found) == 1 or len(found) <= len(taken) else [found]


def _like(model: Any, known: Any, given: list[InputShape]) -> Any:
    """The inputs that a model knows, with other sizes."""
    import keras

    flat = keras.tree.flatten(known)
    if given[0].name is not None:
        by_name = {each.name: each for each in given}
        names = list(known) if isinstance(known, dict) else [tensor.name for tensor in flat]
        if set(by_name) != set(names):
            raise Failed(
                f"--input-shape: the inputs of {model.name!r} are {', '.join(map(repr, names))}, not "
                f"{', '.join(repr(each.name) for each in given)}."
            )
        ordered = {name: by_name[name] for name in names}
        given = keras.tree.flatten(ordered) if isinstance(known, dict) else list(ordered.values())
    if len(given) != len(flat):
        raise Failed(f"--input-shape: {model.name!r} takes {len(flat)} inputs, and {len(given)} shapes are given.")
    tensors = []
    for tensor, each in zip(flat, given, strict=True):
        fits = len(tensor.shape) == len(each.sizes) + 1 and all(
            size is None or size == wanted for size, wanted in zip(tensor.shape[1:], each.sizes, strict=True)
        )
        if not fits:
            raise Failed(
                f"--input-shape: the input {tensor.name!r} of {model.name!r} has the shape "
                f"{tuple(tensor.shape[1:])} without the batch, not {each.sizes}."
            )
        tensors.append(keras.KerasTensor((None, *each.sizes), dtype=each.dtype or tensor.dtype))
    return keras.tree.pack_sequence_as(known, tensors)


def as_one_argument(model: Any, given: list[Any], batch: int) -> tuple[Any, Any]:
    """A model that takes its arguments as one, and what its call takes with so many examples."""
    import keras

    if len(given) > 1:
        inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in given]
        model, given = keras.Model(inputs, model(*inputs), name=model.name), [given]
    return model, keras.tree.map_structure(
        lambda tensor: keras.KerasTensor((batch, *tensor.shape[1:]), dtype=tensor.dtype), given[0]
    )


def _positional(model: Any) -> list[str]:
    """What a call of a model can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, each in inspect.signature(model.call).parameters.items() if each.kind in kinds]


# --------------------------------------------------------------------------- writing


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
