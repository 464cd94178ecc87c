"""Loading a model from a file that a stranger may have written, and seeing that all of it arrived."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import h5py
import keras
import numpy as np

from tether import keras_seam
from tether.errors import InvalidConfig, LostTie, TetherError
from tether.files.archive import Contents, contents, opened_archive
from tether.files.hdf5 import dtype_of, is_bytes
from tether.files.making import making
from tether.files.places import places_of
from tether.files.positions import positions
from tether.layers.tying import paths
from tether.layers.tying.state import View, state_of
from tether.layers.tying.tied import KEY
from tether.weights.identity import dictionaries
from tether.weights.leaves import numpy_dtype


def load_model(
    path: str | os.PathLike[str],
    *,
    custom_objects: dict[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
) -> Any:
    """Reads a `.keras` file, by whomever it was written, and checks what came of it.

    The file is held against its checksums and against what it says about itself before anything in it is used.
    Afterwards every tie that it records has to be there, every weight of the model has to have had a value in it, and
    every value in it a weight.

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
    model = tether.files.load_model("model.keras")
    ```
    """
    found = contents(path, whole=True)
    with making(path, found.config, custom_objects, written_by=found.written_by, takes_custom_objects=True):
        _check_plan(found, path=path)
        with warnings.catch_warnings():
            # Keras warns of some values that it does not find, and goes on; here that becomes an error below.
            warnings.filterwarnings("ignore", "Skipping nested container")
            model = _read(path, custom_objects=custom_objects, compile=compile, safe_mode=safe_mode)
        _check_values(model, found, compiled=compile, path=path)
        _check_ties(model, found.config, path=path)
    return model


def _read(path: Any, **options: Any) -> Any:
    with opened_archive(path) as archive, archive.values() as values:
        return keras_seam.read_archive(
            archive.zip, values, lambda model: _stored_in_parts(model, values), large=LARGE, **options
        )


def _stored_in_parts(model: Any, values: h5py.File) -> dict[str, Any]:
    """Stores large weights that are in the file as they are in memory, a few rows at a time.

    And those of float8, of which Keras writes the bytes and cannot read them.
    """
    found: dict[str, Any] = {}
    for each in positions(model):
        variable, dataset = each.target, values.get(each.place)
        if isinstance(variable, View) or not isinstance(variable, keras.Variable):
            continue
        if not isinstance(dataset, h5py.Dataset) or dataset.shape != tuple(variable.shape):
            continue
        dtype = numpy_dtype(keras_seam.held_dtype(variable))
        unreadable = is_bytes(dataset) and "dtype" not in dataset.attrs
        if _holds(dataset, dtype) and (_is_large(dataset) or unreadable):
            keras_seam.write_rows(variable, dtype, partial(_read_rows, dataset))
            found[each.place] = variable
    return found


def _holds(dataset: h5py.Dataset, dtype: np.dtype[Any]) -> bool:
    """Whether a file has what a variable holds, bit by bit."""
    return dtype_of(dataset) == str(dtype) and (is_bytes(dataset) or dataset.dtype == dtype)


def _is_large(dataset: h5py.Dataset) -> bool:
    return dataset.chunks is None and dataset.nbytes > LARGE


def _read_rows(dataset: h5py.Dataset, array: Any, first: int) -> None:
    if array.size:
        dataset.read_direct(array.view(dataset.dtype), np.s_[first : first + len(array)] if array.ndim else ())


LARGE = 2**20
"""Bytes of what is worth being read in parts."""
MAX_UNBUILT = 10_000
"""Weights without a value that a plan may name: those of layers that have not been built."""


def _check_plan(found: Contents, *, path: Any) -> None:
    """Raises if the ties name many more weights than there are values, each of which would have to be made."""
    weights = {uid for record in _records(found.config) for uid in record.get("weights", ())}
    if len(weights) > len(found.values) + MAX_UNBUILT:
        raise InvalidConfig(
            f"The ties in {str(path)!r} name {len(weights):,} weights, and it has {len(found.values):,} values."
        )


def _check_values(model: Any, found: Contents, *, compiled: bool, path: Any) -> None:
    """Raises unless each weight has a value in the file, and each value a weight."""
    needed, known = places_of(model, of_layers=True), places_of(model)
    absent = [place for place, shape in needed.items() if found.values.get(place) != shape]
    if absent:
        raise InvalidConfig(f"{str(path)!r} has no value for {_some(absent)}.")
    tops = {place.partition("/")[0] for place in needed}
    extra = [place for place in found.values if place not in known]
    if not compiled or getattr(model, "non_trainable_weights", None):
        # Slots of what was frozen after it was trained: Keras goes on without them, and says so where it matters.
        extra = [place for place in extra if place.partition("/")[0] in tops]
    if extra:
        raise InvalidConfig(f"{str(path)!r} has values that the model in it has no place for: {_some(extra)}.")


def _check_ties(model: Any, config: dict[str, Any], *, path: Any) -> None:
    """Raises unless each tie that the file records holds."""
    layers: dict[str, list[Any]] = {}
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
            f"{str(path)!r} records ties that did not come back: {_some(lost)}. A class around them makes its layers "
            "anew when it is read, and does not read them from its config."
        )


def _recorded(config: Any) -> Iterator[tuple[str, list[str]]]:
    """The names of tied layers in a config, and the paths of their ties."""
    for entry in dictionaries(config):
        record, name = entry.get(KEY), entry.get("name")
        if isinstance(record, dict) and isinstance(record.get("ties"), dict) and isinstance(name, str):
            yield name, list(record["ties"])


def _records(config: Any) -> Iterator[dict[str, Any]]:
    """The records of ties in a config."""
    for entry in dictionaries(config):
        record = entry.get(KEY)
        if isinstance(record, dict) and isinstance(record.get("weights"), dict):
            yield record


def _is_tied(layer: Any, path: str) -> bool:
    try:
        place = paths.locate(layer, paths.split(path))
    except TetherError:
        return False
    state = state_of(place.layer)
    return isinstance(place.variable, View) or (state is not None and place.leaf in state.pending)


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


__all__ = ["load_model"]
