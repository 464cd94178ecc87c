"""Saving a model so that a failure leaves the old file as it was, and so that the file holds what the model shares."""

from __future__ import annotations

import copy
import os
import pathlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

import keras

from tether import keras_seam
from tether.atomic import written_beside
from tether.errors import TetherError, Unsupported, no_folder, received
from tether.files.keras.archive import contents, places_of, with_config
from tether.layers.records.verification import record_further_out
from tether.layers.tying.tied import base_class
from tether.types import Config
from tether.weights.weight import Weight


def save_model(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Writes a standard `.keras` file that `keras.saving.load_model` reads.

    It is written beside the target, checked, and renamed: if a tie would be lost, or anything else fails, the file
    that was there is untouched. (Keras's own `model.save` has emptied it by then.)

    A layer that is in two models at once, in one and outside of it, or in a wrapper and alone, comes back as one
    layer. To see that, such a model is put together once more from its config while it is saved.

    A model that is split over several processes (JAX) is saved by all of them. They gather one weight at a time, and
    process 0 writes; each returns when the file is there.

    Args:
        model: A Keras model or layer.
        path: Where to, with the ending `.keras`.

    Raises:
        LostTie: The file would not hold a tie; the error says where to put it.
        Unsupported: A layer in several places would come back as several.
        TetherError: The path has another ending, its folder does not exist, or the file came out incomplete. Another
            process has failed, or did not come within the time limit (`tether.distribution.time_limit`).

    Example:
    ```python
    tether.files.save_model(model, "model.keras")
    again = keras.saving.load_model("model.keras")
    ```
    """
    target = pathlib.Path(path)
    if target.suffix != ".keras":
        raise TetherError(
            f"A model is saved in a file that ends in '.keras', as in {target.stem + '.keras'!r}. Its values alone: "
            f"`save_safetensors`, or Keras's `model.save_weights('model.weights.h5')`. {received(path=str(path))}"
        )
    if not target.parent.is_dir():
        raise TetherError(no_folder(target))
    with keras_seam.in_step_for(model, f"save_model({target.name!r})"):
        record_further_out(model)
        if keras_seam.place_in_step()[0] == 0:
            with written_beside(target) as beside:
                _write(model, beside)
        else:
            with tempfile.TemporaryDirectory() as folder:
                _write(model, pathlib.Path(folder) / target.name, is_kept=False)


def _write(model: keras.Model, path: pathlib.Path, *, is_kept: bool = True) -> None:
    """Writes the file; in other processes than the one that keeps it, without values, and for the sake of going along.

    All that makes variables on the way, or reads them, is done in every process.
    """
    with keras_seam.saved_in_step(model):
        keras.saving.save_model(model, path)
    found = contents(path)
    absent = sorted(set(places_of(model).items()) - set(found.values.items()))
    if absent and is_kept:
        raise TetherError(
            f"The file came out incomplete: it lacks {', '.join(place for place, _ in absent[:8])}. Is the disk "
            "full, or does a layer's `save_own_variables` write something else each time?"
        )
    if has_shared_layers(model):
        config = mended(model, found.config)
        with written_beside(path) as again:
            with_config(path, again, config)


# --------------------------------------------------------------------------- one layer in several places
# One instance of a layer that a model has in several places, in a config that plain Keras reads.
#
# Keras writes a layer's config wherever the layer is, and an id from the second place on. Two things are lost. Graphs
# and stacks copy the configs of their layers before the second place is met, so the first has no id, and two layers
# come back. And a graph numbers the calls of its layers as if nobody else had called them, so with one layer its
# numbers point to the calls of another graph.
#
# Here every place gets the id. How many calls a layer has by the time a graph is put together is seen by putting the
# model together once: a reader stands at the end of each graph's layers, where all of them have been made and none
# has been called by this graph. The same reading shows that what comes back is what was there.


_READER = "tether>CallCounter"


def has_shared_layers(model: keras.Model) -> bool:
    """Whether a layer is in two layers or models at once."""
    return bool(shared_layers(model))


def shared_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers that are in two layers or models at once, weights and inputs aside."""
    parents: Counter[int] = Counter()
    found: dict[int, keras.Layer] = {}
    for layer in keras_seam.contained_layers(model):
        for child in {id(child): child for child in keras_seam.sublayers(layer)}.values():
            if not isinstance(child, (Weight, keras.layers.InputLayer)):
                parents[id(child)] += 1
                found[id(child)] = child
    return [found[key] for key, count in parents.items() if count > 1]


def mended(model: keras.Model, config: Config) -> Config:
    """The config of a model with shared layers, so that plain Keras reads back one instance of each.

    Args:
        model: A model with layers in several places.
        config: Its config, as Keras wrote it. It is not changed.

    Raises:
        Unsupported: No config does that.
    """
    config = copy.deepcopy(config)
    marked = keras_seam.config_with_ids(model)
    layers = {id(layer) for layer in shared_layers(model)}
    places = Counter(found[keras_seam.SHARED_ID] for found in _objects(marked) if keras_seam.SHARED_ID in found)
    shared = {identity for identity, count in places.items() if count > 1 and identity in layers}
    _mark(config, marked, shared)
    offsets, again = _rehearse(model, config, shared)
    for place, graph in enumerate(_graphs(config)):
        _shift(graph, offsets.get(place, {}))
    _compare(model, again)
    return config


def _objects(config: object) -> Iterator[Config]:
    """Every object in a config, inner ones after the one they are in."""
    if isinstance(config, dict):
        if "class_name" in config:
            yield config
        for value in config.values():
            yield from _objects(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _objects(value)


def _mark(config: object, marked: object, shared: set[int]) -> None:
    """Takes over the ids of shared layers from a config of the same model."""
    if isinstance(config, dict) and isinstance(marked, dict):
        if marked.get(keras_seam.SHARED_ID) in shared:
            config[keras_seam.SHARED_ID] = marked[keras_seam.SHARED_ID]
        for key, value in config.items():
            _mark(value, marked.get(key), shared)
    elif isinstance(config, list) and isinstance(marked, (list, tuple)):
        for value, other in zip(config, marked, strict=False):
            _mark(value, other, shared)


# --------------------------------------------------------------------------- the calls of a graph


def _graphs(config: object) -> list[Config]:
    """The graphs in a config: the inner configs of functional models."""
    keys = {"layers", "input_layers", "output_layers"}
    inner = [found["config"] for found in _objects(config) if isinstance(found.get("config"), dict)]
    return [graph for graph in inner if keys <= set(graph)]


def _rehearse(model: keras.Model, config: Config, shared: set[int]) -> tuple[dict[int, dict[str, int]], keras.Model]:
    """Puts the model together from its config, once, and counts the calls that each graph finds in its layers."""
    offsets: dict[int, dict[str, int]] = {}
    trial = copy.deepcopy(config)
    trial["compile_config"] = None
    graphs = _graphs(trial)
    parts = [dict(graph) for graph in graphs]  # Keras takes the graphs apart, but not the lists in them
    for place, graph in enumerate(graphs):
        reader = {"module": None, "class_name": _READER, "registered_name": _READER, "config": {"place": place}}
        graph["layers"].append({**reader, "name": f"{_READER}_{place}", "inbound_nodes": []})

    class CallCounter:
        """Read in the place of a layer, when the other layers of its graph have been made."""

        @staticmethod
        def from_config(config: Config) -> keras.Layer:
            """Counts, and corrects the graph that is being read."""
            place = config["place"]
            offsets[place] = _calls_so_far(parts[place], shared)
            _shift(parts[place], offsets[place])
            return keras.layers.Identity(name=f"{_READER.replace('>', '_')}_{place}")

    custom: dict[str, object] = {_READER: CallCounter}
    for layer in keras_seam.contained_layers(model):
        cls = base_class(type(layer))
        custom.setdefault(cls.__name__, cls)
        custom[keras.saving.get_registered_name(cls)] = cls
    try:
        return offsets, keras_seam.deserialized(trial, custom)
    except Exception as error:
        raise Unsupported(
            f"{_names(model)} could not be read back as one layer: {error} Check that the `from_config` of your own "
            "classes gives each layer that it holds to `keras.saving.deserialize_keras_object`."
        ) from error


def _calls_so_far(graph: Config, shared: set[int]) -> dict[str, int]:
    calls = {}
    for layer in graph["layers"]:
        if layer.get(keras_seam.SHARED_ID) in shared:
            calls[layer["name"]] = keras_seam.calls_of(keras_seam.shared_object(layer[keras_seam.SHARED_ID]))
    return calls


def _shift(graph: Config, offsets: dict[str, int]) -> None:
    """Adds what a layer's calls by others are to the numbers of its calls in a graph."""
    if not any(offsets.values()):
        return
    for layer in graph["layers"]:
        for found in _objects(layer.get("inbound_nodes", [])):
            if found["class_name"] == "__keras_tensor__":
                _shift_one(found["config"]["keras_history"], offsets)
    _shift_outputs(graph["output_layers"], offsets)


def _shift_outputs(outputs: object, offsets: dict[str, int]) -> None:
    if isinstance(outputs, list) and len(outputs) == 3 and isinstance(outputs[0], str):
        _shift_one(outputs, offsets)
    elif isinstance(outputs, (list, dict)):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            _shift_outputs(value, offsets)


def _shift_one(history: list[Any], offsets: dict[str, int]) -> None:
    history[1] += offsets.get(history[0], 0)


# --------------------------------------------------------------------------- what came back


def _compare(model: keras.Model, again: object) -> None:
    """Raises unless a model has the same layers in the same places, and graphs that compute the same."""
    if _layers(model) != _layers(again):
        raise Unsupported(
            f"{_names(model)} would come back as several layers. A class around it makes a layer of its own when it is "
            "read. Give that class a `get_config` that holds `keras.saving.serialize_keras_object(layer)` and a "
            "`from_config` that reads it, or save the parts apart."
        )
    if _computed(model) != _computed(again):
        raise Unsupported(
            f"{_names(model)} would come back in a graph that computes something else. Save the models around it apart."
        )


def _names(model: keras.Model) -> str:
    return "The layer " + ", ".join(repr(layer.name) for layer in shared_layers(model)) + ", which is in several models"


def _layers(model: keras.Model) -> list[tuple[str, str, str]]:
    """Where a file has the values of each layer, its name and its class."""
    return [
        (place, found.name, base_class(type(found)).__name__)
        for place, found in keras_seam.saved_objects(model)
        if isinstance(found, keras.layers.Layer) and not isinstance(found, (Weight, keras.layers.InputLayer))
    ]


def _computed(model: keras.Model) -> list[tuple[str, list[int], list[int]]]:
    """For each graph a number for all that it calls, and for each of its outputs."""
    found = []
    for layer in keras_seam.contained_layers(model):
        if isinstance(layer, keras_seam.Functional):
            known = {id(tensor): place for place, tensor in enumerate(layer.inputs)}
            for operation, inputs, outputs in keras_seam.graph_of(layer):
                call = hash((operation.name, *(known[id(tensor)] for tensor in inputs)))
                for place, tensor in enumerate(outputs):
                    known.setdefault(id(tensor), hash((call, place)))
            found.append((layer.name, sorted(known.values()), [known[id(tensor)] for tensor in layer.outputs]))
    return found


__all__ = ["has_shared_layers", "mended", "save_model", "shared_layers"]
