"""`load_model`: a model from a `.keras` file, made, filled and verified, or one error that says whose fault it is."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from types import FrameType
from typing import Any

import h5py
import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, LostTie, TetherError, listed
from tether.files.keras.archive import Contents, contents, damaged, dtype_of, is_bytes, opened_archive, places_of
from tether.files.loading.matching import positions
from tether.layers.tying import paths
from tether.layers.tying.state import View, state_of
from tether.layers.tying.tied import KEY
from tether.types import Array, Config
from tether.weights.identity import dictionaries
from tether.weights.leaves import numpy_dtype
from tether.weights.weight import Weight

# --------------------------------------------------------------------------- making the model
# What goes wrong while a model is made of what a file says: whose fault it is, and what to do.
#
# A good file may fail to load. A class of its may be in a module that nobody has imported, its code may raise, the
# memory may be too small, Keras may be older than the one that wrote it. None of that is damage, which shows when the
# bytes are read (`tether.files.keras.archive.reading`). A file may also be a stranger's, so whatever is raised
# becomes a `TetherError`: it names the class in which it was raised, says what was said there, and has the error as
# its cause.


MAX_CHARACTERS, MAX_NAME = 1500, 120
"""How much is repeated of what Keras says, which may have the whole config in it, and of a name in a file."""
_KERAS = ("keras", "keras_hub", "keras_cv", "keras_nlp")
"""The packages that Keras imports by itself when a file names a class of theirs."""
_FUNCTIONS = (
    keras.activations, keras.constraints, keras.initializers, keras.losses, keras.metrics, keras.ops,
    keras.regularizers,
)  # fmt: skip
"""Where Keras looks for the functions that a file names without a module."""
_MADE = (
    keras.Operation, keras.constraints.Constraint, keras.initializers.Initializer, keras.losses.Loss,
    keras.metrics.Metric, keras.optimizers.Optimizer, keras.regularizers.Regularizer,
)  # fmt: skip
_BACKENDS = ("jax", "jaxlib", "tensorflow", "torch")


@contextlib.contextmanager
def making(
    path: str | os.PathLike[str],
    config: object,
    custom_objects: Mapping[str, object] | None = None,
    *,
    what: str = "model",
    written_by: str | None = None,
    takes_custom_objects: bool = False,
) -> Iterator[None]:
    """Turns whatever is raised while something is made of a file's config into one error that says why.

    Args:
        path: The file.
        config: Its config.
        custom_objects: What the caller gave by name.
        what: What is made.
        written_by: The version of Keras that wrote the file, if it says so.
        takes_custom_objects: Whether the function that was called takes them.
    """
    try:
        yield
    except Exception as error:  # of Keras, of the backend, of anybody's class
        why = explained(
            error, path, config, custom_objects, what=what, written_by=written_by, by_argument=takes_custom_objects
        )
        if why is error:
            raise
        raise why from error


def explained(
    error: Exception,
    path: str | os.PathLike[str],
    config: object,
    custom_objects: Mapping[str, object] | None = None,
    *,
    what: str = "model",
    written_by: str | None = None,
    by_argument: bool = False,
) -> TetherError:
    """The error to raise for another one, see `making`; the error itself if it is Tether's and says all."""
    unknown, root = missing_names(error, config, custom_objects), _unwrapped(error)
    start = f"The {what} in {str(path)!r} could not be loaded: {_versions(written_by)}"
    if unknown:
        return InvalidConfig(f"{start}{_how_to_know(unknown, by_argument)} It said: {_said(root)}")
    if isinstance(error, TetherError):
        return error
    if _is_of_reading(root):
        return damaged(path, root)
    message = f"{start}{type(root).__name__} in {_raised_in(root)}: {_said(root)}"
    return TetherError(message) if _is_of_here(root) else InvalidConfig(message)


# --------------------------------------------------------------------------- names that nobody knows


def missing_names(
    error: Exception, config: object, custom_objects: Mapping[str, object] | None = None
) -> list[tuple[str, str]]:
    """The classes and functions that a config names, that this process does not know, and of which an error speaks.

    Returns:
        For each `"class"` or `"function"`, and the name by which Keras looks for it, which is the key that
        `custom_objects` need. The name of what is a package's of Keras's starts with its module.
    """
    text = " ".join(str(each) for each in _chain(error))
    found: dict[tuple[str, str], None] = {}
    for entry in dictionaries(config):
        reference = _reference(entry)
        if reference is not None and not _is_known(*reference, dict(custom_objects or {})):
            kind, name, module = reference
            found[kind, f"{module}.{name}" if module.partition(".")[0] in _KERAS else name] = None
    return [(kind, name) for kind, name in found if _is_quoted(name, text)]


