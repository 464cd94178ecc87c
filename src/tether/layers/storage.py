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
from tether.errors import LostTie, NotInvertible, ShapeMismatch, ValueConflict
from tether.layers.state import State, ordered_variables
from tether.layers.view import View
from tether.weights.base import put
from tether.weights.codec import encode
from tether.weights.inversion import invert
from tether.weights.weight import Weight


class _Recorder(dict[str, Any]):
    """A store that only notes what would be written."""


class _WithoutViews:
    """Passes on what a layer writes, except views."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(value, View):
            self._store[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __contains__(self, key: str) -> bool:
        return key in self._store


class _Kept:
    """Stands for a value that the file leaves to the weights; assigning it changes nothing."""

    def into_view(self, view: View) -> None:
        """Called by `View.assign`."""


KEPT = _Kept()


class _Filled:
    """A file's entries, and `KEPT` for those that belong to views and are not in it."""

    def __init__(self, store: Any, views: dict[str, View]) -> None:
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

    def __getitem__(self, key: str) -> Any:
        if key in self._views:
            return FromFile(self._store[key]) if key in self._present else KEPT
        return self._store[key]

    def values(self) -> list[Any]:
        return [self[key] for key in self.keys()]

    def items(self) -> Iterable[tuple[str, Any]]:
        return [(key, self[key]) for key in self.keys()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class FromFile:
    """A value of an untied file for a view: it has to go to a weight, or agree with it."""

    def __init__(self, value: Any) -> None:
        self.array = np.asarray(value)
        self.shape = self.array.shape
        self.dtype = self.array.dtype

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return np.asarray(self.array, *args, **kwargs)

    def into_view(self, view: View) -> None:
        """Called by `View.assign`."""
        take(view, self.array)


def save(layer: Any, state: State, store: Any, base_save: Any) -> None:
    """Writes the layer's own variables, without those that are views."""
    refuse_to_lose(layer, state)
    note_ties(store, entries(layer, state, base_save))
    with keras_seam.listed_variables(layer, ordered_variables(layer, state)):
        base_save(_WithoutViews(store))


def entries(layer: Any, state: State, base_save: Any) -> dict[str, Any]:
    """What the untied layer would write, by key: variables, and views for what its file would have of its own."""
    with keras_seam.listed_variables(layer, ordered_variables(layer, state)):
        recorder = _Recorder()
        base_save(recorder)
    return dict(recorder)


NOTE = "tether"
"""The attribute of a layer's group in an HDF5 file of weights that says what the views in it evaluate."""


def note_ties(store: Any, written: dict[str, Any]) -> None:
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


def load(layer: Any, state: State, store: Any, base_save: Any, base_load: Any) -> None:
    """Reads what `save` wrote, or what the untied layer wrote."""
    written = entries(layer, state, base_save)
    views = {key: value for key, value in written.items() if isinstance(value, View)}
    with keras_seam.listed_variables(layer, ordered_variables(layer, state)):
        base_load(_Filled(store, views))


def take(view: View, array: np.ndarray[Any, Any]) -> None:
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
        present = keras.ops.convert_to_numpy(view.value).astype("float64")
        difference = float(np.max(np.abs(present - array.astype("float64")))) if array.size else 0.0
        if difference > 1e-6:
            raise ValueConflict(
                f"The file has a value of its own for {view.path}, which is {view.expression.notation()} here and "
                f"differs from it by up to {difference:.3g}; that expression cannot be assigned. Load the file before "
                f"the tie, or assign {', '.join(weight.name for weight in view.expression.weights_used())}."
            )
        return
    for weight, part in parts.items():
        weight.load_value(keras.ops.convert_to_numpy(part), loaded, source=source)


def _parts(view: View, array: np.ndarray[Any, Any], loaded: Container[int]) -> dict[Weight, Any]:
    """The values that a view's weights take: through its inverse, else its base if nothing was loaded for that."""
    value = keras.ops.convert_to_tensor(array)
    with contextlib.suppress(NotInvertible):
        return invert(view.expression, value)
    with contextlib.suppress(NotInvertible):
        parts = put(view.expression, value)
        return {} if any(id(weight) in loaded for weight in parts) else parts
    return {}


def refuse_to_lose(layer: Any, state: State) -> None:
    """Raises if a `.keras` file is being written whose config does not hold a tie of this layer."""
    scope = keras_seam.saving_scope()
    if scope is None:
        return
    covered = scope.get("covered", set())
    for slot in state.slots:
        recorder = slot.tie.recorder()
        if (slot.tie.quantized or not slot.tie.made_by_code) and (recorder is None or id(recorder) not in covered):
            root = scope.get("root")
            raise LostTie(lost_tie_message(slot, root))
    saved, name = scope["root"], layer.name
    for penalty in state.penalties:
        if penalty.recorder() is not layer or penalty.made_by_code or penalty.is_void:
            continue
        if penalty.counts:
            refuse_to_forget(penalty, saved, scope.get("written", set()))
        if id(layer) not in covered:
            raise LostTie(
                f"Saving {getattr(saved, 'name', 'the model')!r} would lose a soft tie: "
                f"{penalty.notation()} is recorded on {name!r}, whose config is not part of what is saved. "
                "Make the soft tie from the outermost object that is saved, or inside the constructor that makes "
                "the layer."
            )


def refuse_to_forget(penalty: Any, root: Any, written: set[int]) -> None:
    """Raises if a weight of a penalty will be another one when the file is read."""
    for weight in penalty.weights:
        if weight not in penalty.owned and not weight.uses and id(weight) not in written:
            raise LostTie(
                f"Saving {getattr(root, 'name', 'the model')!r} would lose a soft tie: {penalty.notation()} names "
                f"{weight.name!r}, which the constructor of a layer of your own makes anew. Write the weight into that "
                "layer's `get_config` with `keras.saving.serialize_keras_object`, or make the soft tie in the same "
                "constructor."
            )


def lost_tie_message(slot: Any, root: Any) -> str:
    """Says which tie would be lost, and where to put it."""
    name = getattr(root, "name", "the model")
    if slot.tie.quantized:
        return (
            f"Saving {name!r} would lose a tie: {slot.view.path} = {slot.view.expression.notation()} was quantised, "
            "and the constructor of a layer of your own makes it again as a float. Save the model before it is "
            "quantised, and quantise it after loading; or give that layer a `get_config` that holds the tied layer's."
        )
    return (
        f"Saving {name!r} would lose a tie: {slot.view.path} = {slot.view.expression.notation()} is recorded on a "
        f"layer whose config is not part of the config of {name!r}. Tie from the outermost object that is saved, as in "
        f"`tether.tie(model, {{'path/to/{slot.view.name}': ...}})`, or tie inside the constructor of the layer that "
        "makes it, or give that layer a `get_config` that holds the tied layer's."
    )
