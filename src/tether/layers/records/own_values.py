"""How a tied layer's own variables are written and read.

The base's own methods do it, whatever they are, on a layer that shows its views where the variables
would be. A store that stands between them and the file leaves the views out when writing, so each
weight is in the file once, where the weight itself is saved. Keys stay those of the untied layer: a
file written before the tie has values under the left-out keys, and they go to the weights, once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from tether import keras_seam
from tether.errors import NotInvertible, ShapeMismatch, ValueConflict
from tether.layers.tying.state import State, View, from_above, ordered_variables
from tether.types import Array, Function, Store, Tensor
from tether.weights.algebra import invert, put
from tether.weights.codec import encode
from tether.weights.expression import Stored
from tether.weights.identity import told_by_file


class _Recorder(dict[str, Tensor]):
    """A store that only notes what would be written."""


class _WithoutViews:
    """Passes on what a layer writes, except views."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __setitem__(self, key: str, value: Tensor) -> None:
        if not isinstance(value, View):
            self._store[key] = value

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def __contains__(self, key: str) -> bool:
        return key in self._store


class _Kept:
    """Stands for a value that the file leaves to the weights; assigning it changes nothing."""

    def into_view(self, view: View) -> None:
        """Gives the view its value: called by `View.assign`."""


KEPT = _Kept()


class _Filled:
    """A file's entries, and `KEPT` for those that belong to views and are not in it."""

    def __init__(self, store: Store, views: dict[str, View]) -> None:
        self._store = store
        self._present = list(store.keys())
        self._views = views

    def keys(self) -> list[str]:
        return self._present + [key for key in self._views if key not in self._present]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __getitem__(self, key: str) -> Tensor:
        if key in self._views:
            return FromFile(self._store[key]) if key in self._present else KEPT
        return self._store[key]

    def values(self) -> list[Tensor]:
        return [self[key] for key in self.keys()]

    def items(self) -> Iterable[tuple[str, Tensor]]:
        return [(key, self[key]) for key in self.keys()]

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


class FromFile:
    """A value of an untied file for a view: it has to go to a weight, or agree with it."""

    def __init__(self, value: Tensor) -> None:
        self.array = np.asarray(value)
        self.shape = self.array.shape
        self.dtype = self.array.dtype

    def __array__(self, *args: Any, **kwargs: Any) -> Array:
        return np.asarray(self.array, *args, **kwargs)

    def into_view(self, view: View) -> None:
        """Gives the view its value: called by `View.assign`."""
        take(view, self.array)


def save(layer: keras.Layer, state: State, store: Store, base_save: Function) -> None:
    """Writes the layer's own variables, without those that are views.

    Raises:
        LostTie: A `.keras` archive is being written, and its config does not hold a tie.
    """
    scope = keras_seam.saving_scope()
    if scope is not None and "checked" not in scope:
        from_above["refuse_to_lose"](scope["root"], told_by_file())
        scope["checked"] = True
    note_ties(store, entries(layer, state, base_save))
    with keras_seam.listed_variables(layer, ordered_variables(layer, state)):
        base_save(_WithoutViews(store))


def entries(layer: keras.Layer, state: State, base_save: Function) -> dict[str, Tensor]:
    """What the untied layer would write, by key: variables, and views for what its file would have of its own."""
    with keras_seam.listed_variables(layer, ordered_variables(layer, state)):
        recorder = _Recorder()
        base_save(recorder)
    return dict(recorder)


NOTE = "tether"
"""The attribute of a layer's group in an HDF5 file of weights that says what the views in it evaluate."""


def note_ties(store: object, written: dict[str, Tensor]) -> None:
    """Writes beside a layer's entries what the views among them evaluate, as JSON; for who reads without a config.

    `{"version": 1, "ties": {"0": {"dtype": "float32", "steps": [{"weight": "4f1c..."}, ...]}}}`
    """
    notes = keras_seam.entry_notes(store)
    views = {key: value for key, value in written.items() if isinstance(value, View)}
    if notes is not None and views:
        ties = {
            key: {"dtype": keras_seam.stored_dtype(view), "steps": encode(view.expression)}
            for key, view in views.items()
        }
        notes[NOTE] = json.dumps({"version": 1, "ties": ties})


def load(layer: keras.Layer, state: State, store: Store, base_save: Function, base_load: Function) -> None:
    """Reads what `save` wrote, or what the untied layer wrote."""
    written = entries(layer, state, base_save)
    views = {key: value for key, value in written.items() if isinstance(value, View)}
    with keras_seam.listed_variables(layer, ordered_variables(layer, state)):
        base_load(_Filled(store, views))


def take(view: View, array: Array) -> None:
    """Brings a value of an untied file to the weights of a view.

    Raises:
        ValueConflict: It contradicts what the file says elsewhere about the same weights.
    """
    shape = tuple(view.shape)
    if array.shape != shape:
        raise ShapeMismatch(f"{view.path} has shape {shape}; the file has a value of shape {array.shape}.")
    scope = keras_seam.loading_scope()
    loaded = {} if scope is None else scope.setdefault("loaded", {})
    source = f"the entry of {view.path}"
    parts = _parts(view, array, loaded)
    if not parts:
        present = keras_seam.to_numpy(view.value, str(view.path), in_step=True).astype("float64")
        difference = float(np.max(np.abs(present - array.astype("float64")))) if array.size else 0.0
        if difference > 1e-6:
            raise ValueConflict(
                f"The file has a value of its own for {view.path}, which is {view.expression.notation()} here and "
                f"differs from it by up to {difference:.3g}; that expression cannot be assigned. Load the file before "
                f"the tie, or assign {', '.join(weight.name for weight in view.expression.weights_used())}."
            )
        return
    for weight, part in parts.items():
        weight.load_value(keras_seam.to_numpy(part, weight.name, in_step=True), loaded, source=source)


def _parts(view: View, array: Array, loaded: Container[int]) -> dict[Stored, Tensor]:
    """The values that a view's weights take: through its inverse, else its base if nothing was loaded for that."""
    value = keras.ops.convert_to_tensor(array)
    with contextlib.suppress(NotInvertible):
        return invert(view.expression, value)
    with contextlib.suppress(NotInvertible):
        parts = put(view.expression, value)
        return {} if any(id(weight) in loaded for weight in parts) else parts
    return {}