def _reference(entry: Mapping[str, object]) -> tuple[str, str, str] | None:
    """Kind, name and module of what a dictionary of a config names."""
    name, module = entry.get("class_name"), entry.get("module")
    if entry.get("op") == "apply" and "of" in entry:  # a step of an expression
        kind, name, module = "function", entry.get("function"), "builtins"
        name = name.removeprefix("keras.ops.") if isinstance(name, str) else name
    elif name == "function":
        kind, name = "function", entry.get("config")
    elif isinstance(name, str) and not name.startswith("__"):
        registered = entry.get("registered_name")
        kind, name = "class", registered if isinstance(registered, str) else name
    else:
        return None
    return (kind, name, module if isinstance(module, str) else "") if isinstance(name, str) else None


def _is_known(kind: str, name: str, module: str, custom_objects: dict[str, object]) -> bool:
    if keras.saving.get_registered_object(name, custom_objects) is not None:
        return True
    package, *rest = module.split(".")
    if module == "builtins" and kind == "function":
        return any(hasattr(each, name) for each in _FUNCTIONS)
    if package != "keras":
        return package in _KERAS and importlib.util.find_spec(package) is not None
    holder: object = keras
    for part in rest:
        holder = getattr(holder, part, None)
    return hasattr(holder or sys.modules.get(module), name)


def _short(name: str) -> str:
    """A name as it is in the code, without its package."""
    return name.rpartition(">")[2].rpartition(".")[2]


def _is_quoted(name: str, text: str) -> bool:
    """Whether an error speaks of a name: a config may name what nobody has looked for."""
    return any(f"{quote}{each}{quote}" in text for quote in "'`" for each in (name, _short(name)))


def _how_to_know(unknown: list[tuple[str, str]], by_argument: bool) -> str:
    of_packages = [name for _, name in unknown if name.partition(".")[0] in _KERAS]
    own = [(kind, name) for kind, name in unknown if name not in of_packages][:8]
    parts = []
    if own:
        listed = ", ".join(f"the {kind} {_shown(name)}" for kind, name in own)
        given = "{" + ", ".join(f"{_shown(name)}: {_short(name)[:MAX_NAME]}" for _, name in own) + "}"
        otherwise = f"custom_objects={given}" if by_argument else f"with keras.saving.custom_object_scope({given}): ..."
        parts.append(
            f"this process does not know {listed}. Import the module that registers it with "
            f"`@keras.saving.register_keras_serializable()`, or give it by that name: `{otherwise}`."
        )
    for name in of_packages[:8]:
        package = name.partition(".")[0]
        where = f"Keras {keras.__version__} has no" if package == "keras" else f"{package} is not installed, which has"
        parts.append(f"{where} {_shown(name)}.")
    return " ".join(parts)


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…")


def _versions(written_by: str | None) -> str:
    if written_by in (None, keras.__version__):
        return ""
    return f"it was written by Keras {written_by}, and this is Keras {keras.__version__}. "


# --------------------------------------------------------------------------- what was raised, and where


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_WRAPPING = {
    inspect.unwrap(function).__code__
    for function in (keras.saving.deserialize_keras_object, keras.Operation.from_config)
}
"""Where Keras catches an error and raises another one, with the config in its message."""


def _unwrapped(error: BaseException) -> BaseException:
    """What was raised first, where Keras has raised it again as another error."""
    while type(error) is TypeError and error.__context__ is not None and _innermost(error).f_code in _WRAPPING:
        error = error.__context__
    return error


def _frames(error: BaseException) -> list[FrameType]:
    """The frames through which an error came, the one that raised it last."""
    found, trace = [], error.__traceback__
    while trace is not None:
        found.append(trace.tb_frame)
        trace = trace.tb_next
    return found


def _innermost(error: BaseException) -> FrameType:
    return _frames(error)[-1]


def _raised_in(error: BaseException) -> str:
    """The objects of Keras's kinds in whose methods an error was raised, inner ones first."""
    found: dict[str, str] = {}
    for frame in reversed(_frames(error)):
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, type) and issubclass(first, _MADE):
            found.setdefault(first.__name__, first.__name__)
        elif isinstance(first, _MADE):
            kind, name = type(first).__name__, vars(first).get("name")
            found.setdefault(kind, f"{kind} {_shown(name)}" if isinstance(name, str) else kind)
    return ", in ".join(list(found.values())[:3]) or "Keras"


def _is_of_reading(error: BaseException) -> bool:
    """Whether bytes of the file could not be read after all: what HDF5 or zip could not."""
    if isinstance(error, (zipfile.BadZipFile, zlib.error)):
        return True
    raised_by = str(_innermost(error).f_globals.get("__name__", "")).partition(".")[0]
    return isinstance(error, (OSError, RuntimeError)) and raised_by == "h5py"


def _is_of_here(error: BaseException) -> bool:
    """Whether an error is of the process or the machine, and not of what the file says."""
    if isinstance(error, (MemoryError, OSError, ImportError)):
        return True
    of_backend = type(error).__module__.partition(".")[0] in _BACKENDS or _is_of_placing(error)
    return of_backend or (isinstance(error, RuntimeError) and not isinstance(error, RecursionError))


def _is_of_placing(error: BaseException) -> bool:
    """Whether a backend could not lay a value out as the distribution in force says, of which no file says anything."""
    raised_by = str(_innermost(error).f_globals.get("__name__", "")).partition(".")[0]
    return keras.distribution.distribution() is not None and raised_by in _BACKENDS


# --------------------------------------------------------------------------- reading its values
# Loading a model from a file that a stranger may have written, and seeing that all of it arrived.


def load_model(
    path: str | os.PathLike[str],
    *,
    custom_objects: dict[str, object] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> keras.Model:
    """Reads a `.keras` file, by whomever it was written, and checks what came of it.

    The file is held against its checksums and against what it says about itself before anything in it is used.
    Afterwards every tie that it records has to be there, every weight of the model has to have had a value in it, and
    every value in it a weight.

    Under a `keras.distribution` over several processes, all of them call it. Each reads, of a value that is laid out
    over several devices, the parts that lie on its own devices.

    Args:
        path: The file.
        custom_objects: Classes and functions of your own, by name, that are not registered with Keras.
        compile: Whether to compile the model as it was, with the state of its optimizer.
        safe_mode: Whether to refuse what runs code of the file's, such as a `Lambda` layer. Keras's own meaning.

    Returns:
        The model.

    Raises:
        TetherError: There is no such file.
        InvalidConfig: It is damaged, or names something that cannot or must not be made.
        LostTie: A tie that it records did not come back.

    Example:
    ```python
    tether.files.save_model(model, "model.keras")
    again = tether.files.load_model("model.keras")
    ```
    """
    with keras_seam.in_step_where_distributed(f"load_model({os.path.basename(path)!r})"):
        found = contents(path, whole=True)
        with making(path, found.config, custom_objects, written_by=found.written_by, takes_custom_objects=True):
            _check_plan(found, path=path)
            with warnings.catch_warnings():
                # Keras warns of some values that it does not find, and goes on; here that becomes an error below.
                warnings.filterwarnings("ignore", "Skipping nested container")
                model = _read(path, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
            _check_values(model, found, compiled=compile and model.compiled, path=path)
            _check_ties(model, found.config, path=path)
        return model


def _read(path: str | os.PathLike[str], **options: Any) -> keras.Model:
    with opened_archive(path) as archive, archive.values() as values:
        return keras_seam.read_archive(
            archive.zip, values, lambda model: _stored_in_parts(model, values), large=LARGE, **options
        )


def _stored_in_parts(model: keras.Model, values: h5py.File) -> dict[str, keras.Variable]:
    """Stores what is in the file as it is in memory: large weights a few rows at a time, and split ones by their parts.

    And those of float8, of which Keras writes the bytes and cannot read them.
    """
    found: dict[str, keras.Variable] = {}
    for place, variable in _places_of_variables(model, values):
        dataset = values.get(place)
        if not isinstance(dataset, h5py.Dataset) or dataset.shape != tuple(variable.shape):
            continue
        dtype = numpy_dtype(keras_seam.held_dtype(variable))
        unreadable = is_bytes(dataset) and "dtype" not in dataset.attrs
        in_parts = _is_large(dataset) or (dataset.chunks is None and keras_seam.sharding_of(variable) is not None)
        if _holds(dataset, dtype) and (in_parts or unreadable):
            keras_seam.write_rows(variable, dtype, partial(_read_rows, dataset))
            found[place] = variable
    return found


def _places_of_variables(model: keras.Model, values: h5py.File) -> Iterator[tuple[str, keras.Variable]]:
    """The variables that a file has as they are: those of layers, and what optimizers keep for them."""
    for each in positions(model):
        is_looked_at = isinstance(each.holder, Weight) and each.holder.role == "integers"  # before it is stored
        if isinstance(each.target, keras.Variable) and not isinstance(each.target, View) and not is_looked_at:
            yield each.place, each.target
    for place, saved in keras_seam.saved_objects(model):
        if isinstance(saved, keras.Optimizer) and not keras_seam.has_own_saving(saved):
            stored = values.get(f"{place}/vars")
            if isinstance(stored, h5py.Group) and len(stored) == len(saved.variables):  # else Keras leaves them out
                yield from ((f"{place}/vars/{number}", variable) for number, variable in enumerate(saved.variables))


def _holds(dataset: h5py.Dataset, dtype: np.dtype[Any]) -> bool:
    """Whether a file has what a variable holds, bit by bit."""
    return dtype_of(dataset) == str(dtype) and (is_bytes(dataset) or dataset.dtype == dtype)


def _is_large(dataset: h5py.Dataset) -> bool:
    return dataset.chunks is None and dataset.nbytes > LARGE


def _read_rows(dataset: h5py.Dataset, array: Array, first: int | tuple[int, ...]) -> None:
    place = (first,) if isinstance(first, int) else first
    if array.size:
        part = tuple(slice(at, at + n) for at, n in zip(place, array.shape, strict=False))
        dataset.read_direct(array.view(dataset.dtype), part)


LARGE = 2**20
"""Bytes of what is worth being read in parts."""
MAX_UNBUILT = 10_000
"""Weights without a value that a plan may name: those of layers that have not been built."""


def _check_plan(found: Contents, *, path: object) -> None:
    """Raises if the ties name many more weights than there are values, each of which would have to be made."""
    weights = {uid for record in _records(found.config) for uid in record.get("weights", ())}
    if len(weights) > len(found.values) + MAX_UNBUILT:
        raise InvalidConfig(
            f"The ties in {str(path)!r} name {len(weights):,} weights, and it has {len(found.values):,} values."
        )


def _check_values(model: keras.Model, found: Contents, *, compiled: bool, path: object) -> None:
    """Raises unless each weight has a value in the file, and each value a weight."""
    needed, known = places_of(model, of_layers=True), places_of(model)
    absent = [place for place, shape in needed.items() if found.values.get(place) != shape]
    if absent:
        raise InvalidConfig(f"{str(path)!r} has no value for {listed(sorted(absent))}.")
    tops = {place.partition("/")[0] for place in needed}
    extra = [place for place in found.values if place not in known]
    if not compiled or getattr(model, "non_trainable_weights", None):
        # Slots of what was frozen after it was trained: Keras goes on without them, and says so where it matters.
        extra = [place for place in extra if place.partition("/")[0] in tops]
    if extra:
        raise InvalidConfig(f"{str(path)!r} has values that the model in it has no place for: {listed(sorted(extra))}.")


def _check_ties(model: keras.Model, config: Config, *, path: object) -> None:
    """Raises unless each tie that the file records holds."""
    layers: dict[str, list[keras.Layer]] = {}
    for layer in keras_seam.contained_layers(model):
        layers.setdefault(layer.name, []).append(layer)
    lost = [
        f"{name}/{tie}"
        for name, ties in _recorded(config)
        for tie in ties
        if not any(_is_tied(layer, tie) for layer in layers.get(name, ()))
    ]
    if lost:
        raise LostTie(
            f"{str(path)!r} records ties that did not come back: {listed(sorted(lost))}. A class around them makes "
            "its layers anew when it is read, and does not read them from its config."
        )


def _recorded(config: object) -> Iterator[tuple[str, list[str]]]:
    """The names of tied layers in a config, and the paths of their ties."""
    for entry in dictionaries(config):
        record, name = entry.get(KEY), entry.get("name")
        if isinstance(record, dict) and isinstance(record.get("ties"), dict) and isinstance(name, str):
            yield name, list(record["ties"])


def _records(config: object) -> Iterator[Config]:
    """The records of ties in a config."""
    for entry in dictionaries(config):
        record = entry.get(KEY)
        if isinstance(record, dict) and isinstance(record.get("weights"), dict):
            yield record


def _is_tied(layer: keras.Layer, path: str) -> bool:
    try:
        place = paths.locate(layer, paths.split(path))
    except TetherError:
        return False
    state = state_of(place.layer)
    return isinstance(place.variable, View) or (state is not None and place.leaf in state.pending)


__all__ = ["explained", "load_model", "making", "missing_names"]
